"""MLoRA (Yang et al., 2024): any backbone, with low-rank matrices of each domain on its layers.

Phase 1 trains the backbone (and the tables); phase 2 freezes it and trains A_t and B_t of one
domain t. The released code differs: one phase, and a bias b_t per domain and layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from data_shards.errors import UserError
from models.adapters import AdapterShape, generator_for
from models.backbones import BACKBONES, Backbone, BackboneConfig, Inputs
from models.method import Features, Method, Needs, cross_entropy


@dataclass(frozen=True)
class LowRankConfig(Needs):
    """What a domain's low-rank matrices are like."""

    alpha: int = 32
    """Temperature: rank r = max(d_out / alpha, 1) of each layer (Eq. 10)."""
    bias: bool = False
    """A bias per domain and layer, as in the released code; the paper's Eq. 9 has none."""
    dropout: float = 0.0
    """On the low-rank branch's input, as in LoRA; neither paper nor code has it."""
    init_std: float = 0.0
    """Of the Gaussian A; 0 takes Glorot's, as the released code does. The paper gives none."""
    layers: tuple[str, ...] = ()
    """Names of the adapted layers; none named: every adaptable layer of the backbone."""


@dataclass(frozen=True)
class MLoRAConfig(LowRankConfig):
    """The `[method]` section of a run file."""

    name: Literal["mlora"] = "mlora"


class MLoRA(Method):
    """h_t = W x + B_t A_t x (+ b_t) on each adapted layer (Eq. 9)."""

    def __init__(self, inputs: Inputs, backbone: BackboneConfig, config: LowRankConfig) -> None:
        super().__init__()
        self.dim = inputs.dim
        self.config = config
        self.domains: list[str] = []
        self.backbone: Backbone = build_backbone(inputs, backbone)
        offered = self.backbone.adaptable()
        self._adapted = {name: offered[name] for name in _targets(config.layers, list(offered))}

    def forward(self, features: Features) -> Tensor:
        """[B, 1]."""
        return self.backbone(*self.read(features)).unsqueeze(1)

    def read(self, features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the backbone reads; a table's row is `dim` floats and then a first-order weight."""
        embedded, numbers, slot = features.embedded, features.numbers, features.slot
        first = embedded[:, :, self.dim] if self.backbone.first_order else embedded[:, :0, 0]
        return embedded[:, :, : self.dim], first, numbers, slot

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Binary cross entropy; summed over ranks it is the mean over the global batch."""
        return cross_entropy(logit[:, 0], label, weight) / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        own = {id(p) for p in self.adapter_parameters()}
        found = {name: p.data for name, p in self.named_parameters() if id(p) not in own}
        return {**found, **dict(self.named_buffers())}

    def adapter(self, domain: str) -> dict[str, Tensor]:
        slot = self.slot_of(domain)
        return {
            f"{name}.{part}": tensor
            for name, layer in self._adapted.items()
            for part, tensor in layer.own(slot).items()
        }

    def diagnose(self) -> str | None:
        return self.backbone.diagnose()

    def shared_parameters(self) -> list[nn.Parameter]:
        own = {id(p) for p in self.adapter_parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def adapter_parameters(self) -> list[nn.Parameter]:
        layers = [layer.low_rank for layer in self._adapted.values() if layer.low_rank]
        return [p for layer in layers for p in layer.parameters()]

    def add_domain(self, domain: str, seed: int) -> None:
        self.require_new(domain)
        config = self.config
        for name, layer in self._adapted.items():
            rank = max(layer.linear.out_features // config.alpha, 1)
            shape = AdapterShape(rank, config.bias, config.dropout, config.init_std)
            layer.append(shape, generator_for(seed, domain, name))
        self.domains.append(domain)

    def remove_domain(self, domain: str) -> None:
        slot = self.slot_of(domain)
        for layer in self._adapted.values():
            layer.remove(slot)
        self.domains.remove(domain)


def build_backbone(inputs: Inputs, config: BackboneConfig) -> Backbone:
    """The backbone that the run file names, with first weights from torch's generator."""
    return BACKBONES[config.name](inputs, config)


def _targets(wanted: Sequence[str], offered: list[str]) -> Sequence[str]:
    unknown = [name for name in wanted if name not in offered]
    if unknown:
        raise UserError(
            f"method.layers: this backbone has no layer {unknown[0]!r}; it has {', '.join(offered)}"
        )
    return wanted or offered
