"""Multi-domain baselines, one file each. A new one is a file, and a line in `BaselineConfig` and
`BASELINES`."""

from typing import Any, Protocol

from models.backbones import Inputs
from models.multi_domain.aesm2 import AESM2, AESM2Config
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.dffm import DFFM, DFFMConfig
from models.multi_domain.hinet import HiNet, HiNetConfig
from models.multi_domain.hmoe import HMoE, HMoEConfig
from models.multi_domain.mmoe import MMoE, MMoEConfig
from models.multi_domain.pepnet import PEPNet, PEPNetConfig
from models.multi_domain.ple import PLE, PLEConfig
from models.multi_domain.shared_bottom import SharedBottom, SharedBottomConfig
from models.multi_domain.star import STAR, STARConfig


class Baseline(Protocol):
    """How a baseline is built; each takes its own config."""

    def __call__(self, inputs: Inputs, config: Any, seed: int) -> MultiDomain: ...


BaselineConfig = (
    SharedBottomConfig
    | MMoEConfig
    | PLEConfig
    | HMoEConfig
    | AESM2Config
    | STARConfig
    | PEPNetConfig
    | DFFMConfig
    | HiNetConfig
)
BASELINES: dict[str, Baseline] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "hmoe": HMoE,
    "aesm2": AESM2,
    "star": STAR,
    "pepnet": PEPNet,
    "dffm": DFFM,
    "hinet": HiNet,
}

__all__ = [
    "AESM2",
    "AESM2Config",
    "BASELINES",
    "BaselineConfig",
    "DFFM",
    "DFFMConfig",
    "HMoE",
    "HMoEConfig",
    "HiNet",
    "HiNetConfig",
    "MMoE",
    "MMoEConfig",
    "MultiDomain",
    "MultiDomainConfig",
    "PEPNet",
    "PEPNetConfig",
    "PLE",
    "PLEConfig",
    "STAR",
    "STARConfig",
    "SharedBottom",
    "SharedBottomConfig",
]
