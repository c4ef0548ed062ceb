"""Deep & Cross Network (Wang et al., 2017): vector cross layers beside an MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.crossnet import VectorCrossNet

from models.adapters import DomainLinear
from models.backbones.backbone import DeepConfig, Inputs, VectorBackbone
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class DCNConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["dcn"] = "dcn"
    cross_layers: int = 3


class DCN(VectorBackbone):
    """x_{l+1} = x_0 (x_l . w_l) + b_l + x_l (Eq. 3), joined with the MLP before the logit."""

    def __init__(self, inputs: Inputs, config: DCNConfig) -> None:
        super().__init__(inputs, config)
        width = inputs.fields * inputs.dim + inputs.numbers
        self.cross = VectorCrossNet(width, config.cross_layers)
        self.deep = MLP(width, config.hidden, config.dropout)
        self.out = output_layer(width + self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        return self.out(self.vector(emb_BFD, first_BF, numbers, slot)).squeeze(1)

    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        x = flat(emb_BFD, numbers)
        return torch.cat([self.cross(x), self.deep(x, slot)], dim=1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
