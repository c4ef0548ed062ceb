"""Wide & Deep (Cheng et al., 2016): a linear model beside an MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import DeepConfig, Inputs, VectorBackbone
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class WideDeepConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["wide_deep"] = "wide_deep"


class WideDeep(VectorBackbone):
    """logit = sum_i w_i + w . MLP([e_1, ..., e_F, numbers]) (Eq. 3).

    Crossed columns, which the paper makes by hand, are fields like any other.
    """

    first_order = True

    def __init__(self, inputs: Inputs, config: WideDeepConfig) -> None:
        super().__init__(inputs, config)
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        return first_BF.sum(1) + self.out(self.deep(flat(emb_BFD, numbers), slot)).squeeze(1)

    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        return torch.cat([first_BF, self.deep(flat(emb_BFD, numbers), slot)], 1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
