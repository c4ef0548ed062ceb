"""AESM2 (Zou et al., 2022): of shared experts, each domain picks those that seem its own and those
that seem everybody's."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from models.backbones import Inputs
from models.layers import linear
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Weights, mixed, tower


@dataclass(frozen=True)
class AESM2Config(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["aesm2"] = "aesm2"
    layers: int = 2
    experts: int = 8
    expert: tuple[int, ...] = (128,)
    specific: int = 2
    """Experts that a row takes as its domain's own."""
    common: int = 2
    """Experts that it takes as everybody's."""
    auxiliary: float = 0.01
    """Weight of the two divergences in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.specific, self.common) > self.experts:
            raise UserError(
                f"method: specific = {self.specific} and common = {self.common} pick among "
                f"{self.experts} experts; neither may be more"
            )


class AESM2(MultiDomain):
    """At each layer an expert k has a distribution p_k over domains. The experts with the least
    KL(one-hot_t || p_k) and those with the least KL(uniform || p_k) are picked; the next input is
    their sum by softmax(W_t x) over them. The loss has the mean divergence of those picked.

    p_k is the paper's over all domains; here it is over two, the row's own (by W_t x) and the rest
    (by W_0 x of the shared part), so that no domain's pick depends on those that come and go. Its
    noise in training is left out. A domain's part: W_t of each layer, and its tower.
    """

    def __init__(self, inputs: Inputs, config: AESM2Config, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.d_in = [self.width, *[config.expert[-1]] * (config.layers - 1)]
        self.experts = nn.ModuleList(
            Experts(config.experts, d, config.expert, config.dropout) for d in self.d_in
        )
        self.rest = nn.ModuleList(linear(d, config.experts, bias=False) for d in self.d_in)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        config = self.config
        gates = {
            f"gate{i}": first.matrix(f"gate{i}", d, config.experts) for i, d in enumerate(self.d_in)
        }
        return {**gates, **first.mlp("tower", (config.expert[-1], *config.tower, 1))}

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        config, x = self.config, rows
        beside = torch.zeros_like(rows[:, :, 0])
        for i, (experts, rest) in enumerate(zip(self.experts, self.rest, strict=True)):
            own = torch.bmm(x, w[f"gate{i}"].mT)
            picked, divergence = self._pick(own, rest(x))
            share = own.masked_fill(~picked, -torch.inf).softmax(2)
            x, beside = mixed(share, experts(x)), beside + divergence
        logit = tower(w, "tower", len(config.tower), x, self.drop(config.dropout))
        return torch.stack([logit, config.auxiliary * beside], 2)

    def _pick(self, own: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the experts [T, R, K] are picked, and their mean divergences [T, R]."""
        config, log_2 = self.config, 0.6931471805599453
        log_own, log_rest = F.logsigmoid(own - rest), F.logsigmoid(rest - own)
        specific, common = -log_own, -log_2 - (log_own + log_rest) / 2
        picked, beside = torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(own[:, :, 0])
        for divergence, count in ((specific, config.specific), (common, config.common)):
            least, place = divergence.topk(count, 2, largest=False)
            picked, beside = picked.scatter(2, place, True), beside + least.mean(2)
        return picked, beside
