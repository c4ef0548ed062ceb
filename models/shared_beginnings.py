"""Prompts of a decoder that begin alike: the tokens that they share are encoded once.

Attention is causal, so a token's states follow from those before it alone. Prompts that begin alike
stand in one line of tokens as a tree, `beginning, rest 1, rest 2, ...`: each token sees its own
way from the first one on, and its position is its depth. Dropout is drawn once for what is shared.

Shapes: U prompts of a batch, m of one call, T tokens of a prompt, n lines of P tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.distinct import Prompts, States, chosen, real

EncoderCall = Callable[..., list[Tensor]]
"""See `Encoder.forward`."""
LONGEST = 1024
"""Tokens of a line with several prompts: its mask grows with their square, what more sharing saves
does not."""


class Tree(NamedTuple):
    """Lines as a causal encoder reads them, and where its prompts stand in them."""

    ids: Tensor
    """[n, P] zeros after a line's end"""
    depth: Tensor
    """[n, P] each token's place in its prompt"""
    sees: Tensor
    """[n, P, P] whether the token of the row sees that of the column; each sees one at least"""
    spot: Tensor
    """[m, T] where each prompt's tokens stand among the lines' tokens end to end; after its end,
    its last one's"""


def arranged(prompts: Prompts, worth: int) -> Prompts:
    """The prompts in an order in which those that share a line follow each other, shortest lines
    first; `worth` is that of `Encoder.worth`. As they are where nothing is worth sharing."""
    if not worth or len(prompts.ids) < 2:
        return prompts
    groups, sizes = _groups(prompts, worth)
    if len(groups) == len(prompts.ids):
        return prompts
    lines = _filled(groups, sizes)
    arranged = chosen(prompts, [place for line in lines for place in line])
    return arranged._replace(lines=[len(line) for line in lines])


def encode(encoder: EncoderCall, prompts: Prompts, calls: int) -> list[States]:
    """All prompts' states, in just so many calls, of equally many lines each.

    Under ZeRO 3 a call gathers weights, so that all ranks must make as many. Where there are fewer
    lines than calls, copies of the shortest prompt come first.
    """
    ends = torch.tensor(prompts.lines).cumsum(0).tolist()
    lines = [range(end - size, end) for end, size in zip(ends, prompts.lines, strict=True)]
    shortest = int(prompts.lengths.argmin())
    lines = [range(shortest, shortest + 1)] * (calls - len(lines)) + lines
    shares = torch.arange(len(lines)).tensor_split(calls)
    return [_encode(encoder, prompts, [lines[line] for line in share]) for share in shares]


def _encode(encoder: EncoderCall, prompts: Prompts, lines: Sequence[range]) -> States:
    place = torch.tensor([p for line in lines for p in line], device=prompts.ids.device)
    lengths = prompts.lengths[place]
    mask = real(lengths)
    ids = prompts.ids[place, : mask.shape[1]]
    if len(lines) < len(place):
        alike = tree(ids, lengths, [len(line) for line in lines])
        if alike.ids.numel() < ids.numel():
            states = _once(encoder(alike.ids, alike.sees, alike.depth))
            at = alike.spot.flatten()
            apart = [state.flatten(0, 1).index_select(0, at) for state in states]
            return States([state.unflatten(0, mask.shape) for state in apart], mask)
    return States(_once(encoder(ids, mask)), mask)


def _once(states: Sequence[Tensor]) -> list[Tensor]:
    """The last one not twice where it is the last tap too."""
    *taps, last = states
    return [*(tap for tap in taps if tap is not last), last]


def tree(ids: Tensor, lengths: Tensor, lines: Sequence[int]) -> Tree:
    """Prompts [m, T], so many of them in each line, each sharing its beginning with the one before
    it in its line."""
    mask = real(lengths)
    device, (m, longest) = ids.device, mask.shape
    line = torch.arange(len(lines), device=device)
    line = line.repeat_interleave(torch.tensor(lines, device=device))
    number, inside = torch.arange(m, device=device), torch.arange(longest, device=device)
    shared = _shared(ids.masked_fill(~mask, -1))
    shared[1:] *= line[1:] == line[:-1]
    after = inside >= shared.unsqueeze(1)
    new = after & mask
    own = new.sum(1)
    before = own.cumsum(0) - own
    before -= before[torch.searchsorted(line, line)]  # what stands before its line
    owner = torch.where(after, number.unsqueeze(1), 0).cummax(0).values
    spot = before[owner] + inside - shared[owner]
    shape = len(lines), int((before + own).max())
    starts = (line * shape[1]).unsqueeze(1)

    def laid(values: Tensor) -> Tensor:
        out = ids.new_zeros(shape)
        out.view(-1)[(starts + spot)[new]] = values.expand(m, longest)[new]
        return out

    depth, prompt = laid(inside), laid(number.unsqueeze(1))
    earlier = depth.unsqueeze(1) <= depth.unsqueeze(2)
    place = torch.arange(shape[1], device=device)
    sees = earlier & (spot[prompt.unsqueeze(2), depth.unsqueeze(1)] == place)
    last = inside.minimum(lengths.unsqueeze(1) - 1)
    return Tree(laid(ids), depth, sees, starts + spot.gather(1, last))


def _shared(filled: Tensor) -> Tensor:
    """[m] with how many tokens each begins as the one before it does; -1 stands after an end."""
    same = (filled[1:] == filled[:-1]) & (filled[1:] >= 0)
    return torch.cat([same.new_zeros(1, dtype=torch.int64), same.cumprod(1).sum(1)])


def _groups(prompts: Prompts, worth: int) -> tuple[list[list[int]], list[int]]:
    """Prompts by the tree they are part of, and its tokens.

    In the order of their tokens, each joins those before it where what it shares with the last of
    them outweighs the attention between it and them, which the mask then throws away.
    """
    filled = prompts.ids.masked_fill(~real(prompts.lengths), -1)
    order = torch.unique(filled, dim=0, return_inverse=True)[1].argsort()
    lengths, shared = prompts.lengths[order].tolist(), _shared(filled[order]).tolist()
    groups: list[list[int]] = []
    sizes: list[int] = []
    for place, length, same in zip(order.tolist(), lengths, shared, strict=True):
        own, size = length - same, sizes[-1] if sizes else 0
        if 2 * size * own < worth * same and size + own <= LONGEST:
            groups[-1].append(place)
            sizes[-1] += own
        else:
            groups.append([place])
            sizes.append(length)
    return groups, sizes


def _filled(groups: Sequence[list[int]], sizes: Sequence[int]) -> list[list[int]]:
    """Groups side by side in lines no longer than the longest group, the longest first, each in the
    first line that has room: else a call would pad the short ones to the longest."""
    lines: list[list[int]] = []
    room: list[int] = []
    for size, group in sorted(zip(sizes, groups, strict=True), reverse=True):
        fits = (line for line, left in enumerate(room) if left >= size)
        line = next(fits, len(lines))
        if line == len(lines):
            lines.append([])
            room.append(max(sizes))
        lines[line] += group
        room[line] -= size
    return [lines[line] for line in sorted(range(len(lines)), key=lambda line: -room[line])]
