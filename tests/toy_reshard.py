"""A run of phase 1 that is saved by so many ranks in one form and goes on in another."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards import Cursor, Index
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, toy_config
from trainer.checkpoint import SEPARATOR, checked, rectangles
from trainer.early_stopping import EarlyStopping
from trainer.fit import Position, Trainee, trainee_of
from trainer.phase_state import OPTIMIZER, PARAMETER, restored, state_of
from trainer.saving import save
from trainer.trunk import Trunk, new_trunk

WORLDS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
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


Pair = tuple[Form, Form]  # that of the save, and that of the load


@dataclass(frozen=True)
class Went:
    """What steps did: global losses, and this rank's rows."""

    losses: list[float]
    rows: list[int]


@dataclass(frozen=True)
class Taken:
    """How a form took over what another one had saved, as one rank saw it."""

    differences: list[str]
    """What is not that of the file bit by bit."""
    went: Went
    distance: float
    """Of the weights at the end to those of the undisturbed run; the largest."""


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

    def differences(self, folder: Path) -> list[str]:
        """What of a checkpoint is not bit by bit what lives here. Collective."""
        saved, values = checkpoint_at(folder)
        live = state_of(self.trainee.engine, self.position, {})
        wanted = {**live.values, "table_steps": [self.trunk.tables.steps()]}
        wrong = [name for name, value in wanted.items() if values[name] != value]
        wrong += sorted(live.tensors.keys() ^ {name for name in saved if not _of_tables(name)})
        wrong += [name for name, tensor in live.tensors.items() if not _same(tensor, saved[name])]
        return wrong + [name for name, live, part in self._parts(saved) if not _same(live, part)]

    def distance(self, folder: Path) -> float:
        """The largest difference of a weight here to that in a checkpoint. Collective."""
        saved, _ = checkpoint_at(folder)
        parameters = self.trainee.engine.parameters()
        apart = [tensor - saved[f"parameter/{name}"] for name, tensor in parameters.items()]
        weights = [pair for name, *pair in self._parts(saved) if name.endswith("/weight")]
        apart += [live - part for live, part in weights]
        return max(float(one.abs().max()) for one in apart)

    def _parts(self, saved: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each rectangle that this rank holds: its name, and it here and in a checkpoint."""
        for key, row, col, tensor in rectangles([self.trunk.tables]):
            _, table, name = key.split(SEPARATOR)
            rows, width = tensor.shape
            part = saved[f"{table}/{name}"][row : row + rows, col : col + width]
            yield f"{table}/{name}", tensor.detach(), part


def first_part(toy: Path, output: Path, forms: Sequence[Form]) -> list[Taken]:
    """Each form's steps up to its checkpoint, `<form>/saved`, and what that did not hold."""
    found = []
    for form in forms:
        run, folder = _Run(toy, form), output / str(form) / "saved"
        went = run.steps(SAVED)
        run.save(folder)
        found.append(Taken(run.differences(folder), went, 0.0))
    return found


def second_part(
    toy: Path, output: Path, pairs: Sequence[tuple[Form, Form]], aloud: bool
) -> list[Taken]:
    """Each pair's checkpoint loaded by its second form, and the steps after it.

    One run of a form loads them all in turn: each finds the state that the one before has left.
    """
    found, runs = [], {}
    for source, target in pairs:
        folder = output / str(source) / "saved"
        if target not in runs:
            runs = {target: _Run(toy, target)}
        run = runs[target]
        run.load(folder)
        wrong = run.differences(folder)
        went = run.steps(STEPS)
        found.append(Taken(wrong, went, run.distance(output / "undisturbed")))
        if aloud and here().first:
            print(f"{len(found)}/{len(pairs)} {source} -> {target}", file=sys.stderr, flush=True)
    return found


def undisturbed(toy: Path, output: Path) -> Went:
    """All steps in one go, in the plainest form; its end is `undisturbed`."""
    run = _Run(toy, Form(1, 0, "table_wise"))
    went = run.steps(STEPS)
    run.save(output / "undisturbed")
    return went


def _of_tables(name: str) -> bool:
    return not name.startswith((OPTIMIZER, PARAMETER))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@dataclass(frozen=True)
class Joined:
    """A pair's two parts, of all ranks together."""

    differences: list[str]
    losses: list[float]
    rows: list[int]
    distance: float


def saved(toy: Path, output: Path, forms: Iterable[Form]) -> dict[Form, Sequence[Taken]]:
    """What all ranks of each form saw up to its save, which `taken_over` loads."""
    found: dict[Form, Sequence[Taken]] = {}
    for world, group in groupby(sorted(forms, key=str), key=lambda form: form.world):
        mine = list(group)
        answers = gang(world, first_part, toy, output, mine, timeout=600)
        found |= dict(zip(mine, zip(*answers, strict=True), strict=True))
    return found


def taken_over(
    toy: Path,
    output: Path,
    first: Mapping[Form, Sequence[Taken]],
    pairs: Iterable[Pair],
    aloud: bool = False,
) -> dict[Pair, Joined]:
    """Both parts of each pair, after `saved`. `aloud`: a line to stderr for each."""
    found: dict[Pair, Joined] = {}
    ordered = sorted(pairs, key=lambda pair: str(pair[1]))
    for world, group in groupby(ordered, key=lambda pair: pair[1].world):
        mine = list(group)
        answers = gang(world, second_part, toy, output, mine, aloud, timeout=600 + 10 * len(mine))
        second = zip(*answers, strict=True)
        found |= {p: _joined(first[p[0]], after) for p, after in zip(mine, second, strict=True)}
    return found


def _joined(before: Sequence[Taken], after: Sequence[Taken]) -> Joined:
    every = [*before, *after]
    return Joined(
        [name for one in every for name in one.differences],
        before[0].went.losses + after[0].went.losses,
        [row for one in every for row in one.went.rows],
        max(one.distance for one in after),
    )
