"""What every backbone offers, and what it is told.

Shapes: B rows, F fields, D the embedding's width, n numbers, P = F (F - 1) / 2 pairs of fields.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from models.adapters import DomainLinear


@dataclass(frozen=True)
class DeepConfig:
    """What the MLP of a backbone is like. Defaults: MLoRA 4.3, the same for every backbone."""

    hidden: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.5
    """After each hidden layer."""


@dataclass(frozen=True)
class Inputs:
    """Sizes of what a backbone reads."""

    fields: int
    dim: int
    numbers: int
    item_fields: tuple[int, ...] = ()
    """Places of the fields that tell of the item; the others tell of the user and the context."""
    item_numbers: tuple[int, ...] = ()
    """Likewise of the numbers."""


class Backbone(nn.Module, ABC):
    """Vectors to one logit per row. Nothing in it may mix rows, so none has batch norm."""

    first_order: ClassVar[bool] = False
    """Whether each id also has a weight of its own (the linear part of FM and Wide & Deep)."""

    @abstractmethod
    def __init__(self, inputs: Inputs, config: Any) -> None:
        """`config`: its own dataclass; Any, for each takes another."""
        super().__init__()

    @abstractmethod
    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        """Logits [B]; `first_BF` are the first-order weights, empty [B, 0] where not asked for."""

    def diagnose(self) -> str | None:
        """As `Method.diagnose`."""
        return None

    @abstractmethod
    def adaptable(self) -> dict[str, DomainLinear]:
        """The linear layers that a domain may adapt, by name."""


class VectorBackbone(Backbone):
    """A backbone whose logit is linear in one vector of a row, which other losses can shape."""

    out: nn.Linear

    @abstractmethod
    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        """[B, d], for the same as `forward`."""

    def outputs(self) -> list[nn.Module]:
        """The last layers, which weigh the vector and do nothing else."""
        return [self.out]
