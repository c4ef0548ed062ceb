"""What multi-domain baselines have in common: a shared part, and of each domain a part of its own
that is its adapter.

Phase 1 trains all of it; phase 2 the part of one domain. The papers have no answer for a domain
that was never seen. Here one more part, the general one, learns beside them from every row; it
belongs to the shared part, as in Uni-CTR.

Where a paper lets a domain look at another's part, the shared part has experts for that: so adding
a domain moves no prediction of the others (S4).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from models.adapters import TILE, tiles
from models.backbones import Inputs
from models.layers import flat
from models.method import Features, Method, Needs, cross_entropy
from models.multi_domain.parts import First, Slots, Weights


@dataclass(frozen=True)
class MultiDomainConfig(Needs):
    """What all of them have. Widths are those of MLoRA's MLP (4.3) unless their papers say more."""

    tower: tuple[int, ...] = (64,)
    dropout: float = 0.5
    """After each hidden layer."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            sizes = value if isinstance(value, tuple) else (value,)
            no_layer = key == "expert" and not sizes
            if no_layer or any(isinstance(size, int) and size < 1 for size in sizes):
                raise UserError(f"method.{key}: sizes are 1 or more, not {value}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is 0 to below 1, not {self.dropout}")


class MultiDomain(Method):
    """Logits [B, 3 or 5] of a row: its own domain's (the general one's where slot is -1), the
    general one's, and 1 where the latter learns beside an own one, else 0; then what of each is
    added to the loss.

    A batch is cut into tiles of one domain each, so scoring costs by its rows, and a row's logit is
    bit-equal whatever other domains are there. Phase 1's optimizer walks the parts of all domains.
    """

    adapters_in_pretrain: ClassVar[bool] = True

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.domains: list[str] = []
        self.inputs = inputs
        self.width = inputs.fields * inputs.dim + inputs.numbers
        self.own: Slots | None = None
        self._frozen = False

    def begin(self, seed: int) -> None:
        """The general part; to be called once the shared one is there."""
        first = self.first_general(First(seed, ""))
        self.general = Slots({name: tensor.unsqueeze(0) for name, tensor in first.items()})

    def prepare(self, x: Tensor) -> Tensor:
        """What the shared part makes of rows [B, width] before their domains' parts: [B, d]."""
        return x

    @abstractmethod
    def first(self, first: First) -> dict[str, Tensor]:
        """First weights of one domain's part, by names without a dot."""

    @abstractmethod
    def score(self, rows: Tensor, w: Weights) -> Tensor:
        """Logits [T, R] of tiles of prepared rows [T, R, d], each with weights of its domain; or
        [T, R, 2], with what is added to the loss."""

    def first_general(self, first: First) -> dict[str, Tensor]:
        """Likewise of the general part."""
        return self.first(first)

    def score_general(self, rows: Tensor, w: Weights) -> Tensor:
        """Likewise by the general part."""
        return self.score(rows, w)

    def forward(self, features: Features) -> Tensor:
        slot = features.slot
        embedded = features.embedded[:, :, : self.inputs.dim]
        rows = self.prepare(flat(embedded, features.numbers))
        weights = self.general(slot.new_zeros(1))
        own = general = _columns(self.score_general(rows.unsqueeze(0), weights))
        if self.own is not None:
            own = torch.where((slot < 0).unsqueeze(1), general, self._own(self.own, rows, slot))
        # a frozen general part must not teach an added domain's own rows
        learns = ((slot >= 0) & (not self._frozen)).unsqueeze(1).to(own)
        return torch.cat([own[:, :1], general[:, :1], learns, own[:, 1:], general[:, 1:]], dim=1)

    def freeze_shared(self, keep: bool) -> None:
        self._frozen = True

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Mean over rows of the own part's cross entropy and, in phase 1 and with weight 1, the
        general one's; of the latter alone where a row's domain has no part."""
        beside = weight * logit[:, 2].detach()
        summed = cross_entropy(logit[:, 0], label, weight)
        summed = summed + cross_entropy(logit[:, 1], label, beside)
        if logit.shape[1] > 3:
            summed = summed + (weight * logit[:, 3]).sum() + (beside * logit[:, 4]).sum()
        return summed / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        own = {id(p) for p in self.adapter_parameters()}
        return {name: p.data for name, p in self.named_parameters() if id(p) not in own}

    def adapter(self, domain: str) -> dict[str, Tensor]:
        slot = self.slot_of(domain)
        assert self.own is not None
        return {name: tensor[slot] for name, tensor in self.own.stacked().items()}

    def shared_parameters(self) -> list[nn.Parameter]:
        own = {id(p) for p in self.adapter_parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return list(self.own.parameters()) if self.own is not None else []

    def add_domain(self, domain: str, seed: int) -> None:
        self.require_new(domain)
        like = next(self.general.parameters())
        old = self.own.stacked() if self.own is not None else {}
        new = {name: t.to(like).unsqueeze(0) for name, t in self.first(First(seed, domain)).items()}
        self.own = Slots({k: torch.cat([old[k], v]) if old else v for k, v in new.items()})
        self.domains.append(domain)

    def remove_domain(self, domain: str) -> None:
        slot = self.slot_of(domain)
        assert self.own is not None
        keep = [other for other in range(len(self.domains)) if other != slot]
        kept = {name: tensor[keep] for name, tensor in self.own.stacked().items()}
        self.own = Slots(kept) if keep else None
        self.domains.remove(domain)

    def drop(self, p: float) -> float:
        """The dropout of this moment."""
        return p if self.training else 0.0

    def _own(self, parts: Slots, rows: Tensor, slot: Tensor) -> Tensor:
        """[B, columns]; those of rows whose slot is -1 mean nothing."""
        place, tile_slot = tiles(slot)
        padded = rows.new_zeros(len(tile_slot) * TILE, rows.shape[1]).index_copy(0, place, rows)
        tiled = padded.view(-1, TILE, rows.shape[1])
        return _columns(self.score(tiled, parts(tile_slot.clamp(min=0))))[place]


def _columns(scored: Tensor) -> Tensor:
    """[T * R, columns] of [T, R] or [T, R, columns]."""
    return scored.reshape(scored.shape[0] * scored.shape[1], -1)
