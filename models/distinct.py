"""The prompts of a batch, each once: rows that share a prompt share its states.

Shapes: B rows, U distinct prompts, n prompts, T tokens, D the encoder's width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.method import Tokens


class Prompts(NamedTuple):
    """Distinct prompts, shortest first unless `arranged`."""

    ids: Tensor
    """[U, longest] int64, zeros after a prompt's end"""
    lengths: Tensor
    """[U], at least 1: a padding row is a prompt of one token 0"""
    of_row: Tensor
    """[B] which of them each row has"""


class States(NamedTuple):
    """Some prompts' states, padded to the longest of them."""

    states: list[Tensor]
    """Taps and then the last state, each [n, T, D]; once where it is the last tap too"""
    mask: Tensor
    """[n, T], true on tokens"""


def distinct(tokens: Tokens) -> Prompts:
    """Each prompt once, in an order that does not depend on that of the rows."""
    lengths = tokens.lengths.long()
    mask = real(lengths)
    padded = tokens.values.new_zeros(mask.shape, dtype=torch.int64)
    padded.masked_scatter_(mask, tokens.values.long())
    keyed = torch.cat([lengths.clamp(min=1).unsqueeze(1), padded], dim=1)
    found, of_row = torch.unique(keyed, dim=0, return_inverse=True)
    return Prompts(found[:, 1:], found[:, 0], of_row)


def chosen(prompts: Prompts, places: Sequence[int]) -> Prompts:
    """These of the prompts, in this order; `of_row` is right where it holds all of them."""
    order = torch.tensor(places, dtype=torch.int64, device=prompts.ids.device)
    inverse = torch.zeros_like(prompts.lengths)
    inverse[order] = torch.arange(len(places), device=order.device)
    ids, lengths = prompts.ids[order], prompts.lengths[order]
    return Prompts(ids, lengths, inverse[prompts.of_row])


def take(encoded: Sequence[States], prompts: Prompts, groups: Sequence[Tensor]) -> list[States]:
    """For each group of prompts [n_i] their states, padded to the longest of the group.

    One `index_select` serves all groups, so that its gradient is written once.
    """
    start = _starts(encoded)[-len(prompts.ids) :]
    spots, masks = [], []
    for group in groups:
        lengths = prompts.lengths[group]
        mask = real(lengths)
        inside = torch.arange(mask.shape[1], device=mask.device).minimum(lengths[:, None] - 1)
        spots.append((start[group].unsqueeze(1) + inside).flatten())
        masks.append(mask)
    spot, sizes = torch.cat(spots), [len(s) for s in spots]
    pieces = [
        torch.cat([state.flatten(0, 1) for state in same]).index_select(0, spot).split(sizes)
        for same in zip(*(chunk.states for chunk in encoded), strict=True)
    ]
    return [
        States([piece.unflatten(0, mask.shape) for piece in group], mask)
        for mask, group in zip(masks, zip(*pieces, strict=True), strict=True)
    ]


def real(lengths: Tensor) -> Tensor:
    """[n, longest] true on tokens; a column at least."""
    longest = max(int(lengths.max()), 1) if len(lengths) else 1
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _starts(encoded: Sequence[States]) -> Tensor:
    """Where each encoded prompt begins among all chunks' tokens end to end."""
    widths = torch.cat(
        [
            chunk.mask.new_full(chunk.mask.shape[:1], chunk.mask.shape[1], dtype=torch.int64)
            for chunk in encoded
        ]
    )
    return widths.cumsum(0) - widths
