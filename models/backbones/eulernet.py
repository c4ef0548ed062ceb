"""EulerNet (Tian et al., 2023): interactions of learned orders, in the complex plane."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from models.adapters import DomainLinear
from models.backbones.backbone import Backbone, Inputs
from models.euler import EulerLayer, full_precision, overflow, precise
from models.layers import output_layer


@dataclass(frozen=True)
class EulerNetConfig:
    """The `[backbone]` section of a run file. Defaults: as its authors have it on MovieLens."""

    name: Literal["eulernet"] = "eulernet"
    orders: tuple[int, ...] = (7,)
    """Order vectors of each layer."""
    explicit_dropout: float = 0.3
    implicit_dropout: float = 0.3
    layer_norm: bool = False


class EulerNet(Backbone):
    """Vectors are phases, with a learned modulus per field; then Euler layers; real and imaginary
    parts of the last one to a logit each, by the same weights, and summed.

    A number x_k is a field too: its vector is x_k times a learned one, as in FuxiCTR. The paper
    has no numbers.
    """

    def __init__(self, inputs: Inputs, config: EulerNetConfig) -> None:
        super().__init__(inputs, config)
        _require_sane(config)
        fields = [inputs.fields + inputs.numbers, *config.orders]
        self.mu = nn.Parameter(torch.ones(fields[0]))
        unit = torch.randn(inputs.numbers, inputs.dim) * 0.01
        self.unit = nn.Parameter(unit) if inputs.numbers else None
        self.layers = nn.ModuleList(
            EulerLayer(a, inputs.dim, b, config.layer_norm)
            for a, b in zip(fields, fields[1:], strict=False)
        )
        self.out = output_layer(inputs.dim * fields[-1])
        self.dropouts = config.explicit_dropout, config.implicit_dropout

    def forward(self, emb_BFD: Tensor, first_BF: Tensor, numbers: Tensor, slot: Tensor) -> Tensor:
        with full_precision(emb_BFD.device.type):
            of_numbers = [] if self.unit is None else [numbers.unsqueeze(2) * self.unit]
            phase_BDF = precise(torch.cat([emb_BFD, *of_numbers], 1)).mT
            mu = precise(self.mu)
            x_2BDF = torch.stack([mu * phase_BDF.cos(), mu * phase_BDF.sin()])
            for layer in self.layers:
                x_2BDF = layer(x_2BDF, slot, *self.dropouts)
            real, imag = x_2BDF.flatten(2).to(self.mu.dtype)
            return (self.out(real) + self.out(imag)).squeeze(1)

    def diagnose(self) -> str | None:
        """Of the first layer; in others a modulus, and so an overflow, is a row's own."""
        first = self.layers[0]
        assert isinstance(first, EulerLayer)
        found = overflow(self.mu, first.orders, first.log_bias)
        return found and (
            f"order {found.order:.3g} of field {found.field} (counted from 0, numbers last; its "
            f"modulus is {found.modulus:.3g}) overflows in order vector {found.vector}; lower the "
            "learning rates, or raise weight_decay"
        )

    def adaptable(self) -> dict[str, DomainLinear]:
        layers = [layer.implicit for layer in self.layers if isinstance(layer, EulerLayer)]
        return {f"implicit{i}": layer for i, layer in enumerate(layers)}


def _require_sane(config: EulerNetConfig) -> None:
    if not config.orders or min(config.orders) < 1:
        raise UserError(
            "backbone.orders: order vectors of each layer, 1 or more, such as [7]; not "
            f"{list(config.orders)}"
        )
    for key, value in (
        ("explicit_dropout", config.explicit_dropout),
        ("implicit_dropout", config.implicit_dropout),
    ):
        if not 0 <= value < 1:
            raise UserError(f"backbone.{key} is 0 to below 1, not {value}")
