"""The report of a run or a suite: its figures are those of its JSON, and nothing in it is alive
but its own script. Tests in a browser skip where Chromium is missing: it is no Python package, so
neither `make setup` nor CI can bring it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from data_shards import UserError
from launch import report
from launch.__main__ import main
from launch.report_page import ranked, thinned
from tests.browser import CHROMIUM, Tab, browser
from tests.toy_report import HOSTILE, RUN, Parts, toy_scores, write_run, write_suite


def _reported(folder: Path) -> Parts:
    assert main(["report", str(folder)]) == 0
    return Parts(folder / report.PAGE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", ("books", *HOSTILE))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite") / "suite")


def test_every_figure_of_the_domains_is_that_of_the_summary(run: Path) -> None:
    found, summary = _reported(run), json.loads((run / "summary.json").read_text())
    expected = {
        one[key]
        for scores in (summary["shared"], summary["adapted"])
        for one in scores["domains"]
        for key in ("rows", "auc", "log_loss")
    } - {None}
    assert expected <= set(found.values)
    after = {one["domain"]: one["auc"] for one in summary["adapted"]["domains"]}
    gains = {
        after[one["domain"]] - one["auc"]
        for one in summary["shared"]["domains"]
        if one["auc"] is not None
    }
    drawn = {y for figure in found.figures for trace in figure["traces"] for y in trace["y"]}
    assert gains <= drawn and len(gains) == len(summary["shared"]["domains"]) - 1
    bins = summary["adapted"]["reliability"]
    assert {one["positives"] / one["rows"] for one in bins} <= drawn


def test_curves_are_those_of_the_metrics_file(run: Path) -> None:
    found = _reported(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line["mean_auc"] for line in lines if line["phase"] == "pretrain"]
    curves = [trace for figure in found.figures for trace in figure["traces"]]
    assert {"x": [1, 2, 3], "y": told} in [{k: one.get(k) for k in "xy"} for one in curves]
    speed = [line["rows_per_second"] for line in lines if line["phase"] == "pretrain"]
    assert speed in [one["y"] for one in curves]


def test_every_figure_is_one_that_plotly_knows(run: Path, suite: Path) -> None:
    figures = [*_reported(run).figures, *_reported(suite).figures]
    assert len(figures) > 10
    for figure in json.loads(re.sub(r'"--[a-z0-9-]+"', '"#000"', json.dumps(figures))):
        for choice in [[], *figure["choices"]]:
            go.Figure(data=[*figure["traces"], *choice], layout=figure["layout"])


def test_a_suite_marks_the_best_and_says_what_is_not_sure(suite: Path) -> None:
    found = _reported(suite)
    page = (suite / report.PAGE).read_text(encoding="utf-8")
    for told in ("+0.0200, n.s.", "+0.0100, p 0.012", "published 0.8015", "3 of 18 cells"):
        assert told in page
    rows = re.findall(r'<td class="(best|second)"', page)
    assert sorted(rows) == ["best", "best", "second", "second"]
    table = json.loads((suite / "results.json").read_text())["table"]
    assert {one["mean"] for one in table} <= set(found.values)


def test_a_page_asks_for_nothing_and_lets_no_name_act(run: Path, suite: Path) -> None:
    for folder in (run, suite):
        found = _reported(folder)
        assert not found.handlers and "img" not in found.tags
        assert found.tags.count("script") == 3
        assert all((folder / address).is_file() for address in found.addresses)
    assert set(HOSTILE) <= set(_reported(run).cells)


def test_terminal_shows_names_to_the_letter(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    _reported(run)
    out = capsys.readouterr().out
    assert all(name in out for name in HOSTILE) and "all rows mixed" in out
    assert f"page: {run / report.PAGE}" in out


def test_a_run_that_is_not_finished(run: Path, tmp_path: Path) -> None:
    page = write_run(tmp_path / "cut", ("a", "b"))
    (page / "summary.json").unlink()
    with (page / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "phase": "adapt b", "st')
    found = _reported(page)
    text = (page / report.PAGE).read_text()
    assert "Not finished: last heard of in “adapt b”, step 3" in text
    assert found.figures and "td" not in found.tags


def test_a_run_that_has_measured_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    found = _reported(tmp_path)
    assert "nothing has been measured yet" in (tmp_path / report.PAGE).read_text()
    assert found.figures == [] and found.addresses == ["run.toml"]


@pytest.mark.parametrize("domains", [("only",), ("a", "b")])
def test_a_run_without_a_second_phase(domains: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", domains)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "adapted": None, "kept": []}))
    found = _reported(folder)
    assert not {"kept", "–"} & set(found.cells)
    assert len(found.cells) == 6 * (len(domains) + 1)


def test_an_added_domain_has_its_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("a", "b"))
    one: dict[str, Any] = {
        "shared": toy_scores(("new",), 0.5),
        "adapted": toy_scores(("new",), 1.0),
    }
    one |= {"domain": "new", "kept": True, "seconds": 7.8, "others": 2, "moved": []}
    (folder / "added").mkdir()
    (folder / "added" / "new.json").write_text(json.dumps(one))
    found = _reported(folder)
    assert {"new", "nothing of 2 others"} <= set(found.cells)
    assert "added/new.json" in found.addresses


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "no such folder; give the one of a `train` or of a `compare`"),
        ("other", "", r"neither a run's folder \(no run.toml\) nor a suite's \(no results.json\)"),
        ("run.toml", "name =", "run.toml: not TOML .*; restore it"),
        ("run.toml", "[data]", "run.toml: not a run file as `train` writes it .* give the folder"),
        ("results.json", "{", "results.json: not JSON .*; run the suite again"),
        ("results.json", "[]", "results.json: not the results of a suite as `compare` writes them"),
    ],
)
def test_what_has_no_report(name: str | None, text: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if name is not None:
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        report.page_of(folder)


def test_ranks_and_thinning() -> None:
    assert ranked([0.1, None, 0.3, 0.2]) == ["", "", "best", "second"]
    assert ranked([0.1, 0.3, 0.3], lower_is_better=True) == ["best", "second", "second"]
    assert ranked([0.5, None]) == ["", ""]
    assert thinned(range(1000), 5)[::4] == [0, 999] and thinned([1, 2], 5) == [1, 2]


def test_pages_of_many_domains_stay_bounded(tmp_path: Path) -> None:
    names = tuple(f"domain {n}" for n in range(500))
    few = write_run(tmp_path / "few", names[:2], steps=300)
    many = write_run(tmp_path / "many", names, steps=12)
    for folder in (few, many):
        _reported(folder)
    size = [(folder / report.PAGE).stat().st_size for folder in (few, many)]
    assert size[0] < 5.2e6 and size[1] < 7e6
    longest = max(len(t["x"]) for f in Parts(few / report.PAGE).figures for t in f["traces"])
    assert longest <= 1200


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("needs chromium, which neither `make setup` nor CI can install")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("kind", ["run", "suite"])
def test_in_a_browser(kind: str, width: int, tab: Tab, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    _reported(folder)
    tab.asked.clear()
    tab.open(folder / report.PAGE, width, dark=width == 1200)
    assert tab.wrong == []
    assert [url for url in tab.asked if not url.startswith("data:")] == [
        (folder / report.PAGE).resolve().as_uri()
    ]
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    drawn = "document.querySelectorAll('.plot .main-svg').length > 0 && figures.length"
    assert tab.value(drawn) == len(Parts(folder / report.PAGE).figures)
    assert tab.value("document.querySelectorAll('.plot:not(:has(svg))').length") == 0
    assert tab.value("document.querySelectorAll('.plot a, .plot script').length") == 0
    before = tab.value("colour('--ink')")
    tab.value("document.getElementById('theme').click()")
    assert tab.value("colour('--ink')") != before
    pick = "for (const s of document.querySelectorAll('select')) { s.selectedIndex = 1; "
    tab.value(f"{pick} s.dispatchEvent(new Event('change')); }}")
    tab.value("document.querySelectorAll('thead button')[1].click()")
    assert tab.wrong == []
