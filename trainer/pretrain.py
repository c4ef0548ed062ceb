"""Phase 1: the shared part learns from all domains."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_shards import Location, UserError
from data_shards.errors import LostError, unknown
from models import Method
from trainer import preemption
from trainer.checkpoint import Checkpoint, checked, newest
from trainer.early_stopping import EarlyStopping
from trainer.engine import Engine
from trainer.fit import Position, fit, trainee_of
from trainer.log import RunLog
from trainer.metrics import METRICS
from trainer.model import adapter_tensors
from trainer.phase_state import restored, state_of
from trainer.ranks import Ranks
from trainer.saving import Saver, step_name
from trainer.trunk import Trunk


@dataclass(frozen=True)
class Pretrained:
    """What phase 1 gives beside the trunk itself."""

    seconds: float
    steps: int
    adapters: dict[str, dict[str, Tensor]]
    """By domain, where they learned with the shared part; else empty."""


def pretrain(
    trunk: Trunk,
    shards: Location,
    folder: Path,
    log: RunLog,
    *,
    domains: tuple[str, ...] | None = None,
    teacher: Path | None = None,
    name: str = "pretrain",
) -> Pretrained:
    """Train the trunk until early stopping and leave its best state in it.

    On rows of these domains, or of all. Continues from the newest checkpoint in `folder`, if there
    is one. `teacher`: the sidecar of logits to learn from.
    """
    config, ranks = trunk.config, trunk.ranks
    phase, keep = config.pretrain, config.keep_checkpoints
    train = trunk.loader(shards, phase.rows, domains, shuffle=True, teacher=teacher)
    valid = trunk.loader(shards, phase.validate, domains)
    metrics = (*METRICS, *(f"auc/{domain}" for domain in valid.domains))
    if phase.metric not in metrics:
        raise unknown("metric in pretrain.metric", phase.metric, metrics)
    method = trunk.method()
    trained = method.shared_parameters()
    if phase.one_phase or method.adapters_in_pretrain:
        for domain in train.domains:
            method.add_domain(domain, config.seed)
        trained = [*method.shared_parameters(), *method.adapter_parameters()]
    trainee = trainee_of(trunk, method, trained, phase)
    engine = trainee.engine
    position = Position(EarlyStopping(phase.metric, phase.patience))
    data = [index.fingerprint for index in train.indexes]
    found = newest(folder, ranks, log.say)
    if found is not None:
        position = _resume(found, trunk, engine, data)
        log.say(f"{name}: continues from {found.folder.name}")
    facts = {"data": data, "base": trunk.base}
    saver = Saver(folder, ranks, [trunk.tables], keep, log, position.steps, config.faults)
    with preemption.saving(), saver:

        def save(best: bool) -> None:
            state = state_of(engine, position, facts)
            saver.save(position.steps, state, position.stopping.best_step)

        fit(trainee, train, valid, phase, position, save, log, name)
    if position.stopping.best_step >= 0:
        _resume(_best(folder / step_name(position.stopping.best_step), ranks), trunk, engine, data)
    trunk.dense = _dense(method, engine)
    adapters = adapter_tensors(trunk, method.domains, engine.parameters())
    return Pretrained(position.seconds, position.steps, adapters)


def _best(folder: Path, ranks: Ranks) -> Checkpoint:
    """LostError where it is damaged: another start comes to it again from one before it."""
    try:
        return checked(folder, ranks)
    except UserError as error:
        raise LostError(f"{error}, or start the same command again") from error


def _resume(found: Checkpoint, trunk: Trunk, engine: Engine, data: list[str]) -> Position:
    snapshot = found.load([trunk.tables])
    if snapshot.values["data"] != data:
        raise UserError(
            f"{found.folder}: learned from other shards than those in data.shards now; "
            "restore them, or start a run of another name"
        )
    trunk.require_base(snapshot.values["base"], found.folder)
    position = restored(snapshot, engine)
    if found.best_lost:
        position.stopping.lose_best(position.steps)
    return position


def _dense(method: Method, engine: Engine) -> dict[str, Tensor]:
    """The shared tensors, whole: trained ones from the engine, the rest as they were."""
    trained = engine.parameters()
    return {name: trained.get(name, tensor) for name, tensor in method.shared().items()}
