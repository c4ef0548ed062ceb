"""The plain multi-layer perceptron over all embeddings."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.adapters import DomainLinear
from models.backbones.backbone import DeepConfig, Inputs, VectorBackbone
from models.layers import MLP, flat, output_layer


@dataclass(frozen=True)
class MLPConfig(DeepConfig):
    """The `[backbone]` section of a run file."""

    name: Literal["mlp"] = "mlp"


class MLPBackbone(VectorBackbone):
    """logit = w . MLP([e_1, ..., e_F, numbers])."""

    def __init__(self, inputs: Inputs, config: MLPConfig) -> None:
        super().__init__(inputs, config)
        self.deep = MLP(inputs.fields * inputs.dim + inputs.numbers, config.hidden, config.dropout)
        self.out = output_layer(self.deep.d_out)

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        return self.out(self.vector(emb_BFD, first_BF, numbers, slot)).squeeze(1)

    def vector(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        return self.deep(flat(emb_BFD, numbers), slot)

    def adaptable(self) -> dict[str, DomainLinear]:
        return self.deep.adaptable()
