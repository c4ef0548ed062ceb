"""DeepFM (Guo et al., 2017): first order + factorization machine + MLP, on shared embeddings."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import DeepConfig, Inputs, VectorBackbone
from models.layers import MLP, all_pairs, flat, output_layer


@dataclass(frozen=True)
class DeepFMConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["deepfm"] = "deepfm"


class DeepFM(VectorBackbone):
    """logit = sum_i w_i + sum_{i<j} <e_i, e_j> + w . MLP([e_1, ..., e_F, numbers]) (Eq. 1-4)."""

    first_order = True

    def __init__(self, inputs: Inputs, config: DeepFMConfig) -> None:
        super().__init__(inputs, config)
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        deep = self.out(self.deep(flat(emb_BFD, numbers), slot))
        return first_BF.sum(1) + all_pairs(emb_BFD).sum(1) + deep.squeeze(1)

    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        deep = self.deep(flat(emb_BFD, numbers), slot)
        return torch.cat([first_BF, all_pairs(emb_BFD), deep], 1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
