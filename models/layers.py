"""Building blocks that several backbones share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import DomainLinear
from models.dropout import dropout


class MLP(nn.Module):
    """Hidden layers with ReLU, then dropout; every layer can be adapted by a domain."""

    def __init__(self, d_in: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = [d_in, *hidden]
        self.layers = nn.ModuleList(
            DomainLinear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.dropout = dropout
        self.d_out = widths[-1]

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """[B, last hidden width]."""
        return self.states(x, slot)[-1]

    def states(self, x: Tensor, slot: Tensor) -> list[Tensor]:
        """The input, and what each layer makes of it."""
        states = [x]
        for layer in self.layers:
            hidden = F.relu(layer(states[-1], slot))
            states.append(dropout(hidden, self.dropout, self.training))
        return states

    def adaptable(self, name: str = "deep") -> dict[str, DomainLinear]:
        """Its layers by name, from the input on."""
        return {f"{name}{i}": layer for i, layer in enumerate(self.layers)}  # type: ignore[misc]


def flat(emb_BFD: Tensor, numbers: Tensor) -> Tensor:
    """Vectors of all fields and the numbers side by side: [B, F * D + n]."""
    return torch.cat([emb_BFD.flatten(1), numbers], dim=1)


def linear(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer that no domain adapts, with Glorot's first weights."""
    layer = nn.Linear(d_in, d_out, bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def output_layer(d_in: int) -> nn.Linear:
    """The last linear layer, to one logit."""
    return linear(d_in, 1)


def all_pairs(emb_BFD: Tensor) -> Tensor:
    """sum_{i<j} e_i * e_j of each row [B, D], at the cost of one pass (Rendle, 2010).

    TorchRec's FactorizationMachine pairs single floats, those of one vector among themselves too.
    """
    return (emb_BFD.sum(1).square() - emb_BFD.square().sum(1)) / 2


def pairs(emb_BFD: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second vector of each pair i < j: two of [B, P, D]."""
    fields = emb_BFD.shape[1]
    first, second = torch.triu_indices(fields, fields, 1, device=emb_BFD.device)
    return emb_BFD.index_select(1, first), emb_BFD.index_select(1, second)
