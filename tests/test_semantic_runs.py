"""CTRL and P5 through the real trainer: ranks (S6), a cut run (S7), a domain that comes (S4); of
CTRL its two stages, and no text once the first one is over."""

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_shards import Index, UserError
from tests import toy_unictr_run
from tests.gang import gang
from tests.toy_method import copies
from tests.toy_run import Step, here, recording
from tests.toy_ufin_run import ADAPT, RUN, CutError, write_toy
from trainer import adding, schedule
from trainer import config as run_files
from trainer.align import align
from trainer.config import RunConfig
from trainer.evaluate import zero_shot
from trainer.log import RunLog
from trainer.ranks import together
from trainer.run_folder import RunFolder
from trainer.text_build import build
from trainer.trunk import new_trunk

pytestmark = pytest.mark.dist

CTRL = {
    "method": {"name": "ctrl", "alpha": 4, "width": 8, "spaces": 2, "group": 16},
    "backbone": {"name": "autoint", "hidden": [16, 8], "dropout": 0.0, "depth": 1, "width": 4},
    "align": {"lr": 0.01, "checkpoint_every": 3},
    "pretrain": {"lr": 0.01, "max_epochs": 1, "checkpoint_every": 3},
    "adapt": {**ADAPT, "max_epochs": 1, "min_rows": 20},
}
"""Groups of half a batch, so of a rank's rows where there are two; five steps of either stage."""
CUTS = 4, 9
"""Steps, counted through both stages."""
P5 = {"method": {"name": "p5"}, "phases": ["pretrain"], "pretrain": {"lr": 0.003, "max_epochs": 1}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    toy_unictr_run.write_toy(folder / "prompts", toy_unictr_run.SIZES, toy_unictr_run.ADDED)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def _ctrl(toy: Path, output: Path, name: str, **changes: Any) -> RunConfig:
    """UFIN's toy run as CTRL's."""
    values = tomllib.loads((toy / "run.toml").read_text(encoding="utf-8"))
    del values["teacher"]
    changes = {"output": str(output), "name": name, **CTRL, **changes}
    return run_files.from_dict(values | changes, "toy")


def _p5(toy: Path, output: Path, name: str, **changes: Any) -> RunConfig:
    """Uni-CTR's toy run as P5's."""
    values = tomllib.loads((toy / "prompts/run.toml").read_text(encoding="utf-8"))
    changes = {"output": str(output), "name": name, **P5, **changes}
    return run_files.from_dict(values | changes, "toy")


@dataclass(frozen=True)
class Begun:
    """What phase 1 begins with, from the checkpoints of a finished stage."""

    steps: int
    still: set[str]
    tables_moved: bool
    tables_count: int
    moments: float


@dataclass(frozen=True)
class Story:
    """What one rank saw."""

    steps: dict[str, list[Step]]
    skipped: set[str]
    begun: Begun
    added: dict[str, Any]
    never_seen: float | None


def live(toy: Path, output: Path, name: str, zero_stage: int) -> Story:
    """A run of either; CTRL's text vectors are gone when a domain is added to it. Alone, a rank
    also cuts such runs."""
    ranks, text, engine = here(), output / f"text-{name}", {"zero_stage": zero_stage}
    section = {**RUN["text"], "folder": str(text)}
    ctrl = _ctrl(toy, output, f"ctrl-{name}", text=section, engine=engine)
    build(ctrl, toy / "shards", ranks, lambda text: None)
    with recording() as steps_of_ctrl:
        summary = schedule.train(ctrl, ranks)
    begun = _begun(ctrl, toy / "shards")
    for at in CUTS if ranks.world == 1 else ():
        _cut(_ctrl(toy, output, f"cut{at}", text=section, engine=engine), at)
    together(ranks, text, lambda: shutil.rmtree(text) if ranks.first else None)
    added = adding.add_domain(ctrl, RunFolder(ctrl.folder), "games", toy / "added", ranks)
    p5 = _p5(toy, output, f"p5-{name}", engine=engine)
    with recording() as steps_of_p5:
        schedule.train(p5, ranks)
    games = str(toy / "prompts/added")
    shot = zero_shot(p5, RunFolder(p5.folder), games, p5.test, "games", ranks)
    steps = {"ctrl": steps_of_ctrl, "p5": steps_of_p5}
    return Story(steps, {*summary["skipped"]}, begun, added, shot.auc)


def _begun(config: RunConfig, shards: Path) -> Begun:
    trunk = new_trunk(config, here(), Index.load(shards))
    before, tables = copies(trunk.dense), trunk.tables.digest()
    log = RunLog(False, config.folder, config.tracking, "x")
    with recording() as steps:
        align(trunk, shards, RunFolder(config.folder).checkpoints / "align", log)
    assert trunk.dense.keys() == before.keys()
    return Begun(
        len(steps),
        {name for name, tensor in trunk.dense.items() if torch.equal(tensor, before[name])},
        trunk.tables.digest() != tables,
        trunk.tables.steps(),
        max(
            float(tensor.abs().max())
            for shard in trunk.tables.shards()
            for name, tensor in shard.tensors.items()
            if name != "weight"
        ),
    )


def _cut(config: RunConfig, at: int) -> None:
    """The run ends in this step, and is begun again."""
    seen: list[int] = []

    def cut(_: int) -> None:
        seen.append(at)
        if len(seen) == at:
            raise CutError

    with recording(cut), pytest.raises(CutError):
        schedule.train(config, here())
    schedule.train(config, here())


@pytest.fixture(scope="module")
def one(toy: Path, output: Path) -> Story:
    [story] = gang(1, live, toy, output, "one", 1, timeout=300)
    return story


@pytest.fixture(scope="module")
def two(toy: Path, output: Path, one: Story) -> list[Story]:
    return gang(2, live, toy, output, "two", 3, timeout=300)


@pytest.mark.parametrize("method", ["ctrl", "p5"])
def test_s6_two_ranks_learn_what_one_does(
    method: str, one: Story, two: list[Story], output: Path
) -> None:
    """Under ZeRO 3; of CTRL through both stages, whose first one couples rows, and phase 2."""
    for alone, *shares in zip(one.steps[method], *(s.steps[method] for s in two), strict=True):
        assert sorted(alone.row_ids) == sorted(row for step in shares for row in step.row_ids)
        assert sum(step.loss for step in shares) == pytest.approx(alone.loss, rel=1e-4)
    found, expected = (_dense(output / f"{method}-{name}") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_phase_1_begins_with_what_the_first_stage_has_made(one: Story, two: list[Story]) -> None:
    """All but the last layers, as random as ever, and optimizers that know of no step."""
    for begun in (story.begun for story in (one, *two)):
        assert begun.steps == 0 and begun.tables_moved
        assert begun.tables_count == 0 == begun.moments
        assert begun.still == {
            f"backbone.{layer}.{name}"
            for layer in ("out", "attention.out")
            for name in ("weight", "bias")
        }


def test_s4_adding_a_domain_needs_no_text_and_moves_nothing(one: Story, two: list[Story]) -> None:
    for story in (one, two[0]):
        assert story.added["moved"] == [] and story.skipped == {"toys"}


@pytest.mark.parametrize("at", CUTS)
def test_s7_cut_and_continued_is_bit_equal_to_uncut(at: int, one: Story, output: Path) -> None:
    """In the first stage, and in the second."""
    found, expected = _dense(output / f"cut{at}"), _dense(output / "ctrl-one")
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_p5_scores_a_domain_that_it_has_never_seen(one: Story, two: list[Story]) -> None:
    assert one.never_seen is not None
    assert two[0].never_seen == pytest.approx(one.never_seen, abs=1e-3)


def test_a_run_file_says_what_its_method_reads(toy: Path, output: Path) -> None:
    with pytest.raises(UserError, match="align: method ctrl begins with such a stage, and there"):
        _ctrl(toy, output, "x", align=None)
    with pytest.raises(UserError, match="align: method mlora has no such stage; leave the section"):
        _ctrl(toy, output, "x", method={"name": "mlora"}, text=None)
    with pytest.raises(UserError, match="text: method ctrl reads text vectors, and there is none"):
        _ctrl(toy, output, "x", text=None)
    with pytest.raises(UserError, match=r"align\.rows: unknown split 'tarin'"):
        _ctrl(toy, output, "x", align={"rows": ["tarin"]})
    with pytest.raises(UserError, match="phases: method p5 has no adapters; set phases to"):
        _p5(toy, output, "x", phases=["pretrain", "adapt"])


def _dense(run: Path) -> dict[str, Tensor]:
    return load_file(run / "trunk/dense.safetensors")
