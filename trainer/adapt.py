"""Phase 2 for one domain: its adapter learns from its own rows, around a trunk that stands still.

`train` does this for every domain, `add-domain` for one: the same function, so an adapter comes out
the same whenever it is trained.
"""

from dataclasses import dataclass

from torch import Tensor

from data_shards import Loader, Location, Rows, UserError
from embeddings import Extension
from trainer.adapter_store import Adapter
from trainer.config import AdaptConfig
from trainer.early_stopping import EarlyStopping
from trainer.engine import Engine
from trainer.evaluate import evaluate
from trainer.fit import Position, fit, trainee_of
from trainer.log import RunLog
from trainer.model import (
    OWN_ROWS,
    Model,
    Trunk,
    adapter_tensors,
    add_domain,
    new_extension,
    trunk_alone,
)
from trainer.ranks import Ranks


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
    """Open one domain's rows, or say why it cannot have an adapter."""
    config, ranks = trunk.config.adapt, trunk.ranks

    def loader(splits: tuple[str, ...], shuffle: bool) -> Loader:
        reading = trunk.config.reading
        return Loader(shards, Rows(splits, (domain,)), reading, ranks.rank, ranks.world, shuffle)

    train, valid = loader(config.rows, True), loader(config.validate, False)
    trunk.check(train)
    _require_enough(train, domain, config)
    index = train.indexes[0]
    vocabulary = index.load_vocabulary(shards)
    added = {
        key: tuple(vocabulary.added(key).to_pylist())
        for key in trunk.tables.keys
        if len(vocabulary.added(key))
    }
    return DomainRows(domain, train, valid, added, index.fingerprint)


def adapt(trunk: Trunk, trunk_id: str, rows: DomainRows, log: RunLog) -> Adapter:
    """Train one domain's adapter; it is kept only if it beats the trunk on validation rows.

    `trunk_id` is the trunk's fingerprint, which the adapter is bound to.
    """
    config, ranks = trunk.config, trunk.ranks
    phase = config.adapt
    trunk.freeze()
    base = evaluate(trunk_alone(trunk), rows.valid, ranks)
    method = trunk.method()
    # ZeRO 3 gathers a module's weights on all ranks at each call
    method.freeze_shared(keep=config.encoder.cache_gb > 0 and config.engine.zero_stage < 3)
    begun = add_domain(trunk, method, rows.domain)
    extension = _extension(trunk, rows, phase)
    trainee = trainee_of(trunk, method, method.adapter_parameters(), phase, extension)
    model, engine = trainee.model, trainee.engine
    position = Position(EarlyStopping(phase.metric, phase.patience))
    position.stopping.update(base.metric(phase.metric), 0)
    engine.train(False)  # fit switches dropout on again
    better = begun and position.stopping.update(_value(model, rows.valid, ranks, phase), 0)
    position.stopping.without_best = 0  # patience is for what phase 2 learns
    best = _Best(engine, extension)
    fit(
        trainee,
        rows.train,
        phase,
        position,
        lambda: evaluate(model, rows.valid, ranks),
        best.save,
        log,
        f"adapt {rows.domain}",
    )
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
        tensors=_tensors(trunk, rows, best),
        vocabulary=rows.vocabulary if extension is not None else {},
    )


def _value(model: Model, valid: Loader, ranks: Ranks, phase: AdaptConfig) -> float | None:
    """The phase's metric of an adapter that phase 1 has trained."""
    return evaluate(model, valid, ranks).metric(phase.metric)


class _Best:
    """The adapter's tensors at the best evaluation, before the first one as it began."""

    def __init__(self, engine: Engine, extension: Extension | None) -> None:
        self._engine, self._extension = engine, extension
        self.parameters: dict[str, Tensor] = {}
        self.own_rows: dict[str, Tensor] = {}
        self.save(True)

    def save(self, best: bool) -> None:
        if best:
            self.parameters = self._engine.parameters()
            if self._extension is not None:
                self.own_rows = self._extension.tables.whole()


def _extension(trunk: Trunk, rows: DomainRows, phase: AdaptConfig) -> Extension | None:
    if not (phase.own_ids and rows.vocabulary):
        return None
    extension = new_extension(
        trunk, [[len(rows.vocabulary.get(key, ())) for key in trunk.tables.keys]]
    )
    extension.tables.set_lr(phase.own_ids_lr)
    return extension


def _tensors(trunk: Trunk, rows: DomainRows, best: _Best) -> dict[str, Tensor]:
    """The adapter's own tensors: low-rank matrices, and rows for its own ids."""
    dense = adapter_tensors(trunk, (rows.domain,), best.parameters)[rows.domain]
    own = {OWN_ROWS + key: best.own_rows[key] for key in rows.vocabulary if key in best.own_rows}
    return {**dense, **own}


def _require_enough(train: Loader, domain: str, config: AdaptConfig) -> None:
    if train.total_rows < config.min_rows:
        raise UserError(
            f"domain {domain!r}: {train.total_rows} training rows, adapt.min_rows asks for "
            f"{config.min_rows}; collect more rows, or lower it"
        )
    for loader_splits in (config.rows, config.validate):
        blocks = train.indexes[0].select(loader_splits, (domain,))
        positives, rows = sum(b.positives for b in blocks), sum(b.rows for b in blocks)
        if positives in (0, rows):
            raise UserError(
                f"domain {domain!r}: all {rows} rows of {', '.join(loader_splits)} have label "
                f"{int(positives > 0)}; an adapter needs both classes in each"
            )
