"""Vectors and prompts become a click probability per row. Single-device code: no rank, no mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.backbones import BackboneConfig, Inputs
from models.encoder import EncoderConfig
from models.method import Features, Method, Seen, Tokens
from models.mlora import MLoRA, MLoRAConfig
from models.shared_bottom import SharedBottom, SharedBottomConfig
from models.ufin import UFIN
from models.ufin_config import UFINConfig
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
    ids: int = 0
    """All id fields; `inputs.fields` are those that the shared part reads."""


MethodConfig = MLoRAConfig | UniCTRConfig | UFINConfig | SharedBottomConfig
# Any: each takes its own config
METHODS: dict[str, Callable[[Any, Parts], Method]] = {
    "mlora": lambda config, parts: MLoRA(parts.inputs, parts.backbone, config),
    "unictr": lambda config, parts: UniCTR(parts.inputs, parts.encoder, config, parts.seed),
    "ufin": lambda config, parts: UFIN(parts.inputs, parts.text_width, parts.ids, config),
    "shared_bottom": lambda config, parts: SharedBottom(parts.inputs, config, parts.seed),
}

__all__ = [
    "METHODS",
    "UFIN",
    "EncoderConfig",
    "Features",
    "MLoRA",
    "MLoRAConfig",
    "Method",
    "MethodConfig",
    "Parts",
    "Seen",
    "SharedBottom",
    "SharedBottomConfig",
    "Tokens",
    "UFINConfig",
    "UniCTR",
    "UniCTRConfig",
]
