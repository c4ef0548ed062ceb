"""HiNet (Zhou et al., 2023): of a row, what all domains know, what its own knows, and what others
do."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Inputs
from models.layers import linear
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Head, Weights, gate, mixed, own_experts


@dataclass(frozen=True)
class HiNetConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["hinet"] = "hinet"
    experts: int = 4
    """Sub-experts of which an expert is a mixture."""
    expert: tuple[int, ...] = (128,)
    others: int = 4
    """Experts of the shared part that stand for other domains."""


class HiNet(MultiDomain):
    """logit = tower([S, C_t, A_t]) (Eq. 1-7).

    S and C_t, of all domains and of the own one, are mixtures of sub-experts (SEI): sum_k g_k(x)
    f_k(x). A_t = sum_m softmax(a_t)_m C_m attends to other domains (SAN); the C_m are the paper's
    of each of them, and here the shared part's. The paper's second level is about several tasks;
    with one, it is the tower. A domain's part: f, g and a_t.
    """

    def __init__(self, inputs: Inputs, config: HiNetConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        shared = config.others + 1  # S, and the C_m
        self.experts = Experts(shared * config.experts, self.width, config.expert, config.dropout)
        self.gate = linear(self.width, shared * config.experts, bias=False)
        self.tower = Head(3 * config.expert[-1], config.tower, config.dropout)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        config = self.config
        return {
            "gate": first.matrix("gate", self.width, config.experts),
            "attention": torch.zeros(config.others),
            **first.mlp("expert", (self.width, *config.expert), config.experts),
        }

    def prepare(self, x: Tensor) -> Tensor:
        """A row, and S and the C_m of it."""
        split = (self.config.others + 1, self.config.experts)
        share = self.gate(x).unflatten(1, split).softmax(2)
        return torch.cat([x, mixed(share, self.experts(x).unflatten(1, split)).flatten(1)], 1)

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        config = self.config
        x, known = rows.tensor_split([self.width], 2)
        known = known.unflatten(2, (config.others + 1, -1))
        drop = self.drop(config.dropout)
        own = mixed(gate(w["gate"], x), own_experts(w, "expert", len(config.expert), x, drop))
        attention = w["attention"].softmax(1)[:, None, :].expand(*x.shape[:2], -1)
        read = torch.cat([known[:, :, 0], own, mixed(attention, known[:, :, 1:])], 2)
        return self.tower(read)
