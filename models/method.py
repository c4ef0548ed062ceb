"""What the trainer knows of a method: how to score a batch, and what belongs to whom."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from data_shards.schema import Field


class Tokens(NamedTuple):
    """The prompts of B rows as token ids, end to end."""

    values: Tensor
    """[total] int64"""
    lengths: Tensor
    """[B]; 0 for padding rows"""


@dataclass(frozen=True)
class Features:
    """What a method sees of B rows."""

    embedded: Tensor
    """[B, fields, width]; empty for a method that reads no tables"""
    numbers: Tensor
    """[B, n]"""
    slot: Tensor
    """[B] the place of each row's domain in `Method.domains`; -1: the shared part alone"""
    tokens: Tokens | None = None
    slots: tuple[int, ...] | None = None
    """The slots of the global batch, on all ranks the same, so that all of them run the same
    modules; None: those of these rows."""
    text: Tensor | None = None
    """[B, d_V] what a frozen encoder made of each row's prompt"""
    own: Tensor | None = None
    """[B, fields, `Method.own_width`] of the tables that each row's adapter has for itself; zeros
    where slot is -1"""
    teacher: Tensor | None = None
    """[B] logits of each domain's teacher, NaN where it has none; given in training alone"""

    def to(self, dtype: torch.dtype) -> "Features":
        """The same with vectors and numbers of another precision."""
        cast = {name: None if part is None else part.to(dtype) for name, part in self._vectors()}
        return replace(self, embedded=self.embedded.to(dtype), **cast)

    def _vectors(self) -> tuple[tuple[str, Tensor | None], ...]:
        return ("numbers", self.numbers), ("text", self.text), ("own", self.own)


class Seen(NamedTuple):
    """Numbers that are worth a picture."""

    name: str
    """What they are, in a title's words"""
    values: Tensor
    axes: tuple[str, ...] = ()
    """What is counted along each axis but that of rows, if a picture tells it"""


@dataclass(frozen=True)
class Needs:
    """What a method reads of a run; its config says so."""

    text: ClassVar[bool] = False
    """Rows as vectors of a frozen encoder, by a section [text]."""
    teacher: ClassVar[bool] = False
    """Logits of each domain's teacher, where the run has a section [teacher]."""
    aligns: ClassVar[bool] = False
    """Text vectors in a stage before phase 1, by sections [align] and [text], and not later."""
    adapts: ClassVar[bool] = True
    """Whether domains have adapters."""

    def reads(self, field: Field) -> bool:
        """Whether the shared part looks up this id field in a table."""
        return True


class Method(nn.Module, ABC):
    """A shared part and one adapter per domain.

    `shared()`, the `adapter(domain)`s and `frozen()` partition all parameters and buffers, by
    declaration. Their tensors are live: writing into them changes the model.
    """

    modules_per_domain: ClassVar[bool] = False
    """Whether a domain's rows go through modules of its own; then `Features.slots` is given."""
    adapters_in_pretrain: ClassVar[bool] = False
    """Whether phase 1 trains adapters too, with which phase 2 then begins."""
    own_width: int = 0
    """Floats that an adapter has for each id, in tables of its own; 0: it has no tables."""
    shows: bool = False
    """Whether `pictured` has something to show."""

    domains: list[str]
    """The domains that have an adapter; a domain's slot is its place in this list."""

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """[B, k]: first the logit that predicts; the other columns only `loss` reads."""

    @abstractmethod
    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """This rank's share of the loss of a global batch of `rows` real rows, for the [B, k] of
        `forward`."""

    @abstractmethod
    def shared(self) -> dict[str, Tensor]:
        """Tensors of the shared part, by name."""

    @abstractmethod
    def adapter(self, domain: str) -> dict[str, Tensor]:
        """Tensors of one domain's adapter, by name."""

    def frozen(self) -> dict[str, Tensor]:
        """Tensors that no phase trains and no checkpoint holds, by name."""
        return {}

    def freeze_shared(self, keep: bool) -> None:  # noqa: B027  most methods have nothing to do
        """Phase 2 begins: what the shared part makes of a row stays the same from now on, and with
        `keep` it may be remembered: then ranks call modules of it different numbers of times."""

    def over_states(self, tokens: int) -> list[Tensor]:
        """The encoder's states of one prompt of so many tokens, as zeros, which have passed all
        that stands on them in training: a plan counts what backward keeps of that. Empty where
        there is no encoder."""
        return []

    def diagnose(self) -> str | None:
        """What is wrong with its weights, in words that a user can act on; a few small sums."""
        return None

    def pictured(self, features: Features) -> dict[str, Seen]:
        """What of B rows is worth a picture, by kind: `points` [B, d], where a row lies; `shares`
        [B, L], what each expert has of a row, 0 for one that is not asked."""
        return {}

    def pictured_weights(self) -> dict[str, Seen]:
        """Likewise of the weights: `matrices` [L, m, n], one of each expert of `shares`."""
        return {}

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

    def slot_of(self, domain: str) -> int:
        """The domain's place in `domains`; UserError where it has none."""
        if domain not in self.domains:
            known = ", ".join(self.domains) or "none"
            raise UserError(f"no adapter for domain {domain!r} is loaded; loaded: {known}")
        return self.domains.index(domain)

    def require_new(self, domain: str) -> None:
        """UserError where the domain has an adapter."""
        if domain in self.domains:
            raise UserError(
                f"domain {domain!r} has an adapter already; remove it first (`remove-domain`)"
            )


def cross_entropy(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Binary cross entropy, summed over rows."""
    return F.binary_cross_entropy_with_logits(logit, label, weight, reduction="sum")
