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
        for layer in self.layers:
            x = dropout(F.relu(layer(x, slot)), self.dropout, self.training)
        return x

    def adaptable(self) -> dict[str, DomainLinear]:
        """Its layers by name, from the input on."""
        return {f"deep{i}": layer for i, layer in enumerate(self.layers)}  # type: ignore[misc]


def flat(emb_BFD: Tensor, numbers: Tensor) -> Tensor:
    """Vectors of all fields and the numbers side by side: [B, F * D + n]."""
    return torch.cat([emb_BFD.flatten(1), numbers], dim=1)


def output_layer(d_in: int) -> nn.Linear:
    """The last linear layer, to one logit."""
    layer = nn.Linear(d_in, 1)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
