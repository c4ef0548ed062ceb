"""IntTower (Li et al., 2022): two towers that meet layer by layer, for pre-ranking."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.layers import MLP, flat, linear


@dataclass(frozen=True)
class IntTowerConfig(DeepConfig):
    """The `[backbone]` section of a run file; `hidden` is of either tower."""

    name: Literal["inttower"] = "inttower"
    heads: int = 4
    """Subspaces in which the towers meet."""
    width: int = 32
    """Of each."""


class Tower(nn.Module):
    """The fields of one side: Light-SE, e_i + softmax(W z + b)_i e_i, z_i the mean of e_i; then an
    MLP."""

    def __init__(
        self, fields: list[int], numbers: list[int], dim: int, config: IntTowerConfig
    ) -> None:
        super().__init__()
        self.places = fields, numbers
        self.light = linear(len(fields), len(fields))
        self.deep = MLP(len(fields) * dim + len(numbers), config.hidden, config.dropout)

    def forward(self, emb_BFD: Tensor, numbers: Tensor, slot: Tensor) -> list[Tensor]:
        """[B, width] of each hidden layer."""
        fields, of_side = self.places
        own = emb_BFD[:, fields]
        weight_BF = self.light(own.mean(2)).softmax(1)
        return self.deep.states(
            flat(own + own * weight_BF.unsqueeze(2), numbers[:, of_side]), slot
        )[1:]


class IntTower(Backbone):
    """logit = sum_l sum_h max_h' <u_l^h, v^h'>: each hidden layer l of the user's tower meets the
    last one of the item's, each in its heads (FE-Block). Fields of the context are the user's.

    The contrastive regularisation (CIR) is left out: it sets each row against the others of its
    batch.
    """

    def __init__(self, inputs: Inputs, config: IntTowerConfig) -> None:
        super().__init__(inputs, config)
        item, of_item = list(inputs.item_fields), list(inputs.item_numbers)
        user = [i for i in range(inputs.fields) if i not in item]
        of_user = [i for i in range(inputs.numbers) if i not in of_item]
        _require_both(user, item)
        self.user = Tower(user, of_user, inputs.dim, config)
        self.item = Tower(item, of_item, inputs.dim, config)
        self.heads = config.heads
        wide = config.heads * config.width
        self.meet = nn.ModuleList(linear(width, wide) for width in config.hidden)
        self.met = linear(self.item.deep.d_out, wide)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        user = [
            layer(state).unflatten(1, (self.heads, -1))
            for layer, state in zip(self.meet, self.user(emb_BFD, numbers, slot), strict=True)
        ]
        item_BHW = self.met(self.item(emb_BFD, numbers, slot)[-1]).unflatten(1, (self.heads, -1))
        return torch.bmm(torch.cat(user, 1), item_BHW.mT).amax(2).sum(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return {**self.user.deep.adaptable("user"), **self.item.deep.adaptable("item")}


def _require_both(user: list[int], item: list[int]) -> None:
    if not (user and item):
        there = "user or context" if user else "item"
        raise UserError(
            f"backbone inttower: all id fields are of side {there}, and each of its two towers "
            'reads some; give those of the item side = "item" in data.fields'
        )
