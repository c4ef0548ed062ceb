"""The table of a suite: means, deviations and paired tests over seeds, held to their formulas."""

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from launch.standing import Row, printed, results, table
from launch.suite import Model, Published, Setting, Suite
from trainer.metrics import DomainScore, Scores

SETTINGS = (Setting("shared"), Setting("adapters", scores="adapted"))
SUITE = Suite("toy", "A toy", "run.toml", "shared", (Model("mlp"), Model("dcn")), SETTINGS)
AUCS = st.floats(0.4, 0.95) | st.none()


def _cell(model: str, setting: str, seed: int, auc: float | None) -> Row:
    one = DomainScore("d0", 100, 30, auc, 0.5, 1.0)
    scores = Scores((one,), auc, auc, auc, 0.5 + seed, 1.0, int(auc is None), ())
    sizes = {"tables": 80, "dense": 15, "frozen": 0, "adapter": 5}
    rest = {"seconds": 2.0, "steps": 10 * seed, "rows_per_second": None, "latency_ms": None}
    place = {"model": model, "setting": setting, "seed": seed, "run": "trained/x"}
    return {**place, "scores": scores.to_dict(), "sizes": sizes, **rest}


def _two(base: dict[int, float | None], adapted: dict[int, float | None]) -> list[Row]:
    cells = [_cell("mlp", "shared", seed, auc) for seed, auc in base.items()]
    return cells + [_cell("mlp", "adapters", seed, auc) for seed, auc in adapted.items()]


SEEDS = st.dictionaries(st.integers(1, 9), AUCS, min_size=1)


@given(base=SEEDS, adapted=SEEDS)
def test_figures_are_those_of_the_formulas(
    base: dict[int, float | None], adapted: dict[int, float | None]
) -> None:
    rows = table(SUITE, _two(base, adapted))
    assert [(row["model"], row["setting"]) for row in rows] == [
        ("mlp", "shared"),
        ("mlp", "adapters"),
    ]
    for row, given_ in zip(rows, (base, adapted), strict=True):
        values = [auc for auc in given_.values() if auc is not None]
        assert row["seeds"] == len(given_) and row["parameters"] == 100
        assert row["mean"] == row["wauc"] == (_close(statistics.mean(values)) if values else None)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        assert row["sd"] == (None if deviation is None else _close(deviation))
        assert row["steps"] == _close(10 * statistics.mean(given_))
    assert [rows[0][key] for key in ("change", "p", "rela_impr")] == [None] * 3
    pairs = [(a, b) for s, a in adapted.items() if a is not None and (b := base.get(s)) is not None]
    _check_pairs(rows[1], pairs)
    assert "p: paired t-test" in printed(SUITE, rows) or rows[1]["p"] is None


def _check_pairs(row: Row, pairs: list[tuple[float, float]]) -> None:
    if not pairs:
        assert row["change"] is row["p"] is row["rela_impr"] is None
        return
    differences = [a - b for a, b in pairs]
    assert row["change"] == _close(statistics.mean(differences))
    mine, theirs = (statistics.mean(side) for side in zip(*pairs, strict=True))
    if theirs > 0.5:
        assert row["rela_impr"] == _close((mine - 0.5) / (theirs - 0.5) - 1)
    if len(pairs) < 2:
        assert row["p"] is None
        return
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    if error > 1e-6:
        t = statistics.mean(differences) / error
        assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), len(pairs) - 1), rel=1e-4)


def _close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_equal_seeds_have_no_p() -> None:
    same: dict[int, float | None] = {1: 0.7, 2: 0.7}
    _, row = table(SUITE, _two(same, same))
    assert row["p"] is None and row["change"] == 0 == row["sd"]


def test_the_printed_table_is_honest_about_chance() -> None:
    noise = table(SUITE, _two({1: 0.70, 2: 0.71, 3: 0.72}, {1: 0.71, 2: 0.70, 3: 0.73}))
    assert "n.s." in printed(SUITE, noise)
    gain = table(SUITE, _two({1: 0.70, 2: 0.71, 3: 0.72}, {1: 0.7501, 2: 0.7600, 3: 0.7702}))
    lines = printed(SUITE, gain).splitlines()
    assert "n.s." not in lines[3] and "+0.05010" in lines[3] and "base" in lines[2]
    alone = printed(SUITE, table(SUITE, _two({1: 0.7}, {1: None})))
    assert "one seed tells nothing of chance" in alone and "undefined" in alone


def test_published_figures_stand_beside_ours() -> None:
    paper = Published("A paper", {"mlp": {"shared": 0.8015}})
    suite = Suite("s", "S", "run.toml", "shared", (Model("mlp"),), SETTINGS, published=paper)
    cells = _two({1: 0.7}, {1: 0.7})
    head, _, first, second, *_ = printed(suite, table(suite, cells)).splitlines()
    assert head.endswith("A paper") and first.endswith("0.8015") and second.endswith(" -")
    found = results(suite, cells, {("mlp", "shared"): {}})
    assert found["published"] == {"source": "A paper", "figures": paper.figures}
    assert found["grid"] == {} and found["axis"] is None and len(found["table"]) == 2
    assert found["seeds"] == [*suite.seeds] and found["wanted"] == 2 * len(suite.seeds)
    model = Model("mlp", settings=("shared",))
    few = Suite("s", "S", "run.toml", "shared", (model,), SETTINGS)
    assert results(few, cells, {})["wanted"] == len(suite.seeds)


def test_a_loss_has_no_gain_over_chance() -> None:
    suite = Suite("s", "S", "run.toml", "shared", (Model("mlp"),), SETTINGS, metric="log_loss")
    _, row = table(suite, _two({1: 0.7, 2: 0.6}, {2: 0.7}))
    assert row["rela_impr"] is None and row["change"] == 0 and row["mean"] == 2.5
