"""AutoInt+ (Song et al., 2019): self-attention among the fields, beside an MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.adapters import DomainLinear
from models.backbones.backbone import DeepConfig, Inputs, VectorBackbone
from models.interactions import AutoIntExperts, ExpertShape
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class AutoIntConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["autoint"] = "autoint"
    depth: int = 3
    """Layers of attention."""
    width: int = 16
    """Of each of the two heads."""


class AutoInt(VectorBackbone):
    """logit = w . attention([e_1, ..., e_F]) (Eq. 5-8) + w' . MLP([e_1, ..., e_F, numbers])."""

    def __init__(self, inputs: Inputs, config: AutoIntConfig) -> None:
        super().__init__(inputs, config)
        self.attention = AutoIntExperts(
            ExpertShape(
                fields=inputs.fields, dim=inputs.dim, depth=config.depth, width=config.width
            )
        )
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        deep = self.out(self.deep(flat(emb_BFD, numbers), slot))
        return (self.attention(emb_BFD) + deep).squeeze(1)

    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        attended = self.attention.attended(emb_BFD).squeeze(0)
        return torch.cat([attended, self.deep(flat(emb_BFD, numbers), slot)], 1)

    def outputs(self) -> list[nn.Module]:
        return [self.attention.out, self.out]

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
