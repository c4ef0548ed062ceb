"""Prompts of a decoder that begin alike: the tokens that they share are encoded once.

Attention is causal, so a token's states follow from those before it alone. The prompts of a call
stand as a tree in one line of tokens, each token once and none of them padding: layers that read
tokens one by one read the line; attention reads each prompt on its own, gathered from the line.
Dropout is drawn once for what is shared.

Shapes: U prompts of a batch, m of one call, T tokens of the longest of them, N of the line.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.distinct import Prompts, States, chosen, real

EncoderCall = Callable[[Tensor, Tensor], list[Tensor]]
"""See `Encoder.forward`."""


class Tree(NamedTuple):
    """Prompts' tokens, each once, and where they stand."""

    ids: Tensor
    """[1, N]"""
    depth: Tensor
    """[1, N] each token's place in its prompt"""
    way: Tensor
    """[m, T] where each prompt's tokens stand in the line; after its end, its last one's"""
    first: Tensor
    """[N] where each token stands first among those of `way`, end to end"""


def arranged(prompts: Prompts, shares: bool) -> Prompts:
    """The prompts in the order of their tokens, so that a `tree` finds what they share, for an
    encoder that shares beginnings; else as they are."""
    if not shares or len(prompts.ids) < 2:
        return prompts
    filled = prompts.ids.masked_fill(~real(prompts.lengths), -1)
    return chosen(prompts, torch.unique(filled, dim=0, return_inverse=True)[1].argsort().tolist())


def encode(encoder: EncoderCall, prompts: Prompts, calls: int) -> list[States]:
    """All prompts' states, in just so many calls, of equally many prompts each.

    Under ZeRO 3 a call gathers weights, so that all ranks must make as many. Where there are fewer
    prompts than calls, copies of the shortest come first.
    """
    place = torch.arange(len(prompts.ids), device=prompts.ids.device)
    copies = prompts.lengths.argmin().expand(max(calls - len(place), 0))
    return [_encode(encoder, prompts, s) for s in torch.cat([copies, place]).tensor_split(calls)]


def _encode(encoder: EncoderCall, prompts: Prompts, place: Tensor) -> States:
    mask = real(prompts.lengths[place])
    return States(_once(encoder(prompts.ids[place, : mask.shape[1]], mask)), mask)


def _once(states: Sequence[Tensor]) -> list[Tensor]:
    """The last one not twice where it is the last tap too."""
    *taps, last = states
    return [*(tap for tap in taps if tap is not last), last]


def tree(ids: Tensor, lengths: Tensor) -> Tree:
    """Prompts [m, T] of these lengths, 1 at least, each without what it shares with the one before
    it."""
    mask = real(lengths)
    (m, longest), device = mask.shape, ids.device
    number, inside = torch.arange(m, device=device), torch.arange(longest, device=device)
    shared = _shared(ids[:, :longest].masked_fill(~mask, -1))
    after = inside >= shared.unsqueeze(1)
    new = after & mask
    own = new.sum(1)
    owner = torch.where(after, number.unsqueeze(1), 0).cummax(0).values
    spot = (own.cumsum(0) - own - shared)[owner] + inside
    way = spot.gather(1, inside.minimum(lengths.unsqueeze(1) - 1))
    first = new.flatten().nonzero().squeeze(1)
    return Tree(ids[:, :longest][new].unsqueeze(0), (first % longest).unsqueeze(0), way, first)


def _shared(filled: Tensor) -> Tensor:
    """[m] with how many tokens each begins as the one before it does; -1 stands after an end."""
    same = (filled[1:] == filled[:-1]) & (filled[1:] >= 0)
    return torch.cat([same.new_zeros(1, dtype=torch.int64), same.cumprod(1).sum(1)])
