"""A row as text for a language model, column by column.

A prompt has up to three parts, one for each side of a row; a part is its side's clauses, one for
each field in the order of the schema. The wording is that of the papers:

- `ufin`: UFIN III-C7, Base. `ufin_pairs` and `ufin_masked` are its Prompt-1 and Prompt-2; Prompt-3,
  with fields taken out, is `without` on any of them. Anonymous fields stay out (II-C2).
- `uni_ctr`: Uni-CTR IV-B, where the fields domain, user, history and item have their own wording;
  a schema that has them first on their sides, in this order, gives the paper's sentence.

- `p5`: P5's prompt 5-4, a question whose answer is yes or no, with ids and with what `uni_ctr` says
  of domain, user and item.

A value that is missing (null, blank, an empty list, a number that is not finite) takes its clause
with it, and a side without clauses its part; only an empty `history` is "nothing" in `uni_ctr` and
`p5`, as in the released code of the former. Runs of blanks and control characters become one blank.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.hashing import xxh64
from data_shards.schema import Field

Side = Literal["user", "item", "context"]
Change = Callable[[pa.Array], pa.Array]


@dataclass(frozen=True)
class Part:
    """One side's wording: opening, clauses with `between` them (`last` before the side's last
    field), closing. `clause` holds {name} and {value}; `{product}` in the opening is the config's.
    """

    clause: str
    opening: str = ""
    between: str = ", "
    last: str = ", "
    closing: str = ""


@dataclass(frozen=True)
class Prompt:
    """One template: its parts in order, `between` them, and what ends the whole."""

    parts: Mapping[Side, Part]
    between: str
    end: str = ""
    kinds: tuple[str, ...] = ("id", "number", "text")
    """The kinds of field that are put into words."""
    many: str = " "
    """Stands between the values of a multi-valued field."""
    quoted: bool = False
    """Whether texts stand in double quotes; their own become single ones."""
    clauses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Clauses of some fields, by name."""
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What stands for a missing value of some fields, by name."""


def _ufin(user: str, item: str, context: str) -> Prompt:
    return Prompt(
        parts={
            "user": Part(user, "There is a user, whose ", last=", and "),
            "item": Part(item, "There is a {product}, ", last=", and "),
            "context": Part(context, "The ", last=", and "),
        },
        between=". ",
        end=".",
        quoted=True,
    )


_PAIRS = Part("{name}: {value}", between="; ", last="; ")
_THE = "the {name} is {value}"

PROMPTS: dict[str, Prompt] = {
    "ufin": _ufin("{name} is {value}", "its {name} is {value}", "{name} is {value}"),
    "ufin_pairs": Prompt(
        parts={"user": _PAIRS, "item": _PAIRS, "context": _PAIRS},
        between="; ",
        end=".",
        quoted=True,
    ),
    "ufin_masked": _ufin("Field is {value}", "its Field is {value}", "Field is {value}"),
    "uni_ctr": Prompt(
        parts={
            "context": Part("The {name} is {value}.", between=" ", last=" "),
            "user": Part(_THE, closing="."),
            "item": Part(_THE, closing="."),
        },
        between=" ",
        kinds=("id", "anonymous", "number", "text"),
        many=" & ",
        clauses={
            "domain": "{value}:",
            "user": "The user ID is user_{value}",
            "history": "who clicked on {value} recently",
            "item": "The ID of the current product is product_{value}",
        },
        missing={"history": "nothing"},
    ),
    "p5": Prompt(
        parts={
            "context": Part("The {name} is {value}.", between=" ", last=" "),
            "user": Part(_THE, "I would like to recommend some {product}s for ", closing="."),
            "item": Part(_THE, "Is the following {product} a good choice? ", closing="."),
        },
        between=" ",
        kinds=("id", "anonymous", "number", "text"),
        many=" & ",
        clauses={
            "domain": "{value}:",
            "user": "user_{value}",
            "history": "who clicked on {value} recently",
            "item": "item_{value}",
        },
        missing={"history": "nothing"},
    ),
}


@dataclass(frozen=True)
class PromptConfig:
    """How to word a row."""

    template: str = "ufin"
    sides: tuple[Side, ...] = ("user", "item", "context")
    """The parts to write; they stand in the template's order."""
    max_words: int = 0
    """Words kept of each field; 0 keeps them all."""
    words: dict[str, int] = dataclasses.field(default_factory=dict)
    """Words kept of each value of a field: { history = 3 } keeps three of each title."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """Words for a field's name, or its whole clause where they hold {value}."""
    without: tuple[str, ...] = ()
    """Fields to treat as missing."""
    product: str = "product"
    """What an item is, in the sentences of UFIN and P5."""

    def __post_init__(self) -> None:
        if self.template not in PROMPTS:
            raise unknown("prompt", self.template, PROMPTS)
        for side in self.sides:
            if side not in PROMPTS[self.template].parts:
                raise unknown("side", side, PROMPTS[self.template].parts)
        if not self.sides:
            raise UserError("prompt: sides is empty; name user, item or context")
        kept = {f"words.{name}": words for name, words in self.words.items()}
        for key, words in {"max_words": self.max_words, **kept}.items():
            if words < 0:
                raise UserError(f"prompt: {key} is 0 or more, not {words}")
        for name, words in self.names.items():
            if words.count("{value}") > 1:
                raise UserError(f"prompt: names.{name} holds {{value}} twice; it stands once")


