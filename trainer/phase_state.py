"""What either phase needs to go on: its engine's state, its position, and what must not change."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.checkpoint import Snapshot
from trainer.engine import Engine
from trainer.fit import Position

OPTIMIZER, PARAMETER = "optimizer/", "parameter/"


def state_of(
    engine: Engine,
    position: Position,
    facts: Mapping[str, Any],
    others: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """`facts` are plain values that a resumed phase must find the same; `others` further tensors,
    by names that begin with none of the prefixes here. Collective under ZeRO."""
    tensors = {OPTIMIZER + name: tensor for name, tensor in engine.optimizer_state().items()}
    tensors |= {PARAMETER + name: tensor for name, tensor in engine.parameters().items()}
    return Snapshot({**tensors, **(others or {})}, {**position.state(), **facts})


def restored(snapshot: Snapshot, engine: Engine) -> Position:
    """Give the engine its state back; where the phase stood."""
    engine.load(under(PARAMETER, snapshot.tensors), under(OPTIMIZER, snapshot.tensors))
    return Position.from_state(snapshot.values)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
