"""SharedBottom (Ruder, 2017): one bottom for all domains and a tower for each, y_t = h_t(f(x)); a
multi-domain baseline of many papers (Ma et al., 2018, Eq. 1)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.backbones import Inputs
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import Experts, First, Weights, tower


@dataclass(frozen=True)
class SharedBottomConfig(MultiDomainConfig):
    """The `[method]` section of a run file. Defaults: MLoRA's MLP, cut before its end."""

    name: Literal["shared_bottom"] = "shared_bottom"
    bottom: tuple[int, ...] = (256, 128)


class SharedBottom(MultiDomain):
    """A domain's part is its tower."""

    def __init__(self, inputs: Inputs, config: SharedBottomConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.bottom = Experts(1, self.width, config.bottom, config.dropout)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        return first.mlp("tower", (self.bottom.d_out, *self.config.tower, 1))

    def prepare(self, x: Tensor) -> Tensor:
        return self.bottom(x).squeeze(1)

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        config = self.config
        return tower(w, "tower", len(config.tower), rows, self.drop(config.dropout))
