"""Prompts as tokens: rows are put into words and tokenised once, when their shards are written.

Not a stage of the source, which is read up to three times (split, vocabulary, blocks) and with
domains that the set leaves out: only rows on their way into a block are worth tokenising. `predict`
gives its raw rows to the same `Prompter`.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.prompts import PromptConfig, check_names, render
from data_shards.schema import Field

CUT = "kept_cut_prompt"


class Tokenize(Protocol):
    """Texts to the numbers that an encoder reads; picklable."""

    @property
    def cut(self) -> int:
        """Texts so far that were longer than the most tokens, and so were cut."""
        ...

    def __call__(self, texts: pa.StringArray) -> pa.ListArray:
        """[n] list<int32> without a null."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the tokens, without the place where its files lie."""
        ...


@dataclass(frozen=True)
class PromptedConfig(PromptConfig):
    """`[data.prompt]`: a field of kind tokens, made of the other fields."""

    field: str = "prompt"
    """The field of data.fields that holds the tokens."""
    fields: tuple[Field, ...] = ()
    """Fields that stand in the prompt alone: neither in the shards nor in a vocabulary."""


@dataclass(frozen=True)
class Prompter:
    """Raw rows to rows with a field of tokens."""

    config: PromptedConfig
    fields: tuple[Field, ...]
    """All fields of the raw rows."""
    tokenize: Tokenize
    local: tuple[str, ...] = ()
    """Fields whose values read "<domain>:<value>": the prompt says the value alone."""

    def __post_init__(self) -> None:
        check_names(self.fields, self.config)

    def add(self, table: pa.Table, dropped: Counter[str]) -> pa.Table:
        """The rows with their tokens; rows whose text was cut are counted as `kept_cut_prompt`."""
        tokens = self._tokens(self.texts(table), dropped)
        return table.append_column(self.config.field, tokens)

    def texts(self, table: pa.Table) -> pa.StringArray:
        """[n] the prompt of each row, as it is tokenised."""
        for name in self.local:
            place = table.column_names.index(name)
            table = table.set_column(place, name, _without_domain(table[name].combine_chunks()))
        return render(self.fields, table, self.config)

    def describe(self) -> dict[str, Any]:
        """What decides the tokens of a row."""
        return {
            **asdict(self.config),
            "fields": [asdict(field) for field in self.fields],
            "local": list(self.local),
            "tokenizer": self.tokenize.describe(),
        }

    def _tokens(self, texts: pa.StringArray, dropped: Counter[str]) -> pa.ListArray:
        """[n] each text's tokens; texts that repeat are tokenised once."""
        encoded = texts.dictionary_encode()
        text_of = encoded.indices.to_numpy()
        times = np.bincount(text_of, minlength=len(encoded.dictionary))
        order = np.argsort(times, kind="stable")
        lists = [pa.array([], pa.list_(pa.int32()))]
        for rows in np.unique(times):  # apart, for the tokenizer counts texts, and not rows
            before = self.tokenize.cut
            alike = pa.array(order[times[order] == rows])
            lists.append(self.tokenize(encoded.dictionary.take(alike)))
            dropped[CUT] += int(rows) * (self.tokenize.cut - before)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return pa.concat_arrays(lists).take(pa.array(place[text_of]))


def _without_domain(column: pa.Array) -> pa.Array:
    """Texts, or lists of texts, without what stands before the first colon."""
    if pa.types.is_list(column.type):
        values = _without_domain(column.flatten())
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, mask=pc.is_null(column))
    return pc.replace_substring_regex(column, "^[^:]*:", "")
