"""`compare`: whatever stops it, however many share it, in any order, the cells are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards import UserError
from launch.__main__ import main
from launch.comparison import Asked, Comparison
from launch.suite import Plan
from tests.gang import gang
from tests.toy_suite import (
    DOMAINS,
    GRID,
    MODELS,
    RATES,
    SETTINGS,
    WAYS,
    Told,
    learned,
    tell,
    write_suite,
)
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder

SUITES = sorted((Path(__file__).parents[1] / "launch" / "suites").glob("*.toml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suites")


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    return gang(1, tell, folder, timeout=300)[0]


@pytest.mark.dist
def test_every_cell_is_filled_and_equal_ones_are_run_once(told: Told, folder: Path) -> None:
    home, results, runs = folder / "whole" / "toy", told.whole, learned(told.whole)
    assert len(runs) == len(results["cells"]) == 2 * 3 * 2 and not results["failed"]
    assert len([*(home / "trained").iterdir()]) == 2 * 2 * 2
    assert len([*(home / "shards").iterdir()]) == 1
    for model in ("mlp", "deepfm"):
        for seed in (1, 2):
            shared, adapted, one_phase = (runs[model, one["label"], seed] for one in SETTINGS)
            assert shared[0] == adapted[0] != one_phase[0]
            assert shared[3] < adapted[3], "phase 2 has steps of its own"
            assert shared[2]["adapter"] == 0 < one_phase[2]["adapter"]
    lines = (home / "results.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 12 and lines[0].startswith("model,setting,seed,run,seconds,steps")
    assert {*results["cells"][0]["latency_ms"]} == {"1", "32", "1024"}
    run, scores, *_ = runs["mlp", "adapters", 1]
    summary = json.loads((home / run / "summary.json").read_text(encoding="utf-8"))
    assert summary["adapted"] == scores and summary["shared"] == runs["mlp", "shared", 1][1]


@pytest.mark.dist
def test_what_is_finished_is_not_run_again(told: Told) -> None:
    results, steps = told.again
    assert results["cells"] == told.whole["cells"] and steps == 0


@pytest.mark.dist
def test_what_was_found_is_all_that_another_machine_needs(told: Told) -> None:
    results, steps = told.elsewhere
    assert results["cells"] == told.whole["cells"] and steps == 0


@pytest.mark.dist
def test_resumed_equals_whole(told: Told) -> None:
    assert told.stopped == [0, 1]
    assert learned(told.resumed) == _of(told.whole, lambda model, seed: (model, seed) == ("mlp", 2))


@pytest.mark.dist
def test_what_another_process_is_at_is_left_to_it(told: Told) -> None:
    assert told.beside["cells"] == [] == told.beside["table"] and not told.beside["failed"]


@pytest.mark.dist
def test_two_jobs_and_another_order_equal_one(
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    order = {"settings": SETTINGS[::-1], "seeds": [2, 1]}
    path = write_suite(tmp_path, models=MODELS[:1], **order)
    assert main(["compare", str(path), "--jobs", "2", "--seeds", "1"]) == 0
    assert "one seed tells nothing of chance" in capsys.readouterr().out
    logs = [(tmp_path / "toy" / "jobs" / f"{job}.log").read_text() for job in (0, 1)]
    assert any("mlp, one phase" in log for log in logs)
    found = json.loads((tmp_path / "toy" / "results.json").read_text(encoding="utf-8"))
    assert learned(found) == _of(told.whole, lambda model, seed: (model, seed) == ("mlp", 1))


def _of(results: dict[str, Any], wanted: Callable[[str, int], bool]) -> dict[Any, Any]:
    return {key: value for key, value in learned(results).items() if wanted(key[0], key[2])}


@pytest.mark.dist
def test_the_grid_is_picked_on_validation_and_never_reads_test(told: Told, folder: Path) -> None:
    runs = {name: folder / "grid" / "toy" / "trained" / name for name in told.read}
    rate = {name: RunFolder.config(run).pretrain.lr for name, run in runs.items()}
    final = {Path(cell["run"]).name for cell in told.grid["cells"]}
    trials = {name for name, splits in told.read.items() if "test" not in splits}
    assert len(final) == len(trials) == 2 and final | trials == {*runs}
    values = {rate[name]: _validation(runs[name]) for name in trials}
    assert sorted(values) == RATES
    best = max(values, key=values.__getitem__)
    assert told.grid["grid"] == {"mlp/shared": {"pretrain.lr": best}}
    assert {rate[name] for name in final} == {best}


def _validation(run: Path) -> float:
    assert RunFolder.config(run).test == ("valid",)
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["shared"]["wauc"]


@pytest.mark.dist
def test_a_domain_comes_in_five_ways(told: Told, folder: Path) -> None:
    cells = {(cell["model"], cell["setting"]): cell for cell in told.domains["cells"]}
    assert len(cells) == 5
    runs = [*(folder / "domains" / "toy" / "trained").glob("*/run.toml")]
    assert len(runs) == 3, "a trunk, a run alone, and one with all"
    for cell in cells.values():
        [domain] = cell["scores"]["domains"]
        assert domain["domain"] == cell["model"] and cell["scores"]["auc"] == domain["auc"]
    assert len({cell["scores"]["domains"][0]["rows"] for cell in cells.values()}) == 1
    trunk, adapter, own, alone, retrained = (cells["d1", way["label"]] for way in WAYS)
    assert trunk["steps"] == 0 < adapter["steps"] and alone["steps"] < retrained["steps"]
    assert trunk["sizes"]["adapter"] == 0 < own["sizes"]["adapter"] > adapter["sizes"]["adapter"]
    assert len({str(cell["scores"]) for cell in (trunk, own, alone, retrained)}) == 4


def test_models_that_ask_for_the_same_run_share_it(tmp_path: Path) -> None:
    models = [{"label": name, "domain": name} for name in ("d1", "d2")]
    plan = Plan.load(write_suite(tmp_path, **{**DOMAINS, "models": models}))
    works = [
        cell.work for cell in plan.cells({(m, w["label"]): {} for m in ("d1", "d2") for w in WAYS})
    ]
    assert len({work.fingerprint for work in works}) == 4 + 4 + 1
    assert len({work.trunk.fingerprint for work in works if work.act != "train"}) == 2


@pytest.mark.dist
def test_a_run_that_fails_stops_no_other(told: Told) -> None:
    [(name, why)] = told.failed["failed"].items()
    assert name == "wrong, shared, seed 1" and "unknown metric in pretrain.metric" in why
    assert {*learned(told.failed)} == {("mlp", "shared", 1)}
    comparison = Comparison.__new__(Comparison)
    comparison.failed = told.failed["failed"]
    with pytest.raises(UserError, match="1 of the runs failed; wrong, shared, seed 1: unknown"):
        comparison.require_all()


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_resolves_all_its_cells(path: Path) -> None:
    plan = Plan.load(path)
    suite = plan.suite
    assert suite.name == path.stem, "its folder bears its name"
    cells = [*plan.cells({(m.label, s.label): suite.points[0] for m, s in suite.pairs})]
    places = {(cell.model.label, cell.setting.label) for cell in cells}
    assert len(cells) == len(suite.seeds) * len(places)
    assert {model for model, _ in places} == {*suite.model_labels}
    assert {setting for _, setting in places} == {*suite.setting_labels}
    for model, figures in (suite.published.figures if suite.published else {}).items():
        assert {(model, setting) for setting in figures} <= places
    assert len(suite.points) <= 8 and suite.note


def test_a_grid_is_tried_at_the_first_seed_whatever_seeds_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, done = Plan.load(write_suite(tmp_path, **GRID)), []
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    monkeypatch.setattr(Comparison, "_do", lambda self, cells, wait=False: done.append(cells))
    Comparison(plan, Asked.of(plan.suite, [2], "mlp")).run()
    assert [cell.seed for cell in done[0]] == [1] * len(RATES) and done[2] == []


@pytest.mark.dist
def test_a_cell_without_the_metric_keeps_no_other_from_the_table(
    told: Told, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = folder / "whole" / "suite.toml"
    text = suite.read_text(encoding="utf-8")
    suite.write_text(text.replace("[[models]]\n", '[[models]]\ndomain = "d9"\n', 1))
    plan = Plan.load(suite)
    suite.write_text(text)
    comparison = Comparison(plan, Asked.of(plan.suite, None, ""))
    assert "mlp, shared" not in (told_now := comparison.printed()) and "deepfm, shared" in told_now
    assert comparison.failed["mlp, shared, seed 1"].startswith("unknown domain 'd9'")
    assert "another version of the code" not in told_now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.comparison.code", lambda: "newer")
        assert "6 of 6 cells were filled by another version of the code" in comparison.printed()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "a/../b"}, "name: 'a/../b' names a folder; letters, digits, _ and - will do"),
    (
        {"models": [{"label": "mlp", "settings": ["shard"]}]},
        "unknown setting of 'mlp': 'shard'; the nearest is 'shared'",
    ),
    (
        {"models": [{"label": "mlp", "without": ["name.movie"]}]},
        "without: .*run.toml has no name.movie that could be left out",
    ),
    ({"nam": "x"}, "suite.toml: unknown key nam; did you mean name"),
    ({"models": [{"label": "a", "sett": []}]}, "unknown key models.sett; did you mean models.set"),
    ({"run": "rum.toml"}, "model 'mlp', setting 'shared': .*rum.toml: no such run file"),
    ({"base": "sharde"}, "unknown setting in base 'sharde'; the nearest is 'shared'"),
    ({"base": None}, "base: .*required"),
    ({"models": [MODELS[0]] * 2}, "models: two of them are called 'mlp'; each needs a label"),
    ({"settings": [SETTINGS[0]] * 2}, "settings: two of them are called 'shared'"),
    ({"models": []}, "models: none; each needs a label"),
    ({"metric": "wuac"}, "unknown metric 'wuac'; the nearest is 'wauc'"),
    ({"seeds": []}, r"seeds: \[\]; give at least one"),
    ({"seeds": [1, 1]}, r"seeds: \[1, 1\]; give at least one, and each once"),
    ({"settings": [{**SETTINGS[0], "kind": "trian"}]}, "kind of setting 'shared': 'trian'"),
    (
        {"settings": [{**SETTINGS[0], "kind": "add_domain", "domain": "d1"}]},
        "setting 'shared': kind add_domain has no scores = 'shared', but 'adapted'",
    ),
    (
        {"settings": [{**SETTINGS[0], "kind": "zero_shot"}]},
        "kind zero_shot is about one domain; give `domain` to it, or to every model",
    ),
    (
        {
            "models": [{"label": "mlp", "domain": "d1"}],
            "settings": [{**SETTINGS[0], "domain": "d2"}],
        },
        "domain: model 'mlp' and setting 'shared' both name one; leave it to one side",
    ),
    ({"models": [{"label": "mlp", "at": 1.0}]}, "axis: 'mlp' has a place `at` on none; name it"),
    ({"axis": "size"}, "axis 'size': give `at` to all models, or to all settings"),
    (
        {"axis": "size", "models": [{**MODELS[0], "at": 1.0}, MODELS[1]]},
        "suite.toml: axis 'size': 'deepfm' has no `at`, as other models do",
    ),
    (
        {"published": {"source": "x", "figures": {"mpl": {"shared": 0.5}}}},
        "unknown model in published.figures 'mpl'; the nearest is 'mlp'",
    ),
    (
        {"published": {"source": "x", "figures": {"mlp": {"shard": 0.5}}}},
        "unknown setting in published.figures.mlp 'shard'; the nearest is 'shared'",
    ),
    ({"grid": {"pretrain.lr": []}}, "grid: pretrain.lr has no values; give a few"),
    ({"grid": {"pretrain.patiens": [1]}}, "unknown key pretrain.patiens; did you mean"),
    ({"grid": {"pretrain.one_phase": [True]}}, "grid: 'one phase' sets pretrain.one_phase too"),
    ({"set": ["sed=1"]}, "setting 'shared': .*run.toml: unknown key sed; did you mean seed"),
    (
        {"models": [{"label": "mlp", "without": ["text"]}]},
        "model 'mlp', setting 'shared': without: .*run.toml has no text that could be left out",
    ),
    ({"set": ['phases=["pretrain"]']}, "'adapters': scores = \"adapted\", but phases has no adapt"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_before_anything_trains(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Plan.load(write_suite(tmp_path, **changes))
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "3"], "--seeds 3: the suite has 1, 2"),
        (["--only", "pmn"], "--only 'pmn': in no cell's name; there are: mlp, shared; mlp, adapt"),
        (["--jobs", "0"], "--jobs 0: 1 or more, and not under torchrun"),
        (["--set", "sed=1"], "unknown key sed; did you mean seed"),
    ],
)
def test_a_mistaken_argument_is_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_suite(tmp_path)
    assert main(["compare", str(path), *arguments]) == 2
    assert pytest.raises(UserError, match=message).matches(UserError(capsys.readouterr().err))


def test_a_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="s.toml: no such suite; there are some in launch/suites"):
        Plan.load(tmp_path / "s.toml")
