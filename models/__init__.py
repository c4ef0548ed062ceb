"""Vectors become one click probability per row. Single-device code: no rank, no mesh."""

from models.method import Method
from models.mlora import MLoRA, MLoRAConfig

METHODS = {"mlora": MLoRA}

__all__ = ["METHODS", "MLoRA", "MLoRAConfig", "Method"]
