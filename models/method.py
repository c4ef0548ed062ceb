"""What the trainer knows of a method: how to score a batch, and what belongs to whom."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Method(nn.Module, ABC):
    """A shared part and one adapter per domain.

    `shared()` and the `adapter(domain)`s partition all parameters and buffers, by declaration.
    Their tensors are live: writing into them changes the model.
    """

    domains: list[str]
    """The domains that have an adapter; a domain's slot is its place in this list."""

    @abstractmethod
    def forward(self, embedded: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        """Logits [B] from vectors [B, fields, width], numbers [B, n] and adapter slots [B]
        (-1: the shared part alone)."""

    @abstractmethod
    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """This rank's share of the loss of a global batch of `rows` real rows."""

    @abstractmethod
    def shared(self) -> dict[str, Tensor]:
        """Tensors of the shared part, by name."""

    @abstractmethod
    def adapter(self, domain: str) -> dict[str, Tensor]:
        """Tensors of one domain's adapter, by name."""

    @abstractmethod
    def shared_parameters(self) -> list[nn.Parameter]:
        """What phase 1 trains."""

    @abstractmethod
    def adapter_parameters(self) -> list[nn.Parameter]:
        """What phase 2 trains."""

    @abstractmethod
    def add_domain(self, domain: str, seed: int) -> None:
        """A fresh adapter in the last slot. It moves no byte of the shared part or the others."""

    @abstractmethod
    def remove_domain(self, domain: str) -> None:
        """The other adapters stay as they are, in the same order."""
