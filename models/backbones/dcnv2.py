"""DCN V2 (Wang et al., 2021): cross layers of whole or low-rank matrices, and an MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class DCNv2Config(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["dcnv2"] = "dcnv2"
    cross_layers: int = 3
    rank: int = 0
    """Of the cross layers' matrices; 0: whole ones."""
    structure: Literal["stacked", "parallel"] = "parallel"
    """Whether the MLP reads what the cross layers give, or stands beside them."""


class DCNv2(Backbone):
    """x_{l+1} = x_0 * (W x_l + b) + x_l (Eq. 1), W = U V^T by option (Eq. 2)."""

    def __init__(self, inputs: Inputs, config: DCNv2Config) -> None:
        super().__init__(inputs, config)
        width, layers = inputs.fields * inputs.dim + inputs.numbers, config.cross_layers
        low = config.rank > 0
        self.cross = LowRankCrossNet(width, layers, config.rank) if low else CrossNet(width, layers)
        self.deep = MLP(width, config.hidden, config.dropout)
        self.stacked = config.structure == "stacked"
        self.out = output_layer(self.deep.d_out + (0 if self.stacked else width))

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        x = flat(emb_BFD, numbers)
        crossed = self.cross(x)
        if self.stacked:
            return self.out(self.deep(crossed, slot)).squeeze(1)
        return self.out(torch.cat([crossed, self.deep(x, slot)], 1)).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
