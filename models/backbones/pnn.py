"""Product-based Neural Network (Qu et al., 2016): products of vectors beside them, in an MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.layers import MLP, flat, output_layer, pairs


@dataclass(frozen=True)
class PNNConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["pnn"] = "pnn"
    product: Literal["inner", "outer"] = "inner"


class PNN(Backbone):
    """logit = w . MLP([e_1, ..., e_F, numbers, p]) (Eq. 1-5).

    p: the inner products <e_i, e_j> of all pairs i < j (IPNN), or the outer product of sum_i e_i
    with itself, which is the sum of those of all pairs (OPNN, Eq. 14).
    """

    def __init__(self, inputs: Inputs, config: PNNConfig) -> None:
        super().__init__(inputs, config)
        fields, dim = inputs.fields, inputs.dim
        products = fields * (fields - 1) // 2 if config.product == "inner" else dim * dim
        self.inner = config.product == "inner"
        self.deep = MLP(fields * dim + inputs.numbers + products, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        products = _inner(emb_BFD) if self.inner else _outer(emb_BFD)
        x = torch.cat([flat(emb_BFD, numbers), products], 1)
        return self.out(self.deep(x, slot)).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()


def _inner(emb_BFD: Tensor) -> Tensor:
    """[B, P]."""
    first, second = pairs(emb_BFD)
    return (first * second).sum(2)


def _outer(emb_BFD: Tensor) -> Tensor:
    """[B, D * D]."""
    total = emb_BFD.sum(1)
    return (total.unsqueeze(2) * total.unsqueeze(1)).flatten(1)
