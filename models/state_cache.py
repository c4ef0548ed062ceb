"""What a frozen encoder makes of prompts, kept from one epoch to the next."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.distinct import Prompts, States, encode

EncoderCall = Callable[[Tensor, Tensor], list[Tensor]]


class StateCache:
    """States of prompts, first come, first kept, within `budget` bytes of memory."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._kept: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def encode(
        self, encoder: EncoderCall, prompts: Prompts, calls: int
    ) -> tuple[Prompts, list[States]]:
        """The prompts, those not kept yet first, and their states in that order.

        Only those are encoded, in `calls` calls at most, so ranks make different numbers of them.
        """
        keys = _keys(prompts)
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        old = [place for place, key in enumerate(keys) if key in self._kept]
        fresh = _some(prompts, new)
        encoded = encode(encoder, fresh, min(calls, len(new))) if new else []
        # taken out before new ones are put in, so that both lists hold
        known = [_padded([self._kept[keys[place]] for place in old], prompts)] if old else []
        self._keep([keys[place] for place in new], fresh.lengths.tolist(), encoded)
        return _some(prompts, [*new, *old]), [*encoded, *known]

    def _keep(
        self, keys: Sequence[bytes], lengths: Sequence[int], encoded: Sequence[States]
    ) -> None:
        if self.bytes >= self.budget:
            return
        rows = (row for chunk in encoded for row in torch.stack(chunk.states, dim=2))
        for key, length, row in zip(keys, lengths, rows, strict=True):
            if self.bytes + row[:length].nbytes <= self.budget:
                self._kept[key] = row[:length].clone()
                self.bytes += row[:length].nbytes


def _keys(prompts: Prompts) -> list[bytes]:
    ids = prompts.ids.cpu().numpy()
    return [row[:n].tobytes() for row, n in zip(ids, prompts.lengths.tolist(), strict=True)]


def _some(prompts: Prompts, places: Sequence[int]) -> Prompts:
    """These of the prompts, in this order; `of_row` is right where it holds all of them."""
    order = torch.tensor(places, dtype=torch.int64, device=prompts.ids.device)
    inverse = torch.zeros_like(prompts.lengths)
    inverse[order] = torch.arange(len(places), device=order.device)
    return Prompts(prompts.ids[order], prompts.lengths[order], inverse[prompts.of_row])


def _padded(kept: Sequence[Tensor], prompts: Prompts) -> States:
    """Prompts' [T_i, K, D] as one `States`."""
    lengths = torch.tensor([len(one) for one in kept], device=prompts.ids.device)
    states = pad_sequence(list(kept), batch_first=True)
    mask = torch.arange(states.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    return States(list(states.unbind(2)), mask)
