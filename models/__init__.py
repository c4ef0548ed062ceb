"""Vectors and prompts become a click probability per row. Single-device code: no rank, no mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.backbones import BackboneConfig, Inputs
from models.ctrl import CTRL, CTRLConfig
from models.encoder import EncoderConfig
from models.method import Features, Method, Seen, Tokens
from models.mlora import MLoRA, MLoRAConfig
from models.multi_domain import BASELINES, Baseline, BaselineConfig
from models.p5 import P5, P5Config
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


def _built_by(baseline: Baseline) -> Callable[[Any, Parts], Method]:
    return lambda config, parts: baseline(parts.inputs, config, parts.seed)


MethodConfig = MLoRAConfig | UniCTRConfig | UFINConfig | CTRLConfig | P5Config | BaselineConfig
# Any: each takes its own config
METHODS: dict[str, Callable[[Any, Parts], Method]] = {
    "mlora": lambda config, parts: MLoRA(parts.inputs, parts.backbone, config),
    "unictr": lambda config, parts: UniCTR(parts.inputs, parts.encoder, config, parts.seed),
    "ufin": lambda config, parts: UFIN(parts.inputs, parts.text_width, parts.ids, config),
    "ctrl": lambda config, parts: CTRL(parts.inputs, parts.backbone, parts.text_width, config),
    "p5": lambda config, parts: P5(parts.encoder, parts.seed),
    **{name: _built_by(baseline) for name, baseline in BASELINES.items()},
}

__all__ = [
    "CTRL",
    "METHODS",
    "P5",
    "UFIN",
    "CTRLConfig",
    "EncoderConfig",
    "Features",
    "MLoRA",
    "MLoRAConfig",
    "Method",
    "MethodConfig",
    "P5Config",
    "Parts",
    "Seen",
    "Tokens",
    "UFINConfig",
    "UniCTR",
    "UniCTRConfig",
]
