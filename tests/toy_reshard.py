"""A run of phase 1 that is saved by so many ranks in one form and goes on in another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards import Cursor, Index
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, toy_config
from trainer.checkpoint import checked
from trainer.early_stopping import EarlyStopping
from trainer.fit import Position, Trainee, trainee_of
from trainer.phase_state import restored, state_of
from trainer.saving import save
from trainer.trunk import Trunk, new_trunk

SHARDINGS = ("table_wise", "column_wise", "row_wise")
SAVED, STEPS = 2, 4  # a state is taken after 2 steps, and the run goes on to 4
BATCH = 48  # which 1, 2, 3 and 4 divide


@dataclass(frozen=True)
class Form:
    """How a run is spread."""

    world: int
    stage: int
    sharding: str

    def __str__(self) -> str:
        return f"{self.world}-{self.stage}-{self.sharding}"


def name_of(source: Form, target: Form) -> str:
    return f"{source}_{target}"


@dataclass(frozen=True)
class Went:
    """What steps did: global losses, and this rank's rows."""

    losses: list[float]
    rows: list[int]


class _Run:
    """Phase 1 of the toy run in a form, its loop laid open."""

    def __init__(self, toy: Path, form: Form) -> None:
        config = toy_config(
            toy,
            Path(),
            f"reading.global_batch={BATCH}",
            "reading.lanes=12",
            "tables.dim=16",  # four columns for each of four ranks
            f"engine.zero_stage={form.stage}",
            f"tables.sharding={form.sharding}",
        )
        self.trunk: Trunk = new_trunk(config, here(), Index.load(toy / "shards"))
        self.train = self.trunk.loader(toy / "shards", config.pretrain.rows, shuffle=True)
        method = self.trunk.method()
        self.trainee: Trainee = trainee_of(
            self.trunk, method, method.shared_parameters(), config.pretrain
        )
        self.position = Position(EarlyStopping("auc", 1))

    def steps(self, until: int) -> Went:
        slots, went = self.trainee.model.slots(self.train), Went([], [])
        left = until - self.position.steps
        batches = islice(self.train.batches(self.position.cursor), left)
        for sent, following in self.trainee.ahead(batches, slots, self.train.extended):
            loss = self.trainee.step(sent, following, self.position.steps)
            dist.all_reduce(loss)
            went.losses.append(float(loss))
            went.rows.extend(sent.batch.row_id[sent.batch.weight > 0].tolist())
            self.position.steps += 1
            self.position.cursor = Cursor(0, self.position.cursor.step + 1)
        return went

    def save(self, folder: Path) -> None:
        snapshot = state_of(self.trainee.engine, self.position, {})
        save(folder, here(), [self.trunk.tables], snapshot)

    def load(self, folder: Path) -> None:
        snapshot = checked(folder, here()).load([self.trunk.tables])
        self.position = restored(snapshot, self.trainee.engine)


def first_part(toy: Path, output: Path, forms: Sequence[Form]) -> list[Went]:
    """Each form's steps up to its checkpoint, `<form>/saved`."""
    found = []
    for form in forms:
        run = _Run(toy, form)
        found.append(run.steps(SAVED))
        run.save(output / str(form) / "saved")
    return found


def second_part(toy: Path, output: Path, pairs: Sequence[tuple[Form, Form]]) -> list[Went]:
    """Each pair's checkpoint loaded by its second form, saved again at once, and the steps after
    it, whose end is saved too: `<pair>/again` and `<pair>/ended`."""
    found = []
    for source, target in pairs:
        run, folder = _Run(toy, target), output / name_of(source, target)
        run.load(output / str(source) / "saved")
        run.save(folder / "again")
        found.append(run.steps(STEPS))
        run.save(folder / "ended")
    return found


def differences(output: Path, source: Form, target: Form) -> list[str]:
    """What of a checkpoint another form did not take over bit by bit."""
    (before, values), (after, again) = (
        checkpoint_at(folder)
        for folder in (output / str(source) / "saved", output / name_of(source, target) / "again")
    )
    wrong = [] if values == again else ["values"]
    wrong += sorted(before.keys() ^ after.keys())
    return wrong + [name for name in before.keys() & after if not _same(before[name], after[name])]


def distance(output: Path, one: str, other: str) -> float:
    """The largest difference of a weight between two ends."""
    ends = [checkpoint_at(output / name / "ended")[0] for name in (one, other)]
    weights = [name for name in ends[0] if name.startswith("parameter/") or "/weight" in name]
    return max(float((ends[0][name] - ends[1][name]).abs().max()) for name in weights)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def undisturbed(toy: Path, output: Path) -> Went:
    """All steps in one go, in the plainest form; its end is that of `undisturbed`."""
    run = _Run(toy, Form(1, 0, "table_wise"))
    went = run.steps(STEPS)
    run.save(output / "undisturbed" / "ended")
    return went


def resharded(
    toy: Path, output: Path, pairs: Sequence[tuple[Form, Form]]
) -> tuple[Went, dict[str, tuple[list[float], list[int]]]]:
    """The undisturbed run; and of each pair, by name, the losses and rows of both its parts."""
    [whole] = gang(1, undisturbed, toy, output)
    parts: dict[Any, Sequence[Went]] = {}
    for world in (1, 2, 3, 4):
        forms = sorted({a for a, _ in pairs if a.world == world}, key=str)
        answers = gang(world, first_part, toy, output, forms, timeout=300)
        parts |= dict(zip(forms, zip(*answers, strict=True), strict=True))
    for world in (1, 2, 3, 4):
        mine = [pair for pair in pairs if pair[1].world == world]
        answers = gang(world, second_part, toy, output, mine, timeout=600)
        parts |= dict(zip(mine, zip(*answers, strict=True), strict=True))
    found = {}
    for source, target in pairs:
        both = [*parts[source], *parts[source, target]]
        losses = parts[source][0].losses + parts[source, target][0].losses
        found[name_of(source, target)] = losses, [row for went in both for row in went.rows]
    return whole, found
