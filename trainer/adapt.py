"""Phase 2 for one domain: its adapter learns from its own rows, around a trunk that stands still.

`train` does this for every domain, `add-domain` for one: the same function, so an adapter comes out
the same whenever it is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_shards import Loader, Location, UserError
from trainer import preemption
from trainer.adapter_store import Adapter
from trainer.checkpoint import Checkpoint, newest
from trainer.early_stopping import EarlyStopping
from trainer.engine import Engine
from trainer.evaluate import evaluate
from trainer.fit import Position, Trainee, fit, trainee_of
from trainer.log import RunLog
from trainer.model import Model, adapter_tensors, add_domain, trunk_alone
from trainer.own_rows import Own, new_own
from trainer.phase_state import restored, state_of, under
from trainer.phases import AdaptConfig
from trainer.ranks import Ranks, together
from trainer.saving import Saver
from trainer.trunk import Trunk

BEST, BEST_OWN = "best/", "best_own/"


class NoAdapterError(UserError):
    """A domain's rows are too few for an adapter, or of one class."""


@dataclass(frozen=True)
class DomainRows:
    """One domain's rows for phase 2."""

    domain: str
    train: Loader
    valid: Loader
    vocabulary: dict[str, tuple[str, ...]]
    """Per field, ids that only this domain has."""
    data: str
    """Fingerprint of the shard set."""


def rows_of(trunk: Trunk, shards: Location, domain: str) -> DomainRows:
    """Open one domain's rows, or say why it cannot have an adapter: the same on every rank, so that
    what one cannot read, none trains on. Collective."""
    found: list[DomainRows] = []
    together(trunk.ranks, f"rows of {domain}", lambda: found.append(_opened(trunk, shards, domain)))
    return found[0]


def _opened(trunk: Trunk, shards: Location, domain: str) -> DomainRows:
    config = trunk.config.adapt
    train = trunk.loader(shards, config.rows, (domain,), shuffle=True)
    valid = trunk.loader(shards, config.validate, (domain,))
    _require_enough(train, domain, config)
    index = train.indexes[0]
    vocabulary = index.load_vocabulary(shards)
    added = {
        key: tuple(vocabulary.added(key).to_pylist())
        for key in trunk.rows
        if len(vocabulary.added(key))
    }
    return DomainRows(domain, train, valid, added, index.fingerprint)


def adapt(
    trunk: Trunk, trunk_id: str, rows: DomainRows, log: RunLog, folder: Path | None = None
) -> Adapter:
    """Train one domain's adapter; it is kept only if it beats the trunk on validation rows.

    `trunk_id` is the trunk's fingerprint, which the adapter is bound to. With `checkpoint_every`
    the phase keeps its state in `folder`, and continues from the newest one there.
    """
    config, ranks = trunk.config, trunk.ranks
    phase = config.adapt
    trunk.freeze()
    base = evaluate(trunk_alone(trunk), rows.valid, ranks)
    method = trunk.method()
    # ZeRO 3 gathers a module's weights on all ranks at each call
    method.freeze_shared(keep=config.encoder.cache_gb > 0 and config.engine.zero_stage < 3)
    begun = add_domain(trunk, method, rows.domain)
    words = rows.vocabulary if phase.own_ids else {}
    own = new_own(trunk, method.own_width, [words])
    for tables in own.parts():
        tables.set_lr(phase.own_ids_lr)
    trainee = trainee_of(trunk, method, method.adapter_parameters(), phase, own)
    model, engine = trainee.model, trainee.engine
    position = Position(EarlyStopping(phase.metric, phase.patience))
    position.stopping.update(base.metric(phase.metric), 0)
    engine.train(False)  # fit switches dropout on again
    better = begun and position.stopping.update(_value(model, rows.valid, ranks, phase), 0)
    position.stopping.without_best = 0  # patience is for what phase 2 learns
    best = _Best(engine, own, words)
    facts = {"data": rows.data, "trunk": trunk_id, "own_ids": phase.own_ids}
    position = _learn(trunk, trainee, rows, position, best, facts, folder, log)
    kept = better or position.stopping.best_step > 0
    return Adapter(
        method=config.method.name,
        domain=rows.domain,
        version=0,
        trunk=trunk_id,
        schema=trunk.schema.fingerprint(),
        data=rows.data,
        metrics={
            phase.metric: position.stopping.best,
            f"shared_{phase.metric}": base.metric(phase.metric),
            "seconds": round(position.seconds, 3),
            "steps": position.steps,
        },
        kept=kept,
        tensors={
            **adapter_tensors(trunk, (rows.domain,), best.parameters)[rows.domain],
            **best.own_tensors,
        },
        vocabulary=words,
    )


