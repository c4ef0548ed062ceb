"""What every backbone offers, and what it is told.

Shapes: B rows, F fields, D the embedding's width, n numbers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from models.adapters import DomainLinear


@dataclass(frozen=True)
class BackboneConfig:
    """The `[backbone]` section of a run file. Defaults: MLoRA 4.3."""

    name: str = "mlp"
    hidden: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.5
    cross_layers: int = 3
    orders: tuple[int, ...] = (7,)
    """Order vectors of each layer of EulerNet; this and what follows as its authors have it on
    MovieLens."""
    explicit_dropout: float = 0.3
    implicit_dropout: float = 0.3
    layer_norm: bool = False


@dataclass(frozen=True)
class Inputs:
    """Sizes of what a backbone reads."""

    fields: int
    dim: int
    numbers: int


class Backbone(nn.Module, ABC):
    """Vectors to one logit per row. Nothing in it may mix rows."""

    first_order: ClassVar[bool] = False
    """Whether each id also has a weight of its own (the linear part of FM and Wide & Deep)."""

    @abstractmethod
    def __init__(self, inputs: Inputs, config: BackboneConfig) -> None:
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
