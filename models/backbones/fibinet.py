"""FiBiNET (Huang et al., 2019): fields weighed by squeeze and excitation, and bilinear pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.layers import MLP, linear, output_layer, pairs
from models.semantic_experts import glorot_each


@dataclass(frozen=True)
class FiBiNETConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["fibinet"] = "fibinet"
    bilinear: Literal["all", "each", "interaction"] = "interaction"
    """Whose own a matrix is: of all pairs one, of each first field, of each pair."""
    reduction: int = 3
    """Fields over hidden units of the excitation."""


class FiBiNET(Backbone):
    """logit = sum_i w_i + w . MLP([p, q, numbers]) (Eq. 10-12).

    p: e_i W * e_j of all pairs i < j (Eq. 5-7); q: the same of a_i e_i, with
    a = relu(W_2 relu(W_1 z)), z_i the mean of e_i (Eq. 2-4).
    """

    first_order = True

    def __init__(self, inputs: Inputs, config: FiBiNETConfig) -> None:
        super().__init__(inputs, config)
        fields, dim = inputs.fields, inputs.dim
        if fields < 2:
            raise UserError(
                "backbone fibinet pairs id fields; give data.fields two or more of them"
            )
        squeezed, count = max(fields // config.reduction, 1), fields * (fields - 1) // 2
        self.squeeze = linear(fields, squeezed, bias=False)
        self.excite = linear(squeezed, fields, bias=False)
        self.kind = config.bilinear
        matrices = {"all": 1, "each": fields - 1, "interaction": count}[self.kind]
        self.bilinear = nn.Parameter(torch.empty(matrices, dim, dim))
        glorot_each(self.bilinear.data)
        self.deep = MLP(2 * count * dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        weight_BF = F.relu(self.excite(F.relu(self.squeeze(emb_BFD.mean(2)))))
        both = emb_BFD, emb_BFD * weight_BF.unsqueeze(2)
        x = torch.cat([*(self._pairs(e).flatten(1) for e in both), numbers], 1)
        return first_BF.sum(1) + self.out(self.deep(x, slot)).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()

    def _pairs(self, emb_BFD: Tensor) -> Tensor:
        """[B, P, D]."""
        first, second = pairs(emb_BFD)
        if self.kind == "interaction":
            return torch.einsum("bpd,pde->bpe", first, self.bilinear) * second
        weights = self.bilinear.expand(emb_BFD.shape[1] - 1, -1, -1)
        turned = torch.einsum("bfd,fde->bfe", emb_BFD[:, :-1], weights)
        return turned.repeat_interleave(_left(emb_BFD), 1) * second


def _left(emb_BFD: Tensor) -> Tensor:
    """Of how many pairs each field but the last is the first one."""
    return torch.arange(emb_BFD.shape[1] - 1, 0, -1, device=emb_BFD.device)
