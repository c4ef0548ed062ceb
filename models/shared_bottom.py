"""SharedBottom (Ruder, 2017): one bottom for all domains and a tower for each, y_t = h_t(f(x)); a
multi-domain baseline of many papers (Ma et al., 2018, Eq. 1).

Theirs has no answer for a domain without a tower. Here one more tower, the general one, learns
beside them from every row; it belongs to the shared part, as in Uni-CTR.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from models.adapters import TILE, generator_for, tiles
from models.backbones import Inputs
from models.domain_head import Tower
from models.dropout import dropout
from models.layers import MLP, flat
from models.method import Features, Method, Needs, cross_entropy


@dataclass(frozen=True)
class SharedBottomConfig(Needs):
    """The `[method]` section of a run file. Defaults: MLoRA's MLP (4.3), cut before its end."""

    name: Literal["shared_bottom"] = "shared_bottom"
    bottom: tuple[int, ...] = (256, 128)
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.5
    """After each hidden layer."""

    def __post_init__(self) -> None:
        if min((len(self.bottom), *self.bottom, *self.tower)) < 1:
            raise UserError("method: bottom has a layer or more, widths are 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is 0 to below 1, not {self.dropout}")


class Stacked(nn.Module):
    """One linear layer of all slots."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight [slots, d_out, d_in], bias [slots, d_out]."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """[tiles, TILE, d_out] for x [tiles, TILE, d_in] and the slot of each tile."""
        return torch.baddbmm(self.bias[slot].unsqueeze(1), x, self.weight[slot].mT)


class Towers(nn.Module):
    """The towers of all slots: a batch of mixed domains costs as many calls as one of one domain.

    A row's place in its tile follows from its own domain's rows alone, so its logit is bit-equal
    whatever other domains are there.
    """

    def __init__(self, tensors: Iterable[Tensor], dropout: float) -> None:
        """`tensors`: weight and bias of each layer in turn."""
        super().__init__()
        each = iter(tensors)
        self.layers = nn.ModuleList(Stacked(*pair) for pair in zip(each, each, strict=True))
        self.dropout = dropout

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """Logits [B] for x [B, d_in]; those of rows whose slot is -1 mean nothing."""
        place, tile_slot = tiles(slot)
        tile_slot = tile_slot.clamp(min=0)
        padded = x.new_zeros(len(tile_slot) * TILE, x.shape[1]).index_copy(0, place, x)
        x = padded.view(-1, TILE, x.shape[1])
        for layer in self.layers[:-1]:
            x = dropout(F.relu(layer(x, tile_slot)), self.dropout, self.training)
        return self.layers[-1](x, tile_slot).flatten()[place]


class SharedBottom(Method):
    """Logits [B, 3] of a row: the own tower's (the general one's where slot is -1), the general
    tower's, and 1 where the latter learns beside an own one, else 0."""

    adapters_in_pretrain: ClassVar[bool] = True

    def __init__(self, inputs: Inputs, config: SharedBottomConfig, seed: int) -> None:
        super().__init__()
        self.domains: list[str] = []
        self.dim = inputs.dim
        self.config = config
        width = inputs.fields * inputs.dim + inputs.numbers
        self.bottom = MLP(width, config.bottom, config.dropout)
        self.general = self._tower(seed, "")
        self.towers: Towers | None = None
        self._frozen = False

    def forward(self, features: Features) -> Tensor:
        slot = features.slot
        vectors = flat(features.embedded[:, :, : self.dim], features.numbers)
        bottom = self.bottom(vectors, slot)
        own = general = self.general(bottom)
        if self.towers is not None:
            own = torch.where(slot < 0, general, self.towers(bottom, slot))
        # a frozen general tower must not teach an added domain's own rows
        learns = (slot >= 0) & (not self._frozen)
        return torch.stack([own, general, learns.to(own)], dim=1)

    def freeze_shared(self, keep: bool) -> None:
        self._frozen = True

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Mean over rows of the own tower's cross entropy and, in phase 1 and with weight 1, the
        general tower's; of the latter alone where a row's domain has no tower."""
        own, general, learns = logit.unbind(1)
        beside = weight * learns.detach()
        summed = cross_entropy(own, label, weight) + cross_entropy(general, label, beside)
        return summed / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        bottom = {f"bottom.{name}": p.data for name, p in self.bottom.named_parameters()}
        general = {f"general.{name}": p.data for name, p in self.general.named_parameters()}
        return {**bottom, **general}

    def adapter(self, domain: str) -> dict[str, Tensor]:
        slot = self.slot_of(domain)
        assert self.towers is not None
        return {name: p.data[slot] for name, p in self.towers.named_parameters()}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.bottom.parameters(), *self.general.parameters()]

    def adapter_parameters(self) -> list[nn.Parameter]:
        return list(self.towers.parameters()) if self.towers is not None else []

    def add_domain(self, domain: str, seed: int) -> None:
        self.require_new(domain)
        weight = self.general.out.weight
        new = [p.data.to(weight).unsqueeze(0) for p in self._tower(seed, domain).parameters()]
        old = [p.data for p in self.adapter_parameters()] or [tensor[:0] for tensor in new]
        joined = [torch.cat(pair) for pair in zip(old, new, strict=True)]
        self.towers = Towers(joined, self.config.dropout).train(self.training)
        self.domains.append(domain)

    def remove_domain(self, domain: str) -> None:
        slot = self.slot_of(domain)
        keep = [other for other in range(len(self.domains)) if other != slot]
        kept = [p.data[keep] for p in self.adapter_parameters()]
        self.towers = Towers(kept, self.config.dropout).train(self.training) if keep else None
        self.domains.remove(domain)

    def _tower(self, seed: int, owner: str) -> Tower:
        """A tower with first weights that are a pure function of (seed, owner, layer)."""
        tower = Tower(self.bottom.d_out, self.config.tower, self.config.dropout)
        for name, layer in tower.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, generator=generator_for(seed, owner, name))
                nn.init.zeros_(layer.bias)
        return tower
