"""A search reads no test row, forgets no trial, and refuses what it cannot try before it starts."""

import csv
import json
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.__main__ import main
from launch.search import Search, on_validation, score_of
from launch.tune import FOLDER, Tuning, _study
from tests.toy_run import refused, toy_config
from trainer import config as run_files

RATES = "pretrain.lr=[0.01, 1e30]"
FAILING = "pretrain.lr=[0.01, 1e30, 1e31, 1e32]"
MISTAKES = {
    "pretrain.lr=0.1": "--search pretrain.lr=0.1: give a list of values, or a range",
    "pretrain.lr=[0.1]": "of two values or more",
    "pretrain.lr={low=0.1}": "give a list of values, or a range",
    "pretrain.lr={low=0.1, high=1.0, logg=true}": "give a list of values, or a range",
    "pretrain.lr={low=1.0, high=0.1}": "--search pretrain.lr={low=1.0, high=0.1}: ",
    "pretrain.lr={low=0.0, high=0.1, log=true}": "--search pretrain.lr={low=0.0",
    "pretrain.lrr=[0.1, 0.2]": "unknown key pretrain.lrr; did you mean pretrain.lr?",
    "backbone.dropout=[0.1, 'much']": "backbone.dropout: input should be a valid number",
}


@pytest.mark.parametrize("asked", MISTAKES)
def test_what_cannot_be_tried_is_refused_before_a_trial(asked: str, toy: Path) -> None:
    assert MISTAKES[asked] in refused(lambda: Search.parse(toy / "run.toml", [], [asked]))


