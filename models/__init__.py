"""Vectors and prompts become a click probability per row. Single-device code: no rank, no mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.backbones import BackboneConfig, Inputs
from models.encoder import EncoderConfig
from models.method import Features, Method, Tokens
from models.mlora import MLoRA, MLoRAConfig
from models.shared_bottom import SharedBottom, SharedBottomConfig
from models.unictr import UniCTR, UniCTRConfig


@dataclass(frozen=True)
class Parts:
    """What a run offers a method to build itself from."""

    inputs: Inputs
    backbone: BackboneConfig
    encoder: EncoderConfig
    seed: int
    text_width: int = 0
    """Floats of a row's text vector; 0: the run has none."""
    anonymous: tuple[int, ...] = ()
    """Places of the anonymous fields among the `inputs.fields`."""


MethodConfig = MLoRAConfig | UniCTRConfig | SharedBottomConfig
# Any: each takes its own config
METHODS: dict[str, Callable[[Any, Parts], Method]] = {
    "mlora": lambda config, parts: MLoRA(parts.inputs, parts.backbone, config),
    "unictr": lambda config, parts: UniCTR(parts.inputs, parts.encoder, config, parts.seed),
    "shared_bottom": lambda config, parts: SharedBottom(parts.inputs, config, parts.seed),
}

__all__ = [
    "METHODS",
    "EncoderConfig",
    "Features",
    "MLoRA",
    "MLoRAConfig",
    "Method",
    "MethodConfig",
    "Parts",
    "SharedBottom",
    "SharedBottomConfig",
    "Tokens",
    "UniCTR",
    "UniCTRConfig",
]
