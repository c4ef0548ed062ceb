"""A disk that does not answer, and what was finished and is damaged, end a run with the way out: no
domain goes without its adapter, and nothing is taken for lost."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards.errors import LostError
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, recording, refused, toy_config
from trainer import adapt, schedule
from trainer.config import RunConfig
from trainer.early_stopping import EarlyStopping
from trainer.saving import step_name

pytestmark = pytest.mark.dist

EVALUATED, NEWEST, CUT, LAST = 13, 15, 17, 26
PLAIN = ("engine.zero_stage=0", "pretrain.checkpoint_every=5", "keep_checkpoints=99")


class _CutError(Exception):
    """Stands for whatever ends a process."""


@dataclass
class _Found:
    """What became of a run, and what it said."""

    said: str
    trunk: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = -1


def _unread(toy: Path, output: Path) -> list[str]:
    """What a run says whose disk does not answer for one rank, while a domain's rows are opened,
    while the best checkpoint is looked at, and at the end of a phase."""
    config, said = toy_config(toy, output, "name=unread", "pretrain.max_epochs=1"), []

    def silent(*unused: Any) -> Any:
        raise LostError("the disk does not answer")

    with pytest.MonkeyPatch.context() as patch:
        if here().rank == here().world - 1:
            patch.setattr(adapt, "_opened", silent)
        with pytest.raises(LostError) as lost:
            schedule.train(config, here())
        said.append(str(lost.value))
    trunk = output / "unread" / "trunk"
    dense = (trunk / "dense.safetensors").read_bytes()
    here().gather(None)
    (trunk / "dense.safetensors").write_bytes(b"")
    said.append(refused(lambda: schedule.train(config, here())))
    here().gather(None)
    (trunk / "dense.safetensors").write_bytes(dense)
    more = toy_config(toy, output, "name=unread", "pretrain.max_epochs=2")
    said.append(refused(lambda: schedule.train(more, here())))
    return said


def test_a_disk_that_does_not_answer_makes_no_domain_go_without(toy: Path, tmp_path: Path) -> None:
    for silent, trunk, more in gang(2, _unread, toy, tmp_path):
        assert silent == "the disk does not answer"
        assert re.search(
            "restore the folder .*, or delete .*trunk and start its `train` aga", trunk
        )
        assert "they differ in pretrain.max_epochs" in more


def _best_lost(toy: Path, output: Path) -> dict[str, _Found]:
    """A run whose best checkpoint is damaged when it is started again, with ones from before it
    and without; its first evaluation is never beaten."""

    def cut(at: int) -> None:
        if at == CUT:
            raise _CutError

    found = {}
    with _never_better():
        config = toy_config(toy, output, "name=best", *PLAIN, "phases=['pretrain']")
        with recording(cut), pytest.raises(_CutError):
            schedule.train(config, here())
        tensors = checkpoint_at(config.folder / "checkpoints" / step_name(EVALUATED))[0]
        found["undamaged"] = _Found("", tensors)
        checkpoints = config.folder / "checkpoints"
        (checkpoints / step_name(EVALUATED) / "state.json").write_text("{}")
        shutil.copytree(config.folder, output / "kept")
        found["one before"] = _continued(config)
        shutil.rmtree(config.folder)
        shutil.move(output / "kept", config.folder)
        for step in (5, 10):
            shutil.rmtree(checkpoints / step_name(step))
        found["none before"] = _continued(config)
    return found


def _continued(config: RunConfig) -> _Found:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.log.RunLog.say", lambda self, text: said.append(text))
        schedule.train(config, here())
    stopping = checkpoint_at(config.folder / "checkpoints" / step_name(LAST))[1]["stopping"]
    trunk = checkpoint_at(config.folder / "trunk")[0]
    return _Found("\n".join(said), trunk, stopping["best_step"])


@contextmanager
def _never_better() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "_beats", lambda self, value, best: False)
        yield


@pytest.fixture(scope="module")
def best_lost(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, _Found]:
    return gang(1, _best_lost, toy, tmp_path_factory.mktemp("lost"))[0]


def test_a_damaged_best_checkpoint_is_come_to_again_from_one_before_it(
    best_lost: dict[str, _Found],
) -> None:
    undamaged, again = best_lost["undamaged"], best_lost["one before"]
    assert f"{step_name(EVALUATED)}/state.json: missing or changed (SHA-256)" in again.said
    assert f"it is the best up to {step_name(NEWEST)}: falling back to one before" in again.said
    assert f"pretrain: continues from {step_name(10)}" in again.said
    assert again.best_step == EVALUATED
    kept = [name for name in undamaged.trunk if name.endswith("/weight")]
    assert kept
    assert all(torch.equal(again.trunk[name], undamaged.trunk[name]) for name in kept)


def test_a_best_checkpoint_that_is_lost_for_good_is_said_early(
    best_lost: dict[str, _Found],
) -> None:
    found = best_lost["none before"]
    said = found.said.splitlines()
    wanted = f"{step_name(NEWEST)} stands for the best from now on"
    assert [line for line in said[:3] if wanted in line]
    assert f"pretrain: continues from {step_name(NEWEST)}" in said
    assert found.best_step == LAST, "whatever comes is better than what is lost"
