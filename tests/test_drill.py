"""A drill in miniature: torchrun, real SIGKILLs, and a comparison that can say no."""

import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest

from data_shards import UserError
from launch import drill_round
from launch.__main__ import main
from launch.drill import KINDS, drawn, summary
from launch.drill_round import Round, compared

pytestmark = pytest.mark.dist

SHORT = ("phases=['pretrain']", "pretrain.max_epochs=1", "pretrain.checkpoint_every=4")


@pytest.fixture(scope="module")
def drilled(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a drill of one round, which has ended well."""
    out = tmp_path_factory.mktemp("drill") / "out"
    changes = [argument for change in SHORT for argument in ("--set", change)]
    command = ["drill", str(toy / "run.toml"), "--rounds", "1", "--seed", "6", "--deaths", "1"]
    assert main([*command, "--out", str(out), *changes]) == 0
    return out


def _round(folder: Path) -> Round:
    return Round(Path("unused"), [], folder, 2, [])


def test_a_round_ends_as_the_run_left_alone(drilled: Path) -> None:
    found = compared(_round(drilled / "whole"), _round(drilled / "round-0"))
    assert found.deaths == 1 and found.survived and len(found.seconds) == 1
    assert found.lost == found.repeated == 0


def test_rows_lost_or_repeated_and_other_weights_are_found(drilled: Path, tmp_path: Path) -> None:
    whole = _round(drilled / "whole")
    shutil.copytree(drilled / "round-0", tmp_path / "spoiled")
    spoiled = _round(tmp_path / "spoiled")
    ledger = max((tmp_path / "spoiled" / "ledger").glob("*.jsonl"))
    *before, last = ledger.read_text().splitlines()
    step = json.loads(last)
    ledger.write_text("\n".join([*before, json.dumps({**step, "rows": [0, *step["rows"][2:]]})]))
    found = compared(whole, spoiled)
    assert not found.survived and found.lost == 2 and found.repeated == 1
    ledger.write_text("\n".join([*before, last]))
    assert compared(whole, spoiled).survived
    summary = tmp_path / "spoiled" / "run" / "summary.json"
    summary.write_text(summary.read_text().replace('"trunk": "', '"trunk": "0'))
    assert not compared(whole, spoiled).survived
    assert not compared(whole, _round(tmp_path / "nothing")).survived


def test_a_seed_gives_the_same_deaths_again() -> None:
    counts = [{"step": 50, "save": 40, "read": 30, "evaluation": 4}, {"step": 50, "read": 30}]
    plans = [drawn(random.Random(f"7/{n}"), 3, counts, 9.0) for n in range(50)]
    assert plans == [drawn(random.Random(f"7/{n}"), 3, counts, 9.0) for n in range(50)]
    deaths = [death for plan in plans for death in plan]
    assert {death.kind for death in deaths} == set(KINDS)
    assert {(death.agent, death.told) for death in deaths} == {*product((False, True), repeat=2)}
    for death in deaths:
        assert 1 <= death.number <= {**counts[death.rank], "time": 9000}[death.kind]
    assert {death.rank for death in deaths} == {0, 1}
    assert {len(plan) for plan in plans} == {1, 2, 3}


def test_a_summary_of_rounds() -> None:
    one = {"deaths": 2, "survived": True, "lost": 0, "repeated": 0, "seconds": [3.0, 5.0]}
    two = {"deaths": 1, "survived": False, "lost": 7, "repeated": 1, "seconds": [4.0]}
    none = {"deaths": 0, "survived": True, "lost": 0, "repeated": 0, "seconds": []}
    said = summary([one, two, none])
    assert "survived        1 of 2" in said and "repeated  8" in said
    assert said.endswith("new step: 4.0 median, 5.0 worst")


def test_a_drill_without_deaths_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "launch/runs/planted_mlora.toml", "--deaths", "0"]) == 2
    assert "--rounds, --ranks and --deaths are 1 or more" in capsys.readouterr().err


def test_a_round_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill_round, "PATIENCE", 0.1)
    hangs = Round(Path("no_such_file.toml"), [], tmp_path / "round", 1, [])
    with pytest.raises(UserError, match=r"round: no end after 0.1 s; see its log there"):
        hangs.play()


def test_a_drill_needs_an_empty_folder(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").touch()
    assert main(["drill", str(toy / "run.toml"), "--out", str(tmp_path)]) == 2
    assert "holds a drill already; set another --out, or delete" in capsys.readouterr().err


def test_a_drill_in_which_nobody_dies_proves_nothing(
    toy: Path,
    drilled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Round, "play", lambda one: shutil.copytree(drilled / "whole", one.folder))
    command = ["drill", str(toy / "run.toml"), "--out", str(tmp_path / "out"), "--rounds", "1"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "out: nobody died; give more --rounds, or another --seed" in said
    assert "rounds survived        0 of 0" in said