def _learn(
    trunk: Trunk,
    trainee: Trainee,
    rows: DomainRows,
    position: Position,
    best: "_Best",
    facts: dict[str, Any],
    folder: Path | None,
    log: RunLog,
) -> Position:
    """The steps of the phase, from `position` or from its newest checkpoint; where they ended."""
    config, ranks, engine = trunk.config, trunk.ranks, trainee.engine
    phase, name = config.adapt, f"adapt {rows.domain}"

    if folder is None or not phase.checkpoint_every:
        fit(trainee, rows.train, rows.valid, phase, position, best.save, log, name)
        return position
    found = newest(folder, ranks, log.say)
    if found is not None:
        position = _resume(found, engine, best, facts)
        log.say(f"{name}: continues from {found.folder.name}")
    keep, begun = config.keep_checkpoints, position.steps
    saver = Saver(folder, ranks, best.own.parts(), keep, log, begun, config.faults)
    with preemption.saving(), saver:

        def save(is_best: bool) -> None:
            best.save(is_best)
            saver.save(position.steps, state_of(engine, position, facts, best.tensors()))

        fit(trainee, rows.train, rows.valid, phase, position, save, log, name)
    return position


def _resume(found: Checkpoint, engine: Engine, best: "_Best", facts: dict[str, Any]) -> Position:
    saved, wanted = found.values().get("own_ids"), facts["own_ids"]
    if saved != wanted:  # else the tables would differ, and nobody would know why
        raise UserError(
            f"{found.folder}: learned with adapt.own_ids = {saved}, which is {wanted} now (of "
            f"add-domain: --no-own-ids); set it as it was, or delete {found.folder.parent} to "
            "begin this domain anew"
        )
    snapshot = found.load(best.own.parts())
    if {name: snapshot.values[name] for name in facts} != facts:
        raise UserError(
            f"{found.folder}: learned from other shards or around another trunk; restore them, or "
            f"delete {found.folder.parent} to begin this domain anew"
        )
    best.load(snapshot.tensors)
    return restored(snapshot, engine)


def _value(model: Model, valid: Loader, ranks: Ranks, phase: AdaptConfig) -> float | None:
    """The phase's metric of an adapter that phase 1 has trained."""
    return evaluate(model, valid, ranks).metric(phase.metric)


class _Best:
    """The adapter's tensors at the best evaluation, before the first one as it began."""

    def __init__(self, engine: Engine, own: Own, words: dict[str, tuple[str, ...]]) -> None:
        self.own = own
        self._engine, self._words = engine, words
        self.parameters: dict[str, Tensor] = {}
        self.own_tensors: dict[str, Tensor] = {}
        self.save(True)

    def save(self, best: bool) -> None:
        if best:
            self.parameters = self._engine.parameters()
            self.own_tensors = self.own.tensors(self._words)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        found = {BEST + name: tensor for name, tensor in self.parameters.items()}
        return found | {BEST_OWN + name: tensor for name, tensor in self.own_tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.parameters, self.own_tensors = under(BEST, tensors), under(BEST_OWN, tensors)


def _require_enough(train: Loader, domain: str, config: AdaptConfig) -> None:
    if train.total_rows < config.min_rows:
        raise NoAdapterError(
            f"domain {domain!r}: {train.total_rows} training rows, adapt.min_rows asks for "
            f"{config.min_rows}; collect more rows, or lower it"
        )
    for loader_splits in (config.rows, config.validate):
        blocks = train.indexes[0].select(loader_splits, (domain,))
        positives, rows = sum(b.positives for b in blocks), sum(b.rows for b in blocks)
        if positives in (0, rows):
            raise NoAdapterError(
                f"domain {domain!r}: all {rows} rows of {', '.join(loader_splits)} have label "
                f"{int(positives > 0)}; an adapter needs both classes in each"
            )
