"""UFIN's options; defaults are the paper's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from data_shards.errors import UserError
from data_shards.schema import Field
from models.interactions import INTERACTIONS
from models.method import Needs
from models.semantic_experts import ACTIVATIONS


@dataclass(frozen=True)
class UFINConfig(Needs):
    """The `[method]` section of a run file."""

    name: Literal["ufin"] = "ufin"
    experts: int = 7
    """L, of either kind; the paper has as many as domains."""
    semantic: bool = True
    """Whether experts read the text vector (Eq. 3-4); off: z = s."""
    semantic_width: int = 0
    """Hidden units of a semantic expert; 0: it is one square layer, as Eq. 3 has it."""
    activation: Literal["relu", "none"] = "relu"
    """sigma of Eq. 3, which the paper does not name; none, as in the released code."""
    anonymous: bool = True
    """Whether anonymous fields join the text (Eq. 5), if the schema has any."""
    universal: int = 7
    """n_u, universal features (Eq. 6); 0: an MLP reads the latent vector in their place."""
    dim: int = 16
    """d of a universal feature"""
    interaction: Literal["euler", "mlp", "autoint", "cin", "cross"] = "euler"
    """What an interaction expert is (Figure 3b)."""
    orders: int = 7
    """Order vectors of an Euler expert and of an Euler adaptor"""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Of an MLP, with `dropout`"""
    dropout: float = 0.2
    depth: int = 2
    """Layers of autoint, cin and cross"""
    width: int = 40
    """Of one of AutoInt's two heads, or the feature maps of CIN"""
    top: int = 5
    """K interaction experts that answer for a row (Eq. 9)"""
    renormalise: bool = False
    """Whether their K weights are scaled to sum 1; the paper's are not."""
    distill: float = 1.0
    """Weight of the mean squared gap between a teacher's logit and zeta (Eq. 12); 0: none"""
    adaptor: Literal["linear", "euler", "none"] = "linear"
    mix: float = 1.0
    """Of zeta where a feature adaptor's logit joins it (Eq. 11); the released code has 0.4."""
    alpha: int = 0
    """Low-rank matrices of each domain on decoder and semantic experts, of rank
    max(d_out / alpha, 1) as in MLoRA, d_out of one expert; 0: none, as in the paper."""

    text: ClassVar[bool] = True
    teacher: ClassVar[bool] = True

    def reads(self, field: Field) -> bool:
        return self.anonymous and field.kind == "anonymous"

    def __post_init__(self) -> None:
        for key, value, known in (
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("interaction", self.interaction, tuple(INTERACTIONS)),
            ("adaptor", self.adaptor, ("linear", "euler", "none")),
        ):
            if value not in known:
                raise UserError(f"method.{key}: unknown {value!r}; there are: {', '.join(known)}")
        for key in ("experts", "dim", "orders", "depth", "width"):
            _require(key, getattr(self, key), 1)
        for key in ("semantic_width", "universal", "distill", "alpha"):
            _require(key, getattr(self, key), 0)
        _require("hidden", min(self.hidden, default=0), 1)
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is 0 to below 1, not {self.dropout}")
        if not 1 <= self.top <= self.experts:
            raise UserError(
                f"method.top: {self.top} of {self.experts} interaction experts cannot answer for "
                "a row; set it to 1 or more, and method.experts at most"
            )


def _require(key: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"method.{key} is {least} or more, not {value}")
