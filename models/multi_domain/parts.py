"""Parts of which multi-domain networks are made: experts that all domains share, and layers that
each domain has for itself.

Shapes: B rows, T tiles of R rows of one domain each, K experts. Of one domain all weights lie in
one dictionary; `w` of T tiles has them as [T, ...].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import generator_for
from models.dropout import dropout
from models.interactions import Side
from models.layers import linear, output_layer

Weights = Mapping[str, Tensor]


class Slots(nn.Module):
    """Parameters [slots, ...] by name."""

    def __init__(self, tensors: Weights) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, slot: Tensor) -> dict[str, Tensor]:
        """[len(slot), ...] of these slots."""
        return {name: p.index_select(0, slot) for name, p in self.named_parameters()}

    def stacked(self) -> dict[str, Tensor]:
        """All slots' tensors, live."""
        return {name: p.data for name, p in self.named_parameters()}


@dataclass(frozen=True)
class First:
    """First weights of one domain: a pure function of (seed, owner, layer); Glorot's, and zeros for
    biases."""

    seed: int
    owner: str

    def normal(self, name: str, std: float, *shape: int) -> Tensor:
        generator = generator_for(self.seed, self.owner, name)
        return torch.empty(shape).normal_(0, std, generator=generator)

    def matrix(self, name: str, d_in: int, d_out: int, *count: int) -> Tensor:
        """[*count, d_out, d_in]."""
        return self.normal(name, (2 / (d_in + d_out)) ** 0.5, *count, d_out, d_in)

    def mlp(self, name: str, widths: Sequence[int], *count: int) -> dict[str, Tensor]:
        """Layers from each width to the next, of `count` networks side by side."""
        found = {}
        for i, (d_in, d_out) in enumerate(zip(widths, widths[1:], strict=False)):
            found[f"{name}{i}_weight"] = self.matrix(f"{name}{i}", d_in, d_out, *count)
            found[f"{name}{i}_bias"] = torch.zeros(*count, d_out)
        return found


def layer(w: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b [N, R, d_out] for x [N, R, d_in], of a layer [N, d_out, d_in] or [T, K, ...] with
    N = T K."""
    weight, bias = w[f"{name}_weight"], w[f"{name}_bias"]
    return torch.baddbmm(bias.flatten(0, -2).unsqueeze(1), x, weight.flatten(0, -3).mT)


def hidden(w: Weights, name: str, layers: int, x: Tensor, drop: float) -> Tensor:
    """Layers with ReLU, then dropout, which a `drop` of 0 leaves out."""
    for i in range(layers):
        x = dropout(F.relu(layer(w, f"{name}{i}", x)), drop, drop > 0)
    return x


def tower(w: Weights, name: str, layers: int, x: Tensor, drop: float) -> Tensor:
    """Hidden layers and one to a logit: [T, R] for x [T, R, d]."""
    return layer(w, f"{name}{layers}", hidden(w, name, layers, x, drop)).squeeze(2)


def own_experts(w: Weights, name: str, layers: int, x: Tensor, drop: float) -> Tensor:
    """[T, R, K, d_out] of a domain's K networks, for x [T, R, d]."""
    count = w[f"{name}0_weight"].shape[1]
    each = x.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1)
    return hidden(w, name, layers, each, drop).unflatten(0, (-1, count)).transpose(1, 2)


def gate(weight: Tensor, x: Tensor) -> Tensor:
    """softmax(W x) [T, R, K] for W [T, K, d]."""
    return torch.bmm(x, weight.mT).softmax(2)


def mixed(share: Tensor, experts: Tensor) -> Tensor:
    """sum_k g_k f_k [..., d] for g [..., K] and f [..., K, d]."""
    return (share.unsqueeze(-2) @ experts).squeeze(-2)


class Head(nn.Module):
    """Hidden layers with ReLU, then dropout, and one to a logit, that all domains share."""

    def __init__(self, d_in: int, widths: Sequence[int], drop: float) -> None:
        super().__init__()
        chain = [d_in, *widths]
        self.layers = nn.ModuleList(linear(a, b) for a, b in zip(chain, widths, strict=False))
        self.out = output_layer(chain[-1])
        self.dropout = drop

    def forward(self, x: Tensor) -> Tensor:
        """[...] for x [..., d_in]."""
        for one in self.layers:
            x = dropout(F.relu(one(x)), self.dropout, self.training)
        return self.out(x).squeeze(-1)


class Experts(nn.Module):
    """K networks side by side that all domains share: hidden layers with ReLU, then dropout."""

    def __init__(self, count: int, d_in: int, widths: Sequence[int], drop: float) -> None:
        super().__init__()
        chain = [d_in, *widths]
        self.layers = nn.ModuleList(
            Side(count, a, b) for a, b in zip(chain, chain[1:], strict=False)
        )
        self.dropout = drop
        self.count, self.d_out = count, chain[-1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K, d_out] for x [..., d_in]."""
        y = x.reshape(1, -1, x.shape[-1])
        for one in self.layers:
            y = dropout(F.relu(one(y)), self.dropout, self.training)
        return y.transpose(0, 1).unflatten(0, x.shape[:-1])
