"""What a frozen encoder makes of prompts, kept from one epoch to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.distinct import Prompts, States, chosen
from models.shared_beginnings import EncoderCall, arranged, encode


class StateCache:
    """States of prompts, first come, first kept, within `budget` bytes of memory."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._kept: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def encode(
        self, encoder: EncoderCall, prompts: Prompts, calls: int, shares: bool = False
    ) -> tuple[Prompts, list[States]]:
        """The prompts, those not kept yet first, and their states in that order.

        Only those are encoded, in `calls` calls at most, so ranks make different numbers of them.
        """
        place = {key: number for number, key in enumerate(_keys(prompts))}
        new = [number for key, number in place.items() if key not in self._kept]
        # taken out before new ones are put in, so that both lists hold
        old = {number: self._kept[key] for key, number in place.items() if key in self._kept}
        fresh, encoded = arranged(chosen(prompts, new), shares), []
        if new:
            encoded = encode(encoder, fresh, min(calls, len(fresh.ids)))
        keys = _keys(fresh)
        self._keep(keys, fresh.lengths.tolist(), encoded)
        known = [_padded(list(old.values()), prompts)] if old else []
        return chosen(prompts, [*(place[key] for key in keys), *old]), [*encoded, *known]

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


def _padded(kept: Sequence[Tensor], prompts: Prompts) -> States:
    """Prompts' [T_i, K, D] as one `States`."""
    lengths = torch.tensor([len(one) for one in kept], device=prompts.ids.device)
    states = pad_sequence(list(kept), batch_first=True)
    mask = torch.arange(states.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    return States(list(states.unbind(2)), mask)
