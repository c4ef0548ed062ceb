"""What a frozen encoder reads of a row: one text, or one for each side, in the words of a prompt.

Rows here are encoded ones, as shards hold them, so that a row says the same whether it lies in a
shard or comes to be scored: an id that the vocabulary lacks is missing in both.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.prompts import PROMPTS, PromptConfig, check_names, render
from data_shards.schema import Field, Schema
from data_shards.vocabulary import Vocabulary


@dataclass(frozen=True)
class TextConfig:
    """The `[text]` section: rows as vectors of a frozen encoder, which `cache-text` writes."""

    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    parts: Literal["joint", "sides"] = "joint"
    """One text a row, or one for each side, whose vectors are added: users and items are then
    encoded, and not their pairs."""
    folder: str = "data/text"
    """Where the vectors lie, each shard set's in a folder of its own."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def parts_of(self, schema: Schema) -> dict[str, PromptConfig]:
        """The prompt of each text of a row, by the name of the column of its ids.

        A side of which the prompt words no field has none. UserError where none has any, or where
        the prompt names a field that is none of these.
        """
        check_names(schema.fields, self.prompt)
        joint = {"text_joint": self.prompt}
        sides = {
            f"text_{side}": dataclasses.replace(self.prompt, sides=(side,))
            for side in self.prompt.sides
        }
        parts = joint if self.parts == "joint" else sides
        worded = {name: prompt for name, prompt in parts.items() if _worded(schema, prompt)}
        if not worded:
            raise UserError(
                f"text.prompt: the template {self.prompt.template!r} words none of the fields "
                f"{', '.join(field.name for field in schema.fields)}; it words the kinds "
                f"{', '.join(PROMPTS[self.prompt.template].kinds)}"
            )
        return worded


def texts_of(
    rows: pa.Table, vocabulary: Vocabulary, domains: pa.Array, config: PromptConfig
) -> pa.StringArray:
    """[n] the text of each encoded row; `domains` [n] are the names of theirs."""
    schema = vocabulary.schema
    words = in_words(_worded(schema, config), vocabulary, rows, domains)
    return render(schema.fields, words, config)


def in_words(
    fields: list[Field], vocabulary: Vocabulary, rows: pa.Table, domains: pa.Array
) -> pa.Table:
    """These fields of encoded rows as raw values; null for ids that are not in the vocabulary."""
    columns = {"domain": domains}  # a prompt may word no field at all
    for field in fields:
        if field.name == "domain":
            continue
        column = rows[field.name].combine_chunks()
        if field.multi:
            values = _words(vocabulary.values[field.name], column.values)
            column = pa.ListArray.from_arrays(column.offsets, values)
        elif field.is_id:
            column = _words(vocabulary.values[field.name], column)
        columns[field.name] = column
    return pa.table(columns)


def _worded(schema: Schema, config: PromptConfig) -> list[Field]:
    """The fields that the prompt words; hashed ones cannot be turned back into words."""
    kinds = PROMPTS[config.template].kinds
    fields = [
        field
        for field in schema.fields
        if field.kind in kinds and field.side in config.sides and field.name not in config.without
    ]
    for field in fields:
        if field.vocabulary == "hash" and field.name != "domain":
            raise UserError(
                f"prompt: the shards hold the field {field.name!r} as hashes, not as words; add "
                "it to the prompt's `without`, or write the shards with vocabulary = 'frequency'"
            )
    return fields


def _words(values: pa.Array, ids: pa.Array) -> pa.Array:
    """The value of each id, null for 0."""
    places = pc.if_else(pc.equal(ids, 0), pa.scalar(None, pa.int32()), pc.subtract(ids, 1))
    return values.take(places)
