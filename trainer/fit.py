"""The loop, for either phase: steps until an evaluation says that it has learned enough."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from data_shards import Batch, Cursor, Loader, UserError
from models import Method
from trainer import exporter, heartbeat, preemption
from trainer.bad_steps import BadStepError, Cut, bad_rows, listed
from trainer.early_stopping import EarlyStopping
from trainer.engine import Engine, finite
from trainer.evaluate import evaluate
from trainer.log import Progress, RunLog
from trainer.meter import Meter
from trainer.model import Model, Sent
from trainer.own_rows import Own, embedder_of
from trainer.phases import PhaseConfig
from trainer.preemption import PreemptedError
from trainer.ranks import Ranks
from trainer.trunk import Trunk

SKIPPED = 20  # bad steps in a row that are skipped, and no more


@dataclass
class Position:
    """Where a phase stands: the cursor, and what its evaluations have said so far."""

    stopping: EarlyStopping
    cursor: Cursor = field(default_factory=Cursor)
    steps: int = 0
    seconds: float = 0.0
    due: bool = False
    """An evaluation comes before the next step: it has not begun, or was cut off by SIGTERM."""
    bad_in_a_row: int = 0
    """Steps up to here that were skipped."""

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Position":
        stopping, cursor = EarlyStopping(**state["stopping"]), Cursor(**state["cursor"])
        later = {name: state[name] for name in ("due", "bad_in_a_row") if name in state}
        return cls(stopping, cursor, state["steps"], state["seconds"], **later)


@dataclass
class Trainee:
    """A model under an engine, and how one batch trains it."""

    model: Model
    engine: Engine
    method: Method
    ranks: Ranks
    seed: int

    def ahead(
        self, batches: Iterable[Batch], slots: torch.Tensor, extended: bool
    ) -> Iterator[tuple[Sent, Sent | None]]:
        """Each batch, and the next one: its ids travel to their tables while this one trains."""

        sent = None
        for batch in batches:
            following = self.model.send(batch.to(self.ranks.device), slots, extended)
            if sent is not None:
                yield sent, following
            sent = following
        if sent is not None:
            yield sent, None

    def step(self, sent: Sent, following: Sent | None, at: int) -> torch.Tensor:
        """One optimizer step of dense part and tables; returns this rank's share of the loss.

        Raises, on all ranks and before any weight moves: BadStepError where something is not
        finite, PreemptedError where one of them has to go.
        """
        # Dropout is a function of (seed, step, rank), so no generator's state is ever saved.
        mixed = np.random.SeedSequence((self.seed, at, self.ranks.rank))
        self.ranks.seed(int(mixed.generate_state(1, np.uint64)[0]))
        batch = sent.batch
        features, cut = Cut.of(self.model.features(sent))
        logit = self.model.dense(features)
        loss = self.method.loss(logit, batch.label, batch.weight, batch.rows)
        if following is not None:
            following.ids.announced()
        # Engine and tables both average gradients over ranks; the loss is a sum over them.
        self.engine.backward(loss * self.ranks.world)
        sound = finite([loss.detach(), *cut.gradients()]) and self.engine.finite()
        bad, leave = self.ranks.any(not sound, preemption.asked())
        if bad or leave:
            self.engine.drop()
            self.model.embedder.forget(sent.ids)
        if leave:
            raise PreemptedError
        if bad:
            raise BadStepError(bad_rows(batch, logit, cut, self.ranks))
        cut.backward(self.engine.config.table_gradient_clipping * self.ranks.world)
        self.engine.step()
        return loss.detach()

    def diagnose(self) -> str | None:
        """As `Method.diagnose`; under ZeRO 3 the weights are not at hand."""
        return self.method.diagnose() if self.engine.whole else None


def trainee_of(
    trunk: Trunk,
    method: Method,
    trained: Sequence[nn.Parameter],
    phase: PhaseConfig,
    own: Own | None = None,
) -> Trainee:
    """`method` on the trunk's tables, under an engine that trains these of its parameters; `own`
    rows of its domains train with them."""
    config, ranks = trunk.config, trunk.ranks
    rows = config.reading.global_batch // ranks.world
    engine = Engine(method, trained, config.engine, phase.lr, phase.weight_decay, rows)
    agree = ranks.agree if method.modules_per_domain else None
    embedder = embedder_of(trunk, own or Own())
    model = Model(embedder, engine, tuple(method.domains), agree, trunk.text)
    return Trainee(model, engine, method, ranks, config.seed)


def fit(
    trainee: Trainee,
    train: Loader,
    valid: Loader,
    phase: PhaseConfig,
    position: Position,
    save: Callable[[bool], None],
    log: RunLog,
    name: str,
) -> None:
    """Train from `position` until early stopping or `max_epochs`, which scores on `valid` decide;
    `position` moves along.

    `save(is_best)` is called after each evaluation and every `checkpoint_every` steps.
    """
    kept = position.steps

    def keep(best: bool) -> None:
        nonlocal kept
        # before the state is saved: what goes on from it does not meet these blocks again
        log.left_out(name, position.steps, trainee.ranks, train, valid)
        save(best)
        kept = position.steps

    try:
        _fit(trainee, train, valid, phase, position, keep, log, name)
    except PreemptedError:
        if position.steps != kept:
            keep(False)
        stands = f"saved after step {position.steps}" if position.steps else "no step was taken"
        stands += ", before its evaluation" if position.due else ""
        raise PreemptedError(f"{name}: {stands}") from None
    heartbeat.at(f"after {name}")


def _fit(
    trainee: Trainee,
    train: Loader,
    valid: Loader,
    phase: PhaseConfig,
    position: Position,
    save: Callable[[bool], None],
    log: RunLog,
    name: str,
) -> None:
    slots = trainee.model.slots(train).to(trainee.ranks.device)
    meter = Meter(trainee.ranks, trainee.diagnose, log, name, position.seconds)
    if position.due:
        _evaluate(trainee, train, valid, phase, position, save, meter)
    while position.cursor.epoch < phase.max_epochs and not position.stopping.ended:
        epoch, steps = position.cursor.epoch, train.steps(position.cursor.epoch)
        progress = Progress(f"{name} epoch {epoch + 1}", train.total_rows, "rows", log.speaks)
        trainee.engine.train(True)
        began = time.monotonic()
        batches = exporter.waiting(name, train.batches(position.cursor))
        for sent, following in trainee.ahead(batches, slots, train.extended):
            heartbeat.at(name, position.steps + 1)
            try:
                loss = trainee.step(sent, following, position.steps)
                meter.add(loss, sent.batch.rows, position.steps + 1)
                position.bad_in_a_row = 0
            except BadStepError as bad:
                position.bad_in_a_row += 1
                _bad_step(trainee, bad.named(train.domains), position, log, name)
            position.steps += 1
            now = time.monotonic()
            position.seconds, began = position.seconds + now - began, now
            position.cursor = Cursor(epoch, position.cursor.step + 1)
            progress.add(sent.batch.rows, meter.shown)
            meter.tell(position.steps, position.seconds)
            ends = position.cursor.step == steps
            every = phase.evaluate_every
            position.due = ends or (every > 0 and position.steps % every == 0)
            if position.due:
                position.cursor = Cursor(epoch + 1, 0) if ends else position.cursor
                _evaluate(trainee, train, valid, phase, position, save, meter)
                began = time.monotonic()
                if position.stopping.ended:
                    return
            elif phase.checkpoint_every and position.steps % phase.checkpoint_every == 0:
                save(False)


def _bad_step(
    trainee: Trainee, rows: dict[str, list[int]], position: Position, log: RunLog, name: str
) -> None:
    """Stop, or count the step as skipped; stop there too where the steps before were skipped."""
    found = "the loss or its gradient is not finite, or too large to be squared"
    step, in_a_row = position.steps + 1, position.bad_in_a_row
    what = f"{name}: step {step}: {found} ({listed(rows)})"
    skips = trainee.engine.config.bad_steps == "skip"
    if skips:
        log.say(f"{what}; skipped")
        log.bad_step(name, step, rows)
        if in_a_row < SKIPPED:
            return
    why = trainee.diagnose()
    also = f"; {why}" if why else ""
    if skips:
        raise UserError(
            f"{what}{also}; {in_a_row} steps in a row were skipped, so it is not a few rows that "
            "spoil them: look at the values of these rows, or lower the learning rates"
        )
    raise UserError(
        f"{what}{also}; no weight has moved by it: look at the values of these rows, lower the "
        'learning rates, or leave such steps out by engine.bad_steps = "skip"'
    )


def _evaluate(
    trainee: Trainee,
    train: Loader,
    valid: Loader,
    phase: PhaseConfig,
    position: Position,
    save: Callable[[bool], None],
    meter: Meter,
) -> None:
    log, name = meter.log, meter.name
    pace = meter.since_last(position.steps, position.seconds)
    heartbeat.at(f"{name}, evaluation after step {position.steps}")
    trainee.engine.train(False)
    scores = evaluate(trainee.model, valid, trainee.ranks)
    trainee.engine.train(True)
    position.due = False
    value = scores.metric(phase.metric)
    if value is None and position.stopping.best is None:
        raise UserError(
            f"{name}: {phase.metric} is undefined on the validation rows "
            f"({', '.join(phase.validate)}): no domain has both classes there; choose other splits"
        )
    best = position.stopping.update(value, position.steps)
    shown = "undefined" if value is None else f"{value:.5f}"
    mark = " (best)" if best else ""
    log.say(f"{name}: step {position.steps}, validation {phase.metric} {shown}{mark}")
    values = {"step": position.steps, "epoch": position.cursor.epoch, phase.metric: value}
    values |= {"domains": {score.domain: score.auc for score in scores.domains}}
    values |= {"log_loss": scores.log_loss, "seconds": position.seconds}
    log.metrics(name, values | pace)
    save(best)
