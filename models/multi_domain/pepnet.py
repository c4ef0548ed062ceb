"""PEPNet (Chang et al., 2023): gates that make embeddings and hidden layers personal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import Inputs
from models.dropout import dropout
from models.layers import linear
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import First, Weights


@dataclass(frozen=True)
class PEPNetConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["pepnet"] = "pepnet"
    hidden: tuple[int, ...] = (256, 128)
    """Of the network, with `tower` on top of it."""
    gate: int = 64
    """Hidden units of each gate."""


class GateNU(nn.Module):
    """2 sigmoid(W' relu(W x + b) + b') (Eq. 1-2)."""

    def __init__(self, d_in: int, hidden: int, d_out: int) -> None:
        super().__init__()
        self.first, self.second = linear(d_in, hidden), linear(hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.second(F.relu(self.first(x))))


class PEPNet(MultiDomain):
    """EPNet: x' = gate([d_t, stop(x)]) * x (Eq. 3-4), and PPNet: of each hidden layer
    gate_l([x, stop(x')]) * h_l (Eq. 5-7). A domain's part is its embedding d_t.

    The paper's prior for PPNet is the embeddings of user, item and author; here it is all of x.
    """

    def __init__(self, inputs: Inputs, config: PEPNetConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        widths: Sequence[int] = (self.width, *config.hidden, *config.tower)
        self.embedding = GateNU(inputs.dim + self.width, config.gate, self.width)
        self.gates = nn.ModuleList(
            GateNU(2 * self.width, config.gate, width) for width in widths[1:]
        )
        self.layers = nn.ModuleList(linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.out = linear(widths[-1], 1)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        return {"domain": first.normal("domain", 0.01, self.inputs.dim)}

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        domain = w["domain"].unsqueeze(1).expand(-1, rows.shape[1], -1)
        h = self.embedding(torch.cat([domain, rows.detach()], 2)) * rows
        prior = torch.cat([rows, h.detach()], 2)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            h = gate(prior) * F.relu(layer(h))
            h = dropout(h, self.config.dropout, self.training)
        return self.out(h).squeeze(2)
