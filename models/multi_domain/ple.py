"""PLE (Tang et al., 2020): experts of each domain beside those that all share, level upon level."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.backbones import Inputs
from models.layers import linear
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Weights, gate, mixed, own_experts, tower


@dataclass(frozen=True)
class PLEConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["ple"] = "ple"
    levels: int = 2
    """1: CGC."""
    shared_experts: int = 2
    own_experts: int = 2
    """Of each domain."""
    expert: tuple[int, ...] = (128,)
    """Hidden layers of an expert of each level."""


class PLE(MultiDomain):
    """x_t' = softmax(W_t x_t) [f_t(x_t), f_s(x_s)] at each level (Eq. 2-6), then y_t = h_t(x_t).

    A domain's part: its experts and gates, and h_t. The paper's shared gate, which makes the next
    x_s, mixes the experts of all domains; here, of a row, the shared ones and its own domain's, for
    another's would tie every domain to those that come and go.
    """

    def __init__(self, inputs: Inputs, config: PLEConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        d_in = [self.width, *[config.expert[-1]] * (config.levels - 1)]
        self.experts = nn.ModuleList(
            Experts(config.shared_experts, d, config.expert, config.dropout) for d in d_in
        )
        mixes = config.own_experts + config.shared_experts
        self.gates = nn.ModuleList(linear(d, mixes, bias=False) for d in d_in[:-1])
        self.d_in, self.mixes = d_in, mixes
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        config, found = self.config, {}
        for level, d in enumerate(self.d_in):
            found[f"gate{level}"] = first.matrix(f"gate{level}", d, self.mixes)
            found |= first.mlp(f"expert{level}_", (d, *config.expert), config.own_experts)
        return {**found, **first.mlp("tower", (config.expert[-1], *config.tower, 1))}

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        config, drop = self.config, self.drop(self.config.dropout)
        own = shared = rows
        for level, experts in enumerate(self.experts):
            mine = own_experts(w, f"expert{level}_", len(config.expert), own, drop)
            both = torch.cat([mine, experts(shared)], 2)
            own = mixed(gate(w[f"gate{level}"], own), both)
            if level < len(self.gates):
                shared = mixed(self.gates[level](shared).softmax(2), both)
        return tower(w, "tower", len(config.tower), own, drop)
