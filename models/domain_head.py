"""A network of Uni-CTR over the encoder's states: ladder, gate and tower (Eq. 7-12).

Shapes: n prompts, T tokens, D the encoder's width, W the ladder's, B rows. `mask_nT` is true on
tokens and false on padding, with a token in each prompt. Nothing mixes rows: no batch norm, and
attention runs along a prompt's own tokens (the released code's runs across the batch).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import generator_for
from models.dropout import dropout


@dataclass(frozen=True)
class HeadShape:
    """What a network over the encoder's states is like."""

    hidden: int
    blocks: int
    """Of the ladder, one for each tap; 0: no ladder."""
    width: int
    heads: int
    ladder_dropout: float
    combine: Literal["concat", "sum"]
    tower: tuple[int, ...]
    dropout: float
    beside: int
    """Floats of a row that join its pooled prompt before the tower."""


class SelfAttention(nn.Module):
    """Attention among the tokens of one prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.split = (3, heads, width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_nTW: Tensor, mask_nT: Tensor) -> Tensor:
        q, k, v = self.qkv(x_nTW).unflatten(2, self.split).permute(2, 0, 3, 1, 4)
        seen = v  # of no prompt, which cuDNN's and Flash's kernels refuse (pytorch#133780)
        if x_nTW.shape[0] > 0:  # `len` would fix the number in an export
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_nT[:, None, None, :])
        return self.out(seen.transpose(1, 2).flatten(2))


class LadderBlock(nn.Module):
    """ladder^l of Eq. 7, "a small transformer encoder block": down to W, attention, up to D."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        hidden, width = shape.hidden, shape.width
        self.down = nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, width))
        self.attention = SelfAttention(width, shape.heads)
        self.low_norm = nn.LayerNorm(width)
        self.up = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.dropout = shape.ladder_dropout

    def forward(self, x_nTD: Tensor, mask_nT: Tensor) -> Tensor:
        low = dropout(self.down(x_nTD), self.dropout, self.training)
        low = self.low_norm(low + self.attention(low, mask_nT))
        return self.norm(x_nTD + dropout(self.up(low), self.dropout, self.training))


class Ladder(nn.Module):
    """O^0 = ladder^0(h_0); O^l = ladder^l(h_{l f} + O^{l-1}) (Eq. 7)."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LadderBlock(shape) for _ in range(shape.blocks))

    def forward(self, taps: Sequence[Tensor], mask_nT: Tensor) -> Tensor:
        """[n, T, D] from the states h_0, h_f, h_2f, ... of the same shape, a block for each; none
        further is read."""
        out = self.blocks[0](taps[0], mask_nT)
        for i in range(1, len(self.blocks)):
            out = self.blocks[i](taps[i] + out, mask_nT)
        return out


class Gate(nn.Module):
    """Attention pooling (Eq. 9-11) with one query. It has no b_q, to which softmax is blind."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden, hidden)
        self.query = nn.Linear(hidden, 1, bias=False)

    def weights(self, o_nTD: Tensor, mask_nT: Tensor) -> Tensor:
        """A [n, T] (Eq. 9, 10), at least fp32: exactly 0 on padding, sum 1 over a prompt."""
        score = self.query(torch.tanh(self.key(o_nTD))).squeeze(2)
        precise = score.to(torch.promote_types(score.dtype, torch.float32))
        return precise.masked_fill(~mask_nT, -torch.inf).softmax(1)

    def forward(self, o_nTD: Tensor, mask_nT: Tensor) -> Tensor:
        """R = A^T O [n, D] (Eq. 11)."""
        weights = self.weights(o_nTD, mask_nT).to(o_nTD.dtype)
        return torch.bmm(weights.unsqueeze(1), o_nTD).squeeze(1)


class Tower(nn.Module):
    """An MLP with ReLU and then dropout, to one logit (Eq. 12)."""

    def __init__(self, d_in: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = [d_in, *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.out = nn.Linear(widths[-1], 1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B]."""
        for layer in self.layers:
            x = dropout(F.relu(layer(x)), self.dropout, self.training)
        return self.out(x).squeeze(1)


class DomainHead(nn.Module):
    """Ladder, gate and tower. Without a ladder (0 blocks) it pools the last layer alone, which is
    the paper's general network and its ablation "w/o ladder"."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.ladder = Ladder(shape) if shape.blocks else None
        self.gate = Gate(shape.hidden)
        self.tower = Tower(shape.hidden + shape.beside, shape.tower, shape.dropout)
        self.combine = shape.combine

    def forward(
        self, states: Sequence[Tensor], mask_nT: Tensor, prompt_B: Tensor, beside_BE: Tensor
    ) -> Tensor:
        """Logits [B]; see `pool` and `score`."""
        return self.score(self.pool(states, mask_nT), prompt_B, beside_BE)

    def pool(self, states: Sequence[Tensor], mask_nT: Tensor) -> Tensor:
        """R [n, D] from the taps and then the last state h_L, each [n, T, D]; h_L may be given
        once where it is the last tap too."""
        last = states[-1]
        if self.ladder is None:
            return self.gate(last, mask_nT)
        out = self.ladder(states, mask_nT)
        if self.combine == "sum":  # as released
            return self.gate(last + out, mask_nT)
        return self.gate(torch.cat([last, out], dim=1), torch.cat([mask_nT, mask_nT], 1))  # Eq. 8

    def score(self, pooled_nD: Tensor, prompt_B: Tensor, beside_BE: Tensor) -> Tensor:
        """Logits [B] of rows that have these of the n prompts, and floats of their own."""
        return self.tower(torch.cat([pooled_nD[prompt_B], beside_BE], dim=1))


def new_head(shape: HeadShape, seed: int, owner: str) -> DomainHead:
    """A head with first weights that are a pure function of (seed, owner, layer), drawn apart
    from torch's own generator; Glorot's, as in the backbones."""
    with torch.device("meta"):
        head = DomainHead(shape)
    head.to_empty(device="cpu")
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, generator=generator_for(seed, owner, name))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
    return head
