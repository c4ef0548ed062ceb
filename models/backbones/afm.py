"""Attentional Factorization Machine (Xiao et al., 2017): pairs weighed by attention."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, Inputs
from models.dropout import dropout
from models.layers import linear, output_layer, pairs


@dataclass(frozen=True)
class AFMConfig:
    """The `[backbone]` section of a run file."""

    name: Literal["afm"] = "afm"
    attention: int = 16
    """Hidden units of the attention network."""
    dropout: float = 0.5
    """On the sum of weighed pairs."""


class AFM(Backbone):
    """logit = sum_i w_i + p . sum_{i<j} a_ij (e_i * e_j) + w . numbers (Eq. 6), with
    a = softmax_ij(h . relu(W (e_i * e_j) + b)) (Eq. 5). It has no MLP: a domain adapts W."""

    first_order = True

    def __init__(self, inputs: Inputs, config: AFMConfig) -> None:
        super().__init__(inputs, config)
        self.attention = DomainLinear(inputs.dim, config.attention)
        self.score = linear(config.attention, 1, bias=False)
        self.out = output_layer(inputs.dim + inputs.numbers)
        self.dropout = config.dropout

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        first, second = pairs(emb_BFD)
        pair_BPD = first * second
        of_pair = slot.repeat_interleave(pair_BPD.shape[1])
        hidden = F.relu(self.attention(pair_BPD.flatten(0, 1), of_pair))
        weight_BP = self.score(hidden).view(pair_BPD.shape[:2]).softmax(1)
        pooled = torch.bmm(weight_BP.unsqueeze(1), pair_BPD).squeeze(1)
        pooled = dropout(pooled, self.dropout, self.training)
        return first_BF.sum(1) + self.out(torch.cat([pooled, numbers], 1)).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return {"attention": self.attention}
