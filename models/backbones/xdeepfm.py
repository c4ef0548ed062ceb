"""xDeepFM (Lian et al., 2018): first order + compressed interaction network + MLP."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.interactions import CINExperts, ExpertShape
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class XDeepFMConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["xdeepfm"] = "xdeepfm"
    depth: int = 3
    """Layers of the compressed interaction network."""
    width: int = 100
    """Feature maps of each; the paper has 100, and 200 on Criteo."""


class XDeepFM(Backbone):
    """logit = sum_i w_i + w . CIN([e_1, ..., e_F]) + w' . MLP([e_1, ..., e_F, numbers])."""

    first_order = True

    def __init__(self, inputs: Inputs, config: XDeepFMConfig) -> None:
        super().__init__(inputs, config)
        self.cin = CINExperts(
            ExpertShape(
                fields=inputs.fields, dim=inputs.dim, depth=config.depth, width=config.width
            )
        )
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        deep = self.out(self.deep(flat(emb_BFD, numbers), slot))
        return first_BF.sum(1) + (self.cin(emb_BFD) + deep).squeeze(1)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
