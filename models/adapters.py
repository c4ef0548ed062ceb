"""Per-domain low-rank layers: h = W x + B_t A_t x (MLoRA, Eq. 9), for mixed-domain batches.

All domains' matrices lie in stacked tensors, a slot per domain. A batch is sorted by slot and cut
into tiles of one domain each; a tile gathers its domain's matrices once. So the cost follows the
rows of the batch, not the number of domains in the model.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import dropout

TILE = 32  # rows that share one gather of A_t and B_t


class LowRank(nn.Module):
    """Stacked A [slots, r, d_in], B [slots, d_out, r] and, by option, bias [slots, d_out]."""

    def __init__(self, matrices: dict[str, Tensor], dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(matrices["a"])
        self.b = nn.Parameter(matrices["b"])
        self.bias = nn.Parameter(matrices["bias"]) if "bias" in matrices else None
        self.dropout = dropout

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """B_t A_t x (+ b_t) [rows, d_out] for x [rows, d_in]; zeros where slot is -1."""
        delta = self._tiled(dropout(x, self.dropout, self.training), slot)
        return delta.masked_fill((slot < 0).unsqueeze(1), 0)

    def alone(self, x: Tensor, slot: Tensor) -> bool:
        """Training one domain on its own rows, as in phase 2: W + B A can stand for both products.

        Not in bf16, where the sum would round away most of B A.
        """
        one = self.training and len(self.a) == 1 and self.dropout == 0
        return one and x.dtype != torch.bfloat16 and bool((slot == 0).all())

    def _tiled(self, x: Tensor, slot: Tensor) -> Tensor:
        """Bit-equal whatever other domains are in the model or in the batch: a row's place in
        its tile, and so the order of its sums, follows from its own domain's rows alone."""
        place, tile_slot = tiles(slot)
        tile_slot = tile_slot.clamp(min=0)  # of tiles without an adapter, masked later
        padded = x.new_zeros(len(tile_slot) * TILE, x.shape[1]).index_copy(0, place, x)
        low = torch.bmm(padded.view(-1, TILE, x.shape[1]), self.a[tile_slot].mT)
        high = torch.bmm(low, self.b[tile_slot].mT)
        if self.bias is not None:
            high = high + self.bias[tile_slot].unsqueeze(1)
        return high.flatten(0, 1)[place]

    def stacked(self) -> dict[str, Tensor]:
        """All slots' matrices, live."""
        return {name: parameter.data for name, parameter in self.named_parameters()}


@dataclass(frozen=True)
class AdapterShape:
    """What the low-rank matrices of one layer are like."""

    rank: int
    bias: bool
    dropout: float
    init_std: float
    """Of the Gaussian A; 0: Glorot's."""


class DomainLinear(nn.Module):
    """A linear layer that a domain may adapt; without adapters it is `nn.Linear`."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias)
        nn.init.xavier_normal_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)
        self.low_rank: LowRank | None = None

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """[rows, d_out]; `slot` [rows] as in `Method.forward`."""
        if self.low_rank is None:
            return self.linear(x)
        if self.low_rank.alone(x, slot):
            return F.linear(x, *self.merged(0))
        return self.linear(x) + self.low_rank(x, slot)

    def append(self, shape: AdapterShape, generator: torch.Generator) -> None:
        """A new last slot: Gaussian A, zero B and bias, so the layer's output does not change."""
        weight = self.linear.weight
        d_out, d_in = weight.shape
        std = shape.init_std or math.sqrt(2 / (d_in + shape.rank))
        a = torch.empty(1, shape.rank, d_in).normal_(0, std, generator=generator)
        new = {"a": a.to(weight), "b": weight.new_zeros(1, d_out, shape.rank)}
        if shape.bias:
            new["bias"] = weight.new_zeros(1, d_out)
        old = self.low_rank.stacked() if self.low_rank else {}
        joined = {k: torch.cat([old[k], v]) if old else v for k, v in new.items()}
        self.low_rank = LowRank(joined, shape.dropout)

    def remove(self, slot: int) -> None:
        """Drop one slot; those after it move up."""
        assert self.low_rank is not None
        old = self.low_rank.stacked()
        keep = [i for i in range(len(old["a"])) if i != slot]
        kept = {name: tensor[keep] for name, tensor in old.items()}
        self.low_rank = LowRank(kept, self.low_rank.dropout) if keep else None

    def own(self, slot: int) -> dict[str, Tensor]:
        """One domain's matrices, as live views."""
        assert self.low_rank is not None
        return {name: tensor[slot] for name, tensor in self.low_rank.stacked().items()}

    def merged(self, slot: int) -> tuple[Tensor, Tensor]:
        """(W + B_t A_t, b + b_t): the layer of one domain as a plain linear layer, with a graph."""
        own, linear = self.low_rank, self.linear
        assert own is not None
        bias = linear.weight.new_zeros(()) if linear.bias is None else linear.bias
        bias = bias if own.bias is None else bias + own.bias[slot]
        return torch.addmm(linear.weight, own.b[slot], own.a[slot]), bias.expand(len(linear.weight))


def tiles(slot: Tensor) -> tuple[Tensor, Tensor]:
    """Cut rows into tiles of one slot each; rows without an adapter (-1) have tiles of their own.

    Returns (place [rows]: where each row lies in the tiles laid end to end,
    slot of each tile). At most rows/TILE + number of slots present tiles.
    """
    order = torch.argsort(slot, stable=True)
    present, count = torch.unique_consecutive(slot[order], return_counts=True)
    tiles_of = (count + TILE - 1) // TILE
    first_tile, first_row = tiles_of.cumsum(0) - tiles_of, count.cumsum(0) - count
    shift = (first_tile * TILE - first_row).repeat_interleave(count)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(slot), device=slot.device) + shift
    return place, present.repeat_interleave(tiles_of)


def generator_for(seed: int, domain: str, layer: str) -> torch.Generator:
    """First weights are a pure function of (seed, domain, layer): adding order does not matter."""
    key = hashlib.sha256(f"{seed}/{domain}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
