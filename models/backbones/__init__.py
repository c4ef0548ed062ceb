"""CTR interaction networks, one file each. A new one is a file, and a line in `BackboneConfig` and
`BACKBONES`."""

from models.backbones.afm import AFM, AFMConfig
from models.backbones.autoint import AutoInt, AutoIntConfig
from models.backbones.backbone import Backbone, DeepConfig, Inputs
from models.backbones.dcn import DCN, DCNConfig
from models.backbones.dcnv2 import DCNv2, DCNv2Config
from models.backbones.deepfm import DeepFM, DeepFMConfig
from models.backbones.eulernet import EulerNet, EulerNetConfig
from models.backbones.fibinet import FiBiNET, FiBiNETConfig
from models.backbones.inttower import IntTower, IntTowerConfig
from models.backbones.mlp import MLPBackbone, MLPConfig
from models.backbones.nfm import NFM, NFMConfig
from models.backbones.pnn import PNN, PNNConfig
from models.backbones.wide_deep import WideDeep, WideDeepConfig
from models.backbones.xdeepfm import XDeepFM, XDeepFMConfig

BackboneConfig = (
    MLPConfig
    | WideDeepConfig
    | NFMConfig
    | AFMConfig
    | AutoIntConfig
    | PNNConfig
    | DCNConfig
    | DCNv2Config
    | FiBiNETConfig
    | DeepFMConfig
    | XDeepFMConfig
    | EulerNetConfig
    | IntTowerConfig
)
BACKBONES: dict[str, type[Backbone]] = {
    "mlp": MLPBackbone,
    "wide_deep": WideDeep,
    "nfm": NFM,
    "afm": AFM,
    "autoint": AutoInt,
    "pnn": PNN,
    "dcn": DCN,
    "dcnv2": DCNv2,
    "fibinet": FiBiNET,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "eulernet": EulerNet,
    "inttower": IntTower,
}

__all__ = [
    "AFMConfig",
    "AutoIntConfig",
    "BACKBONES",
    "Backbone",
    "BackboneConfig",
    "DCNConfig",
    "DCNv2Config",
    "DeepConfig",
    "DeepFMConfig",
    "EulerNetConfig",
    "FiBiNETConfig",
    "Inputs",
    "IntTowerConfig",
    "MLPConfig",
    "NFMConfig",
    "PNNConfig",
    "WideDeepConfig",
    "XDeepFMConfig",
]
