"""UFIN's mixtures: experts over a text's vector (Eq. 3-4), and the gate that picks among
interaction experts (Eq. 9).

Shapes: B rows, V floats of a text vector, L experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import DomainLinear
from models.euler import precise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "none": lambda x: x}


class SemanticExperts(nn.Module):
    """z = sum_j g_j sigma(W_j s + b_j), g = softmax(W_g s).

    With a width, an expert is W'_j sigma(W_j s + b_j) through that many hidden units.
    """

    def __init__(self, text: int, experts: int, activation: str, width: int) -> None:
        super().__init__()
        hidden = width or text
        self.gate = nn.Linear(text, experts, bias=False)
        nn.init.zeros_(self.gate.weight)  # uniform
        self.layer = DomainLinear(text, experts * hidden)
        glorot_each(self.layer.linear.weight.data.view(experts, hidden, text))
        self.back = nn.Linear(experts * width, text, bias=False) if width else None
        if self.back is not None:
            glorot_each(self.back.weight.data.view(text, experts, width).transpose(0, 1))
        self.activation = ACTIVATIONS[activation]

    def weights(self, s_BV: Tensor) -> Tensor:
        """g [B, L], at least fp32."""
        return precise(self.gate(s_BV)).softmax(1)

    def forward(self, s_BV: Tensor, slot: Tensor) -> Tensor:
        """z [B, V]."""
        weights = self.weights(s_BV).to(s_BV.dtype)
        hidden = self.activation(self.layer(s_BV, slot)).unflatten(1, (weights.shape[1], -1))
        if self.back is None:
            return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
        return self.back((weights.unsqueeze(2) * hidden).flatten(1))


class SparseGate(nn.Module):
    """softmax over all experts, then its K largest; the others get 0, and no gradient.

    Of equal ones the first are kept. Small random first weights, since zeros would be all equal.
    """

    def __init__(self, text: int, experts: int, top: int, renormalise: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(text, experts, bias=False)
        nn.init.normal_(self.gate.weight, 0, 0.01)
        self.top, self.renormalise = top, renormalise

    def forward(self, z_BV: Tensor) -> Tensor:
        """[B, L], at least fp32."""
        return sparse(precise(self.gate(z_BV)).softmax(1), self.top, self.renormalise)


def sparse(weights_BL: Tensor, top: int, renormalise: bool) -> Tensor:
    """The `top` largest of each row, 0 for the rest."""
    best = weights_BL.detach().argsort(dim=1, descending=True, stable=True)[:, :top]
    kept = weights_BL * torch.zeros_like(weights_BL).scatter_(1, best, 1)
    return kept / kept.sum(1, keepdim=True) if renormalise else kept


def glorot_each(stacked: Tensor) -> None:
    """Glorot's first weights for each matrix of a stack."""
    for matrix in stacked.unbind(0):
        nn.init.xavier_normal_(matrix)