def render(fields: Sequence[Field], table: pa.Table, config: PromptConfig) -> pa.StringArray:
    """[n] the prompt of each row of `table`; empty where a row has nothing to say."""
    check_names(fields, config)
    prompt = PROMPTS[config.template]
    parts = [
        _part(prompt, side, fields, table, config) for side in prompt.parts if side in config.sides
    ]
    whole = _wrap("", _join(parts, prompt.between, len(table)), prompt.end)
    return pc.fill_null(whole, "")


def check_names(fields: Sequence[Field], config: PromptConfig) -> None:
    """UserError where the config names a field that is none of these."""
    known = [field.name for field in fields]
    for name in (*config.names, *config.words, *config.without):
        if name not in known:
            raise unknown("field of a prompt", name, known)


def _part(
    prompt: Prompt, side: Side, fields: Sequence[Field], table: pa.Table, config: PromptConfig
) -> pa.StringArray:
    """[n] one side's part; null where all its values are missing."""
    part, rows = prompt.parts[side], len(table)
    worded = [field for field in fields if field.side == side and field.kind in prompt.kinds]
    clauses = [_clause(prompt, field, table, config) for field in worded]
    before_last = _join(clauses[:-1], part.between, rows)
    body = _join([before_last, *clauses[-1:]], part.last, rows)
    return _wrap(part.opening.replace("{product}", config.product), body, part.closing)


def _clause(prompt: Prompt, field: Field, table: pa.Table, config: PromptConfig) -> pa.StringArray:
    """[n] what is said of a field; null where its value is missing."""
    if field.name in config.without:
        return pa.nulls(len(table), pa.string())
    words = config.names.get(field.name, field.name)
    own = prompt.clauses.get(field.name, prompt.parts[field.side].clause)
    clause = words if "{value}" in words else own.replace("{name}", words)
    values = _first_words(_values(prompt, field, table, config), config.max_words)
    if prompt.quoted and field.kind == "text":
        values = _wrap('"', pc.replace_substring(values, '"', "'"), '"')
    if field.name in prompt.missing:
        values = pc.fill_null(values, prompt.missing[field.name])
    before, after = clause.split("{value}")
    return _wrap(before, values, after)


def _values(prompt: Prompt, field: Field, table: pa.Table, config: PromptConfig) -> pa.StringArray:
    """[n] a field's values as clean text; null where missing."""
    if field.name not in table.column_names:
        raise UserError(
            f"prompt: the rows have no column for the field {field.name!r}; they have: "
            f"{', '.join(table.column_names)}"
        )
    column = table[field.name].combine_chunks()
    if field.kind == "number":
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    clean = partial(_clean, words=config.words.get(field.name, 0))
    return _joined(clean, column, prompt.many) if field.multi else _each(clean, column)


def _joined(clean: Change, lists: pa.ListArray, between: str) -> pa.StringArray:
    """[n] the clean values of each list in one text; null where none is left."""
    values = _each(clean, lists.flatten())
    kept = values.is_valid()
    owners = pc.list_parent_indices(lists).filter(kept).to_numpy()
    ends = np.cumsum(np.bincount(owners, minlength=len(lists)))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    return _null_if_empty(
        pc.binary_join(pa.ListArray.from_arrays(offsets, values.filter(kept)), between)
    )


def _each(change: Change, column: pa.Array) -> pa.Array:
    """[n] `change` of the values as text, made once for each distinct one."""
    texts = column.cast(pa.string()).dictionary_encode()
    return change(texts.dictionary).take(texts.indices)


def _clean(texts: pa.StringArray, words: int) -> pa.StringArray:
    spaced = pc.replace_substring_regex(texts, r"[\pZ\p{Cc}]+", " ")
    return _null_if_empty(_first_words(pc.utf8_trim(spaced, " "), words))


def _first_words(texts: pa.StringArray, words: int) -> pa.StringArray:
    """The first words of each text; all for 0."""
    if not words:
        return texts
    return pc.binary_join(pc.list_slice(pc.split_pattern(texts, " "), 0, words), " ")


def _null_if_empty(texts: pa.StringArray) -> pa.StringArray:
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _join(columns: Sequence[pa.StringArray], between: str, rows: int) -> pa.StringArray:
    """[rows] what is not null of each row, in one text; null where all is."""
    joined = pa.nulls(rows, pa.string())
    for column in columns:  # Arrow's own null_handling="skip" loses rows that are null throughout
        both = pc.binary_join_element_wise(joined, column, between)
        joined = pc.coalesce(both, joined, column)
    return joined


def _wrap(before: str, texts: pa.StringArray, after: str) -> pa.StringArray:
    return pc.binary_join_element_wise(before, texts, after, "")


def text_id(texts: pa.StringArray) -> np.ndarray:
    """[n] int64 that names each text in a cache of text vectors: xxh64 of its UTF-8; null is ""."""
    return xxh64(pc.fill_null(texts, "")).view(np.int64)
