"""HMoE (Li et al., 2020): domains related in the feature space, and in the label space too."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Inputs
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Slots, Weights, gate, mixed, tower


@dataclass(frozen=True)
class HMoEConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["hmoe"] = "hmoe"
    experts: int = 8
    expert: tuple[int, ...] = (256, 128)
    others: int = 4
    """Towers of the shared part to which a domain relates its own."""


class HMoE(MultiDomain):
    """y_t = a_0 z_t + sum_m a_m stop(z_m), a = softmax(V_t x), where each z is an MMoE's answer.

    `stop` cuts the gradient: a domain listens to other towers and does not teach them. The paper's
    are those of all other domains; here they are the shared part's, and learn from every row
    through the general answer sum_m a_m z_m. A domain's part: V_t, and gate and tower of z_t.
    """

    def __init__(self, inputs: Inputs, config: HMoEConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.experts = Experts(config.experts, self.width, config.expert, config.dropout)
        each = [self._mmoe(First(seed, f"/{m}")) for m in range(config.others)]
        self.others = Slots({name: torch.stack([one[name] for one in each]) for name in each[0]})
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        relation = first.matrix("relation", self.width, self.config.others + 1)
        return {"relation": relation, **self._mmoe(first)}

    def first_general(self, first: First) -> dict[str, Tensor]:
        return {"relation": first.matrix("relation", self.width, self.config.others)}

    def prepare(self, x: Tensor) -> Tensor:
        """A row, what the experts make of it, and the other towers' answers."""
        rows, others = torch.cat([x, self.experts(x).flatten(1)], 1), self.config.others
        answers = self._answer(
            rows.expand(others, -1, -1), self.others(torch.arange(others, device=x.device))
        )
        return torch.cat([rows, answers.T], 1)

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        known, others = rows.tensor_split([-self.config.others], 2)
        answers = torch.cat([self._answer(known, w).unsqueeze(2), others.detach()], 2)
        return (gate(w["relation"], rows[:, :, : self.width]) * answers).sum(2)

    def score_general(self, rows: Tensor, w: Weights) -> Tensor:
        others = rows[:, :, -self.config.others :]
        return (gate(w["relation"], rows[:, :, : self.width]) * others).sum(2)

    def _mmoe(self, first: First) -> dict[str, Tensor]:
        own_gate = {"gate": first.matrix("gate", self.width, self.config.experts)}
        return {**own_gate, **first.mlp("tower", (self.experts.d_out, *self.config.tower, 1))}

    def _answer(self, rows: Tensor, w: Weights) -> Tensor:
        config = self.config
        x, experts = rows.tensor_split([self.width], 2)
        read = mixed(gate(w["gate"], x), experts.unflatten(2, (config.experts, -1)))
        return tower(w, "tower", len(config.tower), read, self.drop(config.dropout))
