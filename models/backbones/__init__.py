"""CTR interaction networks, one file each. A new one is a file and a line in `BACKBONES`."""

from models.backbones.backbone import Backbone, BackboneConfig, Inputs
from models.backbones.dcn import DCN
from models.backbones.deepfm import DeepFM
from models.backbones.eulernet import EulerNet
from models.backbones.mlp import MLPBackbone

BACKBONES: dict[str, type[Backbone]] = {
    "mlp": MLPBackbone,
    "deepfm": DeepFM,
    "dcn": DCN,
    "eulernet": EulerNet,
}

__all__ = ["BACKBONES", "Backbone", "BackboneConfig", "Inputs"]
