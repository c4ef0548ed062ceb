"""The phases of a run, as its file describes them: which rows, how fast, until when."""

from dataclasses import dataclass, field
from typing import Annotated

import pydantic

from data_shards import UserError
from data_shards.errors import unknown
from models.backbones import BackboneConfig, EulerNetConfig
from trainer.metrics import METRICS


@dataclass(frozen=True)
class PhaseConfig:
    """`[pretrain]`: one phase's rows, its validation rows, and when it ends."""

    rows: tuple[str, ...] = ("train",)
    """Splits whose rows are trained on."""
    validate: tuple[str, ...] = ("valid",)
    """Splits whose rows decide when to stop."""
    lr: float = 1e-3
    """Of the dense part; tables have their own (`[tables]`)."""
    weight_decay: float = 0.0
    metric: str = "mean_auc"
    """mean_auc, wauc, auc, log_loss or auc/<domain>, on the validation rows."""
    patience: int = 5
    """Evaluations without a new best before the phase ends (MLoRA 4.3)."""
    max_epochs: int = 100
    evaluate_every: int = 0
    """Steps between evaluations; 0: once an epoch."""
    checkpoint_every: int = 0
    """Steps between checkpoints, beside those at each evaluation. `[adapt]` with 0 keeps none: a
    domain that was cut off begins anew."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS and not self.metric.startswith("auc/"):
            raise unknown("metric", self.metric, (*METRICS, "auc/<domain>"))
        if self.patience < 1:
            raise UserError(f"patience is 1 or more, not {self.patience}")


@dataclass(frozen=True)
class PretrainConfig(PhaseConfig):
    one_phase: bool = False
    """Train the adapters of all domains with the shared part, as MLoRA's released code does."""


@dataclass(frozen=True)
class AdaptConfig(PhaseConfig):
    """`[adapt]`: the second phase, for each domain on its own rows alone."""

    metric: str = "auc"
    own_ids: bool = False
    """Rows of its own for ids that only an added domain has; off in the papers."""
    own_ids_lr: float = 1e-3
    min_rows: int = 100
    """A domain with fewer training rows gets no adapter."""


@dataclass(frozen=True)
class AlignConfig(PhaseConfig):
    """`[align]`: before phase 1, vectors of rows are drawn to those of their texts (CTRL 4.2). Its
    metric is that of a probe, which reads labels off them. Defaults: CTRL 5.1.3 and 6.1."""

    rows: tuple[str, ...] = ()
    """Splits whose rows are trained on; none named: those of `[pretrain]`."""
    validate: tuple[str, ...] = ()
    """Likewise."""
    lr: float = 5e-4
    max_epochs: int = 1


@dataclass(frozen=True)
class TeacherConfig(PhaseConfig):
    """`[teacher]`: before phase 1, a network of each domain's own, whose logits the shared part
    learns from (UFIN II-D3). Its tables are as wide as the run's."""

    metric: str = "auc"
    backbone: Annotated[BackboneConfig, pydantic.Field(discriminator="name")] = field(
        default_factory=EulerNetConfig
    )
    without: tuple[str, ...] = ()
    """Domains that have no teacher, such as those of one class: nothing is distilled there."""
