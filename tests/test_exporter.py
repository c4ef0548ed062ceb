"""What Prometheus reads, what Grafana and the alerts ask for, and lines for a log collector."""

import io
import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from data_shards import UserError
from launch.json_lines import JsonLines
from trainer import exporter

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "k8s" / "monitoring"
LINE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)+)\})? (\S+)')


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_values", {})
    monkeypatch.setattr(exporter, "_beat", {"last": 0.0, "ended": 0.0})


def served() -> dict[tuple[str, str], float]:
    """Every number in the text, by name and labels; AssertionError for a line of no such form."""
    found = {}
    for line in exporter.text().splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_rows_steps_and_time_add_up() -> None:
    began = time.monotonic()
    for _ in exporter.waiting("pretrain", [1, 2, 3]):
        exporter.dealt_with("pretrain epoch 1", 64)
    found = served()
    assert found["banyan_rows_total", 'phase="pretrain"'] == 192
    assert found["banyan_steps_total", 'phase="pretrain"'] == 3
    parts = [
        found["banyan_seconds_total", f'phase="pretrain",part="{p}"'] for p in ("data", "work")
    ]
    assert min(parts) > 0 and sum(parts) < time.monotonic() - began


def test_the_wait_for_data_is_not_taken_for_work() -> None:
    def slow():  # noqa: ANN202
        for number in range(3):
            time.sleep(0.05)
            yield number

    for _ in exporter.waiting("pretrain", slow()):
        exporter.dealt_with("pretrain", 1)
    found = served()
    waited, worked = (
        found["banyan_seconds_total", f'phase="pretrain",part="{part}"']
        for part in ("data", "work")
    )
    assert waited > 0.14 and worked < waited / 3


def test_an_evaluation_is_told_by_domain() -> None:
    values = {"log_loss": 0.5, "step": 7, "domains": {'a"b\\': 0.75, "one class": None}}
    exporter.evaluated("adapt x", values)
    exporter.saved()
    found = served()
    assert found["banyan_auc", r'phase="adapt x",domain="a\"b\\"'] == 0.75
    assert found["banyan_loss", 'phase="adapt x"'] == 0.5
    assert time.time() - found["banyan_checkpoint_timestamp_seconds", ""] < 60
    assert len([key for key in found if key[0] == "banyan_auc"]) == 1


def test_the_port_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(exporter.PORT, "0")
    monkeypatch.setenv("RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    port = exporter.serve()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert "banyan_restarts 3.0\n" in answer.read().decode()


def test_no_port_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(exporter.PORT, raising=False)
    assert exporter.serve() is None


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv(exporter.PORT, str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="no metrics can be served there"):
            exporter.serve()


def test_each_batch_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(exporter.HEARTBEAT, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    exporter.dealt_with("pretrain epoch 1", 64)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_sign_of_life_that_cannot_be_given_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(exporter.HEARTBEAT, str(tmp_path / "away"))
    exporter.dealt_with("pretrain", 1)
    assert served()["banyan_steps_total", 'phase="pretrain"'] == 1


def _asked_for(expression: str) -> set[str]:
    assert expression.count("(") == expression.count(")")
    return set(re.findall(r"banyan_\w+", expression))


def test_the_dashboard_shows_what_is_served() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = set().union(*map(_asked_for, expressions))
    assert asked == exporter.METRICS.keys() - {"banyan_evaluation_step"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_ask_for_what_is_served_and_say_what_to_do() -> None:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    book = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    heads = {head.lower().replace(" ", "-") for head in re.findall(r"^## (.*)$", book, re.M)}
    for rule in group["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert _asked_for(rule["expr"]) and _asked_for(rule["expr"]) <= exporter.METRICS.keys()
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md" and anchor in heads


def test_each_line_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "planted-node-0-1")
    monkeypatch.setenv("RANK", "3")
    out = io.StringIO()
    lines = JsonLines(out)
    print("step 1,", end=" ", file=lines)
    print('"half" done\n\nerror: no', file=lines)
    print(' {"message": "of a rank"}', file=lines)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [one["message"] for one in found] == ['step 1, "half" done', "error: no", "of a rank"]
    assert [one.get("level") for one in found] == ["info", "error", None]
    assert {(one["pod"], one["rank"]) for one in found[:2]} == {("planted-node-0-1", "3")}
