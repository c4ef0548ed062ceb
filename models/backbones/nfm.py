"""Neural Factorization Machine (He and Chua, 2017): an MLP over the sum of all pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.dropout import dropout
from models.layers import MLP, all_pairs, output_layer


@dataclass(frozen=True)
class NFMConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["nfm"] = "nfm"
    pool_dropout: float = 0.0
    """On the sum of all pairs; the paper tunes it for each data set."""


class NFM(Backbone):
    """logit = sum_i w_i + w . MLP([sum_{i<j} e_i * e_j, numbers]) (Eq. 2-4). The paper's batch norm
    is left out: it mixes rows."""

    first_order = True

    def __init__(self, inputs: Inputs, config: NFMConfig) -> None:
        super().__init__(inputs, config)
        self.deep = MLP(inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)
        self.pool_dropout = config.pool_dropout

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        pooled = dropout(all_pairs(emb_BFD), self.pool_dropout, self.training)
        deep = self.deep(torch.cat([pooled, numbers], 1), slot)
        return first_BF.sum(1) + self.out(deep).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
