"""Prompts become the encoder's token ids, once, when shards are written."""

import hashlib
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.errors import UserError
from models.encoder_files import EncoderConfig, find


class PromptTokenizer:
    """The tokenizer that lies with the encoder. It holds its config alone until it is first used,
    so it travels to another process, where it counts anew."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.cut = 0
        """Texts of this process that were longer than `config.max_tokens`."""

    def __call__(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text, a list of int32, with the special tokens that the encoder wants
        and no padding; a long text loses its end, never a special token. An empty text gives the
        special tokens alone, so no token where the encoder has none. UserError on a null."""
        if texts.null_count:
            row = texts.is_null().index(True).as_py()
            raise UserError(f"row {row}: a prompt is missing; expected text, which may be empty")
        encoded = self._tokenizer.encode_batch_fast(texts.to_pylist())
        self.cut += sum(bool(text.overflowing) for text in encoded)
        ids = [text.ids for text in encoded]
        ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(ids), np.int32, ends[-1])
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))

    def describe(self) -> dict[str, Any]:
        """What the ids depend on: all that the tokenizer does, from whatever files, and its cut."""
        whole = type(self._tokenizer).from_str(self._tokenizer.to_str())
        whole.no_truncation()
        fingerprint = hashlib.sha256(whole.to_str().encode()).hexdigest()
        return {"tokenizer": fingerprint, "max_tokens": self.config.max_tokens}

    @cached_property
    def _tokenizer(self) -> Any:
        # seconds of import, for the runs alone that have an encoder; hence also no type
        from models.encoder_library import load_tokenizer

        loaded, most = load_tokenizer(find(self.config)), self.config.max_tokens
        tokenizer = loaded.backend_tokenizer
        special = tokenizer.num_special_tokens_to_add(False)
        if most <= special:
            raise UserError(
                f"encoder.max_tokens: {most}, but {special} of each prompt are special tokens; "
                "give more"
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(most, direction=loaded.truncation_side)
        return tokenizer

    def __reduce__(self) -> tuple[type["PromptTokenizer"], tuple[EncoderConfig]]:
        return PromptTokenizer, (self.config,)
