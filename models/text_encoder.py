"""A frozen language model makes one vector of a text: UFIN, Eq. 2, before its LayerNorm.

The sum over a text's tokens of the last hidden state. LayerNorm does not tell it from the mean; of
a model that has a decoder too, its encoder half is read.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from models.encoder import check_length
from models.encoder_files import EncoderConfig, find
from models.prompt_tokenizer import PromptTokenizer

CALL_TOKENS = {"cpu": 512, "cuda": 1 << 15}
"""Tokens of one call, the padding among them: what a core's cache holds, or what fills a GPU."""


class TextEncoder:
    """The model of an encoder's config, of which its LoRA, taps and chunks are not read.

    Weights are read when the first text is encoded. Nothing of it ever has a gradient.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | None = None) -> None:
        self._config, self._files = config, find(config)
        self._device = device or torch.device("cpu")
        self._tokenize = PromptTokenizer(config)

    @cached_property
    def width(self) -> int:
        """Numbers in a vector."""
        # seconds of import, for the runs alone that have an encoder
        from models.encoder_library import load_config

        shape = load_config(self._files)
        check_length(self._config, shape.to_dict().get("max_position_embeddings"))
        return shape.hidden_size

    @property
    def cut(self) -> int:
        """Texts so far that had more than `max_tokens`, and lost their ends."""
        return self._tokenize.cut

    def describe(self) -> dict[str, Any]:
        """What decides a text's vector, without the place where the files lie."""
        return {
            "encoder": self._files.fingerprint(),
            **self._tokenize.describe(),
            "pooling": "sum",
        }

    @torch.no_grad()
    def vectors(
        self, texts: Sequence[str], done: Callable[[int], object] = lambda count: None
    ) -> Tensor:
        """[n, width] fp32 on the CPU, of each text on its own: neither its neighbours nor their
        order matter. A text without tokens is zeros. `done` hears of each call's texts."""
        tokens = self._tokenize(pa.array(texts, pa.string()))
        ends = tokens.offsets.to_numpy()
        lengths = np.diff(ends)
        values = torch.from_numpy(tokens.values.to_numpy().astype(np.int64))
        vectors = torch.zeros(len(texts), self.width)
        for places in _calls(lengths, CALL_TOKENS[self._device.type]):
            rows = [values[ends[place] : ends[place + 1]] for place in places]
            vectors[torch.from_numpy(places)] = self._pooled(rows).cpu()
            done(len(places))
        return vectors

    def _pooled(self, rows: list[Tensor]) -> Tensor:
        """[n, width] the sums over each row's tokens."""
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(ids.shape[1], device=self._device) < lengths.unsqueeze(1)
        states = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return torch.einsum("ntd,nt->nd", states, mask.to(states.dtype))

    @cached_property
    def _model(self) -> nn.Module:
        from models.encoder_library import load_model

        return nn.Module.to(load_model(self._files).requires_grad_(False).eval(), self._device)


def _calls(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Places of the texts of each call, alike in length, the longest first, so that what does not
    fit into memory is known at once. Texts without tokens are in none."""
    order = np.argsort(-lengths, kind="stable")
    start, stop = 0, np.count_nonzero(lengths)
    while start < stop:
        count = max(tokens // int(lengths[order[start]]), 1)
        yield order[start : min(start + count, stop)]
        start += count
