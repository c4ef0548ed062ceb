"""What a row is: its fields, in order, with a fingerprint that changes when their meaning does."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data_shards.errors import UserError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
ROW_COLUMNS = ("row_id", "label", "time", "weight", "probability")
KINDS = ("id", "anonymous", "number", "text", "tokens")


def canonical(value: object) -> bytes:
    """JSON with one spelling per value, for fingerprints."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Field:
    """One column of a row. Row 0 of an id's table is for values unseen, rare or missing."""

    name: str
    kind: Literal["id", "anonymous", "number", "text", "tokens"]
    side: Literal["user", "item", "context"] = "context"
    multi: bool = False
    vocabulary: Literal["frequency", "hash"] = "frequency"
    min_count: int = 1
    buckets: int = 0

    def __post_init__(self) -> None:
        where = f"field {self.name!r}"
        if not NAME.fullmatch(self.name) or self.name in ROW_COLUMNS:
            raise UserError(
                f"{where}: a name is letters, digits and _, and none of {', '.join(ROW_COLUMNS)}"
            )
        if self.kind not in KINDS:
            raise UserError(f"{where}: kind is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.vocabulary == "hash" and self.buckets < 1:
            raise UserError(f"{where}: vocabulary = 'hash' needs buckets of 1 or more")
        if self.buckets >= 1 << 31:
            raise UserError(f"{where}: buckets are below {1 << 31}, not {self.buckets}")
        if self.vocabulary == "frequency" and self.buckets:
            raise UserError(f"{where}: buckets are for vocabulary = 'hash' only; leave them out")
        if self.min_count < 1:
            raise UserError(f"{where}: min_count is 1 or more, not {self.min_count}")
        if self.multi and not self.is_id:
            raise UserError(f"{where}: only id and anonymous fields can be multi-valued")

    @property
    def is_id(self) -> bool:
        """Looked up in a table."""
        return self.kind in ("id", "anonymous")


@dataclass(frozen=True)
class Schema:
    """The fields of a row, in order. A field named "domain" is the domain's name as an id."""

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"schema: the field {twice[0]!r} stands twice; names are unique")
        if not self.ids:
            raise UserError("schema: no id field; a row needs one at least")

    @property
    def ids(self) -> tuple[Field, ...]:
        """Id and anonymous fields: the keys of a batch, in order."""
        return tuple(field for field in self.fields if field.is_id)

    @property
    def numbers(self) -> tuple[Field, ...]:
        """Number fields: the columns of a batch's `numbers`, in order."""
        return tuple(field for field in self.fields if field.kind == "number")

    @property
    def texts(self) -> tuple[Field, ...]:
        """Text fields: kept in the shards as strings."""
        return tuple(field for field in self.fields if field.kind == "text")

    @property
    def tokens(self) -> tuple[Field, ...]:
        """Fields of token ids, which the source brings as numbers."""
        return tuple(field for field in self.fields if field.kind == "tokens")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"fields": [asdict(field) for field in self.fields]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Schema":
        """The inverse of `to_json`."""
        try:
            return cls(tuple(Field(**field) for field in data["fields"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"schema: not of the form this version writes ({error})") from error

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical(self.to_json())).hexdigest()

    def first_difference(self, other: "Schema") -> str | None:
        """Name of the first field in which two schemas differ; None when they are equal."""
        if self == other:
            return None
        for mine, theirs in zip(self.fields, other.fields, strict=False):
            if mine != theirs:
                return mine.name
        longer = max(self.fields, other.fields, key=len)
        return longer[min(len(self.fields), len(other.fields))].name
