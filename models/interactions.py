"""UFIN's interaction experts (Eq. 7-8; the paper's Figure 3b): L networks over the same vectors,
computed side by side.

Shapes: B rows, F universal features of D floats, L experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import dropout
from models.euler import EulerWeights, euler_nets, first_weights
from models.semantic_experts import glorot_each


@dataclass(frozen=True)
class ExpertShape:
    """What interaction experts are like; each kind reads its own part of it."""

    fields: int
    dim: int
    depth: int
    """Layers of CrossNet, CIN or attention"""
    width: int
    """Of an attention head, or feature maps of CIN"""
    experts: int = 1
    orders: int = 0
    """Order vectors of an Euler expert"""
    hidden: tuple[int, ...] = ()
    """Of an MLP"""
    dropout: float = 0.0


class Interaction(nn.Module, ABC):
    """Logits of L experts for each row."""

    @abstractmethod
    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, e_BFD: Tensor) -> Tensor:
        """[B, L]."""


class Side(nn.Module):
    """L linear layers side by side."""

    def __init__(self, experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(experts, 1, d_out))
        glorot_each(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """[L, rows, d_out] for x [L or 1, rows, d_in]."""
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)


class EulerExperts(Interaction):
    """An EulerNet of one layer each. They share mu, which each could take into
    its biases and weights."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__(shape)
        self.orders_each = shape.orders
        first = first_weights(shape.fields, shape.dim, shape.orders, shape.experts)
        for name, tensor in first._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor))

    def orders_by_expert(self) -> Tensor:
        """[L, F, orders]."""
        return self.weights().orders[0].unflatten(1, (-1, self.orders_each)).transpose(0, 1)

    def weights(self) -> EulerWeights:
        return EulerWeights(**dict(self.named_parameters()))

    def forward(self, e_BFD: Tensor) -> Tensor:
        return euler_nets(e_BFD.unsqueeze(0), self.weights())[0]


class MLPExperts(Interaction):
    """Hidden layers with ReLU, then dropout."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__(shape)
        self.layers = _chain(shape.experts, (shape.fields * shape.dim, *shape.hidden))
        self.out = Side(shape.experts, shape.hidden[-1], 1)
        self.dropout = shape.dropout

    def forward(self, e_BFD: Tensor) -> Tensor:
        x = e_BFD.flatten(1).unsqueeze(0)
        for layer in self.layers:
            x = dropout(F.relu(layer(x)), self.dropout, self.training)
        return self.out(x).squeeze(2).T


class CrossExperts(Interaction):
    """CrossNet of DCN V2 (Wang et al., 2021): x_{l+1} = x_0 * (W x_l + b) + x_l."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__(shape)
        wide = shape.fields * shape.dim
        self.layers = _chain(shape.experts, [wide] * (shape.depth + 1))
        self.out = Side(shape.experts, wide, 1)

    def forward(self, e_BFD: Tensor) -> Tensor:
        x = first = e_BFD.flatten(1).unsqueeze(0)
        for layer in self.layers:
            x = first * layer(x) + x
        return self.out(x).squeeze(2).T


class CINLayer(Side):
    """One layer of feature maps, where those above it are a product of terms and weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Weights [L, 1 + F * m, d_out] of 1 and of each feature's products with the m terms, for
        weights x [L or 1, m, maps] of the maps above."""
        weight = self.weight.unflatten(1, (x.shape[2], -1))
        weight = torch.einsum("lmi,lijh->ljmh", x, weight)
        return torch.cat([self.bias, weight.flatten(1, 2)], 1)


class CINExperts(Interaction):
    """Compressed interaction network of xDeepFM (Lian et al., 2018): feature maps of depth k,
    x^k_h = sum_ij W^k_hij (x^{k-1}_i * x^0_j) + b^k_h, summed over D and weighed for the logit.

    Maps are polynomials of the features. While they have fewer terms than there are maps, no row
    sees a map: layers' weights are multiplied with each other, and terms summed over D by them.
    """

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__(shape)
        maps = [shape.fields] + [shape.width] * shape.depth
        self.layers = nn.ModuleList(
            CINLayer(shape.experts, above * shape.fields, width)
            for above, width in zip(maps, maps[1:], strict=False)
        )
        self.out = Side(shape.experts, shape.width * shape.depth, 1)

    def forward(self, e_BFD: Tensor) -> Tensor:
        terms, weight = e_BFD.mT.unsqueeze(0), _identity(e_BFD.mT)
        sums: list[Tensor] = []
        for layer in self.layers:
            if sums:
                terms, weight = _below(terms, weight, e_BFD)
            weight = layer(weight)
            summed = F.pad((e_BFD @ terms).flatten(2), (1, 0), value=e_BFD.shape[2])
            sums.append(summed @ weight)
        return self.out(torch.cat(sums, 2)).squeeze(2).T


def _below(terms: Tensor, weight: Tensor, e_BFD: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [L or 1, B, D, m] and weights [L or 1, m, maps] whose product a layer's maps are, by
    the terms above it and the layer's weights: the maps themselves where these are fewer."""
    products = (terms.unsqueeze(3) * e_BFD.mT.unsqueeze(3)).flatten(3)
    products = F.pad(products, (1, 0), value=1)
    if products.shape[3] <= weight.shape[2]:
        return products, weight
    maps = products.flatten(1, 2) @ weight
    return maps.unflatten(1, products.shape[1:3]), _identity(maps)


def _identity(terms: Tensor) -> Tensor:
    """[1, m, m] for terms [..., m]."""
    return torch.eye(terms.shape[-1], dtype=terms.dtype, device=terms.device).unsqueeze(0)


class AutoIntExperts(Interaction):
    """Self-attention among the fields (Song et al., 2019), two heads, with a residual."""

    HEADS = 2

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__(shape)
        wide = self.HEADS * shape.width
        widths = [shape.dim] + [wide] * shape.depth
        # query, key, value and residual
        self.layers = nn.ModuleList(Side(shape.experts, width, 4 * wide) for width in widths[:-1])
        self.out = Side(shape.experts, shape.fields * wide, 1)

    def forward(self, e_BFD: Tensor) -> Tensor:
        return self.out(self.attended(e_BFD)).squeeze(2).T

    def attended(self, e_BFD: Tensor) -> Tensor:
        """[L, B, F * 2 * width]: all fields, as each has seen the others."""
        rows, fields, _ = e_BFD.shape
        x = e_BFD.flatten(0, 1).unsqueeze(0)  # [1, B * F, D]
        for layer in self.layers:
            split = layer(x).unflatten(2, (4, self.HEADS, -1)).unflatten(1, (rows, fields))
            q, k, v, residual = split.flatten(0, 1).permute(2, 0, 3, 1, 4)
            # [L * B, heads, F, width] each: of other shapes torch has no fused attention
            seen = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            x = F.relu(seen + residual).transpose(1, 2).flatten(2)
            x = x.unflatten(0, (-1, rows)).flatten(1, 2)
        return x.unflatten(1, (rows, -1)).flatten(2)


def _chain(experts: int, widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(Side(experts, a, b) for a, b in zip(widths, widths[1:], strict=False))


INTERACTIONS: dict[str, type[Interaction]] = {
    "euler": EulerExperts,
    "mlp": MLPExperts,
    "autoint": AutoIntExperts,
    "cin": CINExperts,
    "cross": CrossExperts,
}
