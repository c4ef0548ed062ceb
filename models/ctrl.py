"""CTRL (Li et al., 2023): a backbone whose vectors of rows are first drawn to those of their texts.

The stage before phase 1 (`[align]`) is its cross-modal knowledge alignment (4.2); phase 1 is its
supervised fine-tuning (4.3) of the backbone alone, which then has neither texts nor anything of the
first stage, and is served as any other. The paper knows no domains: its model is the shared part.
Phase 2 adds low-rank matrices of each domain, as for MLoRA.

What differs from the paper, and why:
- the encoder is frozen and its vectors lie on the disk, where the paper trains it too (though a
  ChatGLM frozen but for its last layer served best there): an encoder in each step of thousands of
  rows is what `cache-text` is there to avoid. W^text and what follows it learn;
- LayerNorm of the summed states stands for their mean;
- a row is contrasted with the others of its `group` rather than of the whole batch, so that any
  number of ranks learns the same;
- no batch norm, which mixes rows.
How many sub-spaces there are, and how wide they are, the paper does not tell.

A row's prediction never depends on its batch; the loss of the first stage does, by its meaning.

Shapes: B rows, d floats of the backbone's vector, V of a text's, M sub-spaces of w floats, G groups
of g rows.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import UserError
from models.backbones import BACKBONES, BackboneConfig, Inputs
from models.backbones.backbone import VectorBackbone
from models.layers import linear, output_layer
from models.method import Features, cross_entropy
from models.mlora import LowRankConfig, MLoRA


@dataclass(frozen=True)
class CTRLConfig(LowRankConfig):
    """The `[method]` section of a run file; low-rank matrices as in MLoRA's."""

    name: Literal["ctrl"] = "ctrl"
    width: int = 128
    """Of h^tab and h^text, and of all their sub-spaces together"""
    spaces: int = 4
    """M"""
    temperature: float = 0.7
    """tau"""
    group: int = 512
    """g, a divisor of a rank's rows of a batch. The paper contrasts 6,400, and finds that more are
    better."""

    aligns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.width, self.spaces) < 1 or self.width % self.spaces:
            raise UserError(
                f"method.spaces: {self.spaces} sub-spaces do not divide method.width = "
                f"{self.width}; give a divisor of it"
            )
        if self.group < 2:
            raise UserError(f"method.group is 2 or more, not {self.group}: one row has no other")
        if self.temperature <= 0:
            raise UserError(f"method.temperature is above 0, not {self.temperature}")


class Alignment(nn.Module):
    """What the first stage alone has: projections, and a probe of how well labels can be read off
    the vectors, to which they are blind."""

    def __init__(self, vector: int, text: int, width: int) -> None:
        super().__init__()
        self.text_width = text
        self.tab = nn.Sequential(linear(vector, width), linear(width, width))
        self.text = nn.Sequential(linear(text, width), linear(width, width))
        self.probe = output_layer(vector)

    def forward(self, vector_Bd: Tensor, text_BV: Tensor) -> Tensor:
        """[B, 1 + 2 M w]: the probe's logit; h^tab_m of all m, and h^text_m, from h^tab = W^tab x +
        b^tab (4.2.1) and h^tab_m = W^tab_m h^tab + b^tab_m (4.2.2), and so of the text."""
        text = F.layer_norm(text_BV, (self.text_width,))
        return torch.cat(
            [self.probe(vector_Bd.detach()), self.tab(vector_Bd), self.text(text)], dim=1
        )


class CTRL(MLoRA):
    """In a trunk that has text vectors the first stage, whose logit is the probe's; in any other
    the backbone as phase 1 and all that follows know it."""

    def __init__(
        self, inputs: Inputs, backbone: BackboneConfig, text: int, config: CTRLConfig
    ) -> None:
        """`text`: V, 0 for none."""
        super().__init__(inputs, backbone, config)
        if not isinstance(self.backbone, VectorBackbone):
            known = [name for name, one in BACKBONES.items() if issubclass(one, VectorBackbone)]
            raise UserError(
                f"backbone.name: method ctrl draws vectors to texts, and {backbone.name} has no "
                f"vector of a row before its logit; there are: {', '.join(known)}"
            )
        self.settings = config
        self.alignment = Alignment(self._width(inputs), text, config.width) if text else None

    @property
    def tower(self) -> VectorBackbone:
        """M_col"""
        assert isinstance(self.backbone, VectorBackbone)
        return self.backbone

    def forward(self, features: Features) -> Tensor:
        """[B, 1], in the first stage as `Alignment` gives them."""
        if self.alignment is None:
            return super().forward(features)
        assert features.text is not None, "a trunk with text vectors gives them to each row"
        return self.alignment(self.tower.vector(*self.read(features)), features.text)

    def loss(self, logit: Tensor, label: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Cross entropy (4.3) as a mean over rows; in the first stage L_ccl (4.2.1), and the
        probe's cross entropy."""
        if self.alignment is None:
            return super().loss(logit, label, weight, rows)
        config = self.settings
        if len(logit) % config.group:
            raise UserError(
                f"method.group: {config.group} rows are contrasted with one another, and a rank "
                f"has {len(logit)} of a batch; give a divisor of that"
            )
        h_B2Mw = logit[:, 1:].unflatten(1, (2, config.spaces, -1))
        tab, text = h_B2Mw.unflatten(0, (-1, config.group)).unbind(2)
        of_rows = contrast(tab, text, weight.view(-1, config.group), config.temperature)
        return (of_rows.sum() + cross_entropy(logit[:, 0], label, weight)) / max(rows, 1)

    def shared(self) -> dict[str, Tensor]:
        idle = self.frozen()
        return {name: tensor for name, tensor in super().shared().items() if name not in idle}

    def frozen(self) -> dict[str, Tensor]:
        """In the first stage the backbone's last layers: phase 1 finds them random."""
        idle = self._idle()
        return {name: p.data for name, p in self.named_parameters() if id(p) in idle}

    def shared_parameters(self) -> list[nn.Parameter]:
        idle = self._idle()
        return [p for p in super().shared_parameters() if id(p) not in idle]

    def _idle(self) -> set[int]:
        layers = self.tower.outputs() if self.alignment else []
        return {id(p) for layer in layers for p in layer.parameters()}

    @torch.no_grad()
    def _width(self, inputs: Inputs) -> int:
        """d"""
        emb, numbers = torch.zeros(1, inputs.fields, inputs.dim), torch.zeros(1, inputs.numbers)
        first = torch.zeros(1, inputs.fields if self.tower.first_order else 0)
        return self.tower.vector(emb, first, numbers, torch.full((1,), -1)).shape[1]


def contrast(tab: Tensor, text: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """L_ccl (4.2.1) of each row [G, g], times its weight, for [G, g, M, w] of both kinds; a row of
    weight 0 is padding, and no other row's negative.

    sim(h_i, h_j) = sum_m max_m' <h_i,m, h_j,m'> (4.2.2): who looks at whom makes a difference.
    """
    products = torch.einsum("gimw,gjnw->gijmn", text, tab) / temperature
    itself = torch.eye(weight.shape[1], dtype=torch.bool, device=weight.device)
    hidden = (weight == 0).unsqueeze(1) & ~itself
    text_to_tab, tab_to_text = products.amax(4).sum(3), products.amax(3).sum(3).mT
    told = sum(
        sim.masked_fill(hidden, -torch.inf).log_softmax(2).diagonal(dim1=1, dim2=2)
        for sim in (text_to_tab, tab_to_text)
    )
    return -weight * told / 2