@pytest.mark.parametrize(
    ("given", "told"),
    {
        "--trials 0": "--trials and --jobs are 1 or more",
        "--metric acu": "unknown metric 'acu'; the nearest is 'auc'",
        "--set data.shards=nowhere": "nowhere/index.json: no such file",
    }.items(),
)
def test_a_mistake_is_one_line(
    given: str, told: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["--search", RATES]
    assert main(["tune", str(toy / "run.toml"), *search, *given.split()]) == 2
    found = capsys.readouterr().err
    assert told in found and found.count("\n") == 1


@given(
    low=st.floats(1e-6, 1e-3), high=st.floats(1e-2, 1.0), own=st.floats(1e-7, 10), log=st.booleans()
)
def test_the_run_files_own_values_are_tried_where_they_are_searched(
    toy: Path, low: float, high: float, own: float, log: bool
) -> None:
    overrides = [f"pretrain.lr={own}"]
    asked = f"pretrain.lr={{low={low}, high={high}, log={json.dumps(log)}}}"
    search = Search.parse(toy / "run.toml", overrides, [asked, "backbone.hidden=[[16, 8], [8]]"])
    found = search.own_values(run_files.load(toy / "run.toml", overrides))
    inside = {"pretrain.lr": own, "backbone.hidden": "[16, 8]"}
    assert found == (inside if low <= own <= high else None)


def test_each_value_that_is_drawn_makes_a_run_file(toy: Path) -> None:
    asked = ["pretrain.lr={low=1e-9, high=1.0, log=true}", "tables.dim={low=1, high=9}"]
    search = Search.parse(toy / "run.toml", [], [*asked, 'pretrain.metric=["auc", "wauc"]'])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        drawn = study.ask(search.space).params
        config = search.resolved(drawn)
        assert config.pretrain.lr == drawn["pretrain.lr"]
        assert config.tables.dim == drawn["tables.dim"]
        assert json.dumps(config.pretrain.metric) == drawn["pretrain.metric"]


def test_a_search_that_was_cut_off_goes_on_in_the_same_folders(toy: Path, tmp_path: Path) -> None:
    config = toy_config(toy, tmp_path)
    search = Search.parse(toy / "run.toml", [], [RATES])
    study = _study(tmp_path / "tune", search, config, "auc")
    first = study.ask(search.space)
    first.set_user_attr(FOLDER, "trial-000")
    study.tell(first, 0.7)
    lost = study.ask(search.space)
    lost.set_user_attr(FOLDER, "trial-001")
    for _ in range(2):  # cut off again before the next trial begins
        again = _study(tmp_path / "tune", search, config, "auc")
        following = again.ask(search.space)
        assert following.user_attrs[FOLDER] == "trial-001"
        assert following.params == lost.params
        assert [one.value for one in again.trials if one.value is not None] == [0.7]


def test_another_search_in_the_folder_is_refused(toy: Path, tmp_path: Path) -> None:
    config = toy_config(toy, tmp_path)

    def begin(asked: str, metric: str, *overrides: str) -> str:
        search = Search.parse(toy / "run.toml", overrides, [asked])
        changed = toy_config(toy, tmp_path, *overrides)
        return refused(lambda: _study(tmp_path / "tune", search, changed, metric))

    assert not begin(RATES, "auc") and not begin(RATES, "auc")
    assert "another --search pretrain.lr (" in begin("pretrain.lr=[0.1, 0.2]", "auc")
    assert "another metric (auc, not wauc)" in begin(RATES, "wauc")
    assert "another run file (" in begin(RATES, "auc", "seed=8")
    assert config.seed != 8


def test_the_score_is_of_the_adapted_model_where_there_is_one() -> None:
    shared = {"auc": 0.6, "domains": [{"domain": "a", "auc": 0.5}]}
    adapted = {"auc": 0.7, "domains": [{"domain": "a", "auc": None}]}
    assert score_of({"shared": shared, "adapted": None}, "auc") == 0.6
    assert score_of({"shared": shared, "adapted": adapted}, "auc") == 0.7
    assert score_of({"shared": shared, "adapted": None}, "auc/a") == 0.5
    assert score_of({"shared": shared, "adapted": adapted}, "auc/a") is None
    assert score_of({"shared": shared, "adapted": adapted}, "auc/b") is None


@pytest.mark.dist
def test_a_search_scores_validation_rows_and_counts_what_failed(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--set", f"output={tmp_path}", "--set", "adapt.max_epochs=1"]
    command = ["tune", str(toy / "run.toml"), *runs, "--search", FAILING, "--trials", "2"]
    assert main(command) == 0
    told = capsys.readouterr().err
    folder = tmp_path / "toy-tune"
    rows = list(csv.DictReader((folder / "trials.csv").open(encoding="utf-8")))
    assert rows[0]["pretrain.lr"] == "0.01" and rows[0]["trial"] == "0", "the run file's own"
    assert f"{len(rows)} trials; {2 - len(rows)} failed, the last: " in told
    assert "not finite" in told
    config = toy_config(toy, tmp_path)
    summary = json.loads((folder / "trial-000" / "summary.json").read_text(encoding="utf-8"))
    assert on_validation(config) == 'test=["valid"]'
    scored = run_files.load(folder / "trial-000" / "run.toml").test
    assert scored == ("valid",) and summary["adapted"] is not None
    assert float(rows[0]["validation mean_auc"]) == summary["adapted"]["mean_auc"], "not rounded"
    best = run_files.load(folder / "best.toml")
    assert (best.name, best.output, best.test) == ("toy", str(tmp_path), ("test",))
    assert best.pretrain.lr == 0.01
    assert not (folder / "trial-000" / "trunk").exists()


def test_trials_that_all_fail_say_why(toy: Path, tmp_path: Path) -> None:
    from argparse import Namespace

    config = toy_config(toy, tmp_path)
    search = Search.parse(toy / "run.toml", [], [RATES])
    tuning = Tuning(Namespace(trials=1), config, search, "auc")
    trial = tuning.study.ask(search.space)
    trial.set_user_attr(FOLDER, "trial-000")
    (tuning.folder / "trial-000.log").write_text("a line\nerror: no room\n", encoding="utf-8")
    tuning._end(trial, 1)
    assert "no trial came to its end; the last one: error: no room" in refused(tuning.table)
