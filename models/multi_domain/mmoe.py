"""MMoE (Ma et al., 2018): experts that all domains share, mixed and read by each in its own way."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Inputs
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Weights, gate, mixed, tower


@dataclass(frozen=True)
class MMoEConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["mmoe"] = "mmoe"
    experts: int = 8
    expert: tuple[int, ...] = (256, 128)


class MMoE(MultiDomain):
    """y_t = h_t(sum_k g_t,k f_k(x)), g_t = softmax(W_t x) (Eq. 5-7). A domain's part: W_t, h_t."""

    def __init__(self, inputs: Inputs, config: MMoEConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.experts = Experts(config.experts, self.width, config.expert, config.dropout)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        config = self.config
        own_gate = {"gate": first.matrix("gate", self.width, config.experts)}
        return {**own_gate, **first.mlp("tower", (self.experts.d_out, *config.tower, 1))}

    def prepare(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.experts(x).flatten(1)], 1)

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        config = self.config
        x, experts = rows.tensor_split([self.width], 2)
        read = mixed(gate(w["gate"], x), experts.unflatten(2, (config.experts, -1)))
        return tower(w, "tower", len(config.tower), read, self.drop(config.dropout))
