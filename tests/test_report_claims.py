"""A report says no more than was measured, and what it names stays a name."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from launch import report
from launch.report_curves import adapter_sparks, curves, learning
from launch.report_page import Figure, Page, Table
from launch.report_run import Record
from launch.report_suite import suite_page
from tests.toy_report import RUN, Parts, toy_scores, write_run, write_suite
from trainer.adapter_store import quoted
from trainer.report import final_table

PHASES = {name: {"metric": metric} for name, metric in (("pretrain", "wauc"), ("adapt", "auc"))}
PHASES["teacher"] = {"metric": "log_loss"}


def _lines(phase: str, metric: str, *told: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"phase": phase, "step": s, "log_loss": 0.5, metric: value} for s, value in told]


def _change(folder: Path, **values: Any) -> None:
    """Of the results of a suite."""
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _table(page: Page, title: str) -> Table:
    parts = [part for section in page.sections for part in section.parts]
    return next(part for part in parts if isinstance(part, Table) and part.title == title)


def _add(folder: Path, domain: str, file: str) -> None:
    one = {name: toy_scores((domain,), by) for name, by in (("shared", 0.5), ("adapted", 1.0))}
    values = one | {"domain": domain, "kept": True, "seconds": 7.8, "others": 1, "moved": []}
    (folder / "added").mkdir()
    (folder / "added" / file).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "why", "more"),
    [
        (RUN, "beat the shared part", "and 1.0 s for adapters"),
        (RUN.replace("[adapt]", "one_phase = true\n[adapt]"), "learned with the shared part", ""),
        ('phases = ["pretrain"]\n' + RUN, "learned with the shared part", ""),
    ],
)
def test_adapters_of_one_phase_have_neither_time_nor_rival(
    text: str, why: str, more: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", ("a", "later"))
    (folder / "run.toml").write_text(text)
    _add(folder, "later", "later.json")
    told = {label: rest for label, _, rest in report.page_of(folder).headlines}
    assert (told["Adapters kept"], told["Pretraining"]) == (why, more)


def test_a_suite_in_progress_is_not_compared_across_seeds(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    suite = json.loads((folder / "results.json").read_text())
    place = {"model": "mlp", "setting": "longer"}
    cells = [c for c in suite["cells"] if not (c | place == c and c["seed"] > 1)]
    table = [
        one | ({"seeds": 1, "p": None} if one | place == one else {}) for one in suite["table"]
    ]
    _change(folder, cells=cells, table=table)
    page = suite_page(folder)
    assert page.status == "Not finished: 5 of 18 cells are still missing."
    _change(folder, wanted=len(cells))
    assert not suite_page(folder).status, "the others are not wanted"
    row = _table(page, "WAUC").rows[0]
    assert [cell.mark for cell in row] == ["", "second", "best", ""]
    assert row[3].more[0] == "+0.0200, 1 seed"
    assert page.headlines[0][2] == "mlp, +adapters"


def test_results_of_before_have_neither_seeds_nor_bins(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    cells = json.loads((folder / "results.json").read_text())["cells"]
    for cell in cells:
        del cell["scores"]["reliability"]
    _change(folder, cells=cells, seeds=None)
    page = suite_page(folder)
    assert page.status == "Not finished: 3 of 18 cells are still missing."
    assert "Calibration" not in [section.title for section in page.sections]


@pytest.mark.parametrize(("metric", "best"), [("auc", 0.9), ("log_loss", 0.1)])
def test_a_thinned_curve_keeps_its_best_and_the_gain_has_its_sign(metric: str, best: float) -> None:
    told = [(step, best if step == 501 else 0.5) for step in range(1, 1001)]
    phases = PHASES | {"adapt": {"metric": metric}}
    (curve,) = curves(_lines("adapt a", metric, *told), {**phases})
    assert curve.best is not None and len(curve.steps) == 121
    assert (curve.steps[curve.best], curve.values[curve.best]) == (501, best)
    (sparks,) = adapter_sparks([curve], {"a": (0.5, True)})
    assert sparks.items[0].told == "+0.4000"


def test_each_kind_of_phase_has_its_own_metric() -> None:
    lines = [line | {"wauc": 1, "auc": 2, "log_loss": 3} for line in _lines("", "", (1, 0.0))]
    phases = ("pretrain", "teacher of a", "adapt a")
    found = curves([line | {"phase": phase} for phase in phases for line in lines], PHASES)
    assert [curve.values for curve in found] == [[1], [3], [2]]


def test_a_phase_that_went_back_forgets_what_it_told_from_there() -> None:
    old, new = [(1, 0.1), (2, 0.2), (3, 0.9)], [(2, 0.3)]
    (curve,) = curves(_lines("pretrain", "wauc", *old, *new), PHASES)
    assert (curve.steps, curve.values) == ([1, 2], [0.1, 0.3])


def test_titles_of_axes_are_names_to_the_letter(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    text = (folder / "results.json").read_text()
    text = text.replace('"shared"', '"<i>Shared</i>"').replace('"domain": "a"', '"domain": "<b>"')
    (folder / "results.json").write_text(text)
    axis = json.loads(text)["axis"] | {"name": "<u>w</u>"}
    _change(folder, metric="auc/<b>", axis=axis)
    page = suite_page(folder)
    figures = [part for s in page.sections for part in s.parts if isinstance(part, Figure)]
    (curve,) = curves(_lines("pretrain", "auc/<b>", (1, 0.5)), {"pretrain": {"metric": "auc/<b>"}})
    figures += learning([curve], {})
    titles = {f.layout[axis]["title"]["text"] for f in figures for axis in ("xaxis", "yaxis")}
    expected = {"auc/&lt;b&gt;", "change against &lt;i&gt;Shared&lt;/i&gt;", "&lt;u&gt;w&lt;/u&gt;"}
    assert expected <= titles and not any("<" in title for title in titles)
    assert {row[3].sort for row in _table(page, "All runs").rows} == {
        cell["scores"]["domains"][0]["auc"] for cell in json.loads(text)["cells"]
    }


def test_links_stay_inside_and_work(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    runs = ["../outside", str(tmp_path / "outside"), "in side#1%20", "x/../within"]
    cells = json.loads((folder / "results.json").read_text())["cells"][: len(runs)]
    for run in ("x", *runs):
        (folder / run).mkdir(parents=True, exist_ok=True)
        (folder / run / report.PAGE).touch()
    _change(folder, cells=[c | {"run": run} for c, run in zip(cells, runs, strict=True)])
    pages = [row[0].link for row in _table(suite_page(folder), "All runs").rows]
    assert pages == ["", "", "in side#1%20/report.html", "within/report.html"]
    report.write(suite_page(folder), folder)
    addresses = Parts(folder / report.PAGE).addresses
    assert {unquote(one) for one in addresses} >= {*pages[2:]} and not {*addresses} >= {*pages[2:]}


def test_an_added_domain_is_linked_and_its_better_score_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("a", "b"))
    _add(folder, "Sci Fi", "Sci%20Fi.json")
    page = report.page_of(folder)
    report.write(page, folder)
    assert "added/Sci%2520Fi.json" in Parts(folder / report.PAGE).addresses
    assert [cell.mark for cell in _table(page, "").rows[0][2:4]] == ["", "best"]


@pytest.mark.parametrize("method", ["my.lora", "..", "a/b"])
def test_adapters_lie_where_the_store_puts_them(method: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("a", "b"))
    os.rename(folder / "adapters" / "mlora", folder / "adapters" / quoted(method))
    (folder / "run.toml").write_text(RUN.replace("mlora", method))
    assert Record.read(folder).adapters.keys() == {"a", "b"}


def test_lines_of_a_note_are_joined(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    _change(folder, note="\nOne\nparagraph.\n\nAnother\none.\n")
    assert suite_page(folder).note == "One paragraph.\n\nAnother one."


def test_what_is_not_finite_is_null_in_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("a", "b"))
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"time": 200.0, "phase": "pretrain", "rows_per_second": float("nan")}
        file.write(json.dumps(line | {"waiting": float("inf")}) + "\n")
    report.write(report.page_of(folder), folder)
    found = Parts(folder / report.PAGE)
    assert "NaN" not in found.json and "Infinity" not in found.json
    assert any(None in trace["y"] for figure in found.figures for trace in figure["traces"])


@pytest.mark.parametrize("one_phase", [False, True])
def test_a_run_in_one_phase_does_not_claim_that_adapters_won(one_phase: bool) -> None:
    domain = {"domain": "d0", "rows": 10, "auc": 0.6, "log_loss": 0.5}
    scores = {"domains": [domain], "wauc": 0.6, "undefined": []}
    summary = {
        "shared": scores,
        "adapted": scores,
        "kept": ["d0"],
        "skipped": {},
        "one_phase": one_phase,
        "corrupt_rows": {},
        "sizes": {"tables": 8, "dense": 4, "frozen": 0, "adapter": 2},
    }
    told = final_table(summary)
    assert ("beat the shared part" in told) != one_phase
    assert ("1 of 1 domains have adapters, which learned with the shared part" in told) == one_phase
