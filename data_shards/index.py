"""`index.json` of a shard set: where each block lies, what is in it, and what made it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError, unknown
from data_shards.schema import Schema, canonical
from data_shards.splits import SplitConfig
from data_shards.storage import Storage, open_storage
from data_shards.vocabulary import Vocabulary

FORMAT = 3
FILE = "index.json"


@dataclass(frozen=True)
class Block:
    """One tar member: rows of one domain and one split. `offset` is that of its first byte.

    All who read a block check its XXH3, at the speed of memory; `inspect --verify` its SHA-256 too.
    """

    shard: str
    member: str
    offset: int
    bytes: int
    rows: int
    positives: int
    domain: str
    split: str
    sha256: str
    xxh3: str


_CELLS = {field.name: field.type for field in fields(Block)}
_cells = attrgetter(*_CELLS)


@dataclass(frozen=True)
class VocabularyInfo:
    """Table rows per id field, and the fingerprints that make ids comparable."""

    fingerprint: str
    base_fingerprint: str | None
    sizes: dict[str, int]
    base_sizes: dict[str, int]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "VocabularyInfo":
        """The info of a vocabulary."""
        base = vocabulary.base_fingerprint
        return cls(vocabulary.fingerprint, base, vocabulary.sizes, vocabulary.base_sizes)

    @property
    def trunk(self) -> str:
        """Fingerprint of the vocabulary whose rows the trunk's tables hold."""
        return self.base_fingerprint or self.fingerprint


@dataclass(frozen=True)
class Index:
    """A whole shard set. `shards` maps each tar to its bytes, `dropped` a reason to its rows."""

    schema: Schema
    domains: tuple[str, ...]
    blocks: tuple[Block, ...]
    shards: dict[str, int]
    vocabulary: VocabularyInfo
    source: dict[str, Any]
    split: SplitConfig
    dropped: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows of the whole set."""
        return sum(block.rows for block in self.blocks)

    @cached_property
    def row_starts(self) -> np.ndarray:
        """Place of each block's first row among the rows of the set."""
        return np.cumsum([0, *(block.rows for block in self.blocks)])[:-1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the index, and so of every block's content."""
        return hashlib.sha256(canonical(self._content())).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "rows": self.rows,
            "schema": self.schema.to_json(),
            "domains": list(self.domains),
            "split": asdict(self.split),
            "vocabulary": asdict(self.vocabulary),
            "source": self.source,
            "dropped": self.dropped,
            "shards": self.shards,
            "block_columns": list(_CELLS),
            "blocks": [_cells(block) for block in self.blocks],
        }

    def save(self, folder: Path) -> None:
        """Write `index.json`."""
        content = {"fingerprint": self.fingerprint, **self._content()}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "Index":
        """Read and check `index.json` and the sizes of its shards; `folder` may be a URL."""
        storage = open_storage(folder)
        path = f"{storage}/{FILE}"
        content = _read_json(storage)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; "
                "write the shards again"
            )
        try:
            index = _from_content(content)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a valid index ({type(error).__name__}: {error}); "
                "write the shards again"
            ) from error
        if content.get("fingerprint") != index.fingerprint or content.get("rows") != index.rows:
            raise UserError(
                f"{path}: changed since it was written (its fingerprint or row total does not "
                "match); restore it or write the shards again"
            )
        _check_shards(storage, index.shards)
        return index

    def load_vocabulary(self, folder: Path | str) -> Vocabulary:
        """The set's vocabulary, checked against the fingerprint."""
        info = self.vocabulary
        where = f"{folder}/vocabulary"
        vocabulary = Vocabulary.load(where, self.schema, info.base_sizes, info.base_fingerprint)
        if vocabulary.fingerprint != info.fingerprint:
            raise UserError(
                f"{where}: not the vocabulary that encoded these shards; "
                "restore it or write the shards again"
            )
        return vocabulary

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of the split config."""
        return self.split.names

    def select(
        self, splits: tuple[str, ...], domains: tuple[str, ...] | None = None
    ) -> tuple[Block, ...]:
        """Blocks of these splits and domains (None: of all), in the order of the index."""
        for split in splits:
            if split not in self.splits:
                raise unknown("split", split, self.splits)
        for domain in domains or ():
            if domain not in self.domains:
                raise unknown("domain", domain, self.domains)
        wanted = set(self.domains if domains is None else domains)
        return tuple(b for b in self.blocks if b.split in splits and b.domain in wanted)

    def counts(self) -> dict[tuple[str, str], int]:
        """Rows per (domain, split); every pair is there."""
        counts = {(domain, split): 0 for domain in self.domains for split in self.splits}
        for block in self.blocks:
            counts[block.domain, block.split] += block.rows
        return counts

    def require_schema(self, schema: Schema) -> None:
        """UserError naming the first field that differs from `schema`."""
        field = self.schema.first_difference(schema)
        if field is not None:
            raise UserError(
                f"shards of another schema: the field {field!r} differs; "
                "write the shards again or use the run file that wrote them"
            )


def _read_json(storage: Storage) -> dict[str, Any]:
    path = f"{storage}/{FILE}"
    if not storage.exists(FILE):
        raise UserError(f"{path}: no such file; `write-shards` makes a shard set")
    try:
        content = json.loads(storage.read(FILE))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cut or corrupt JSON ({error}); write the shards again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a valid index (no JSON object); write the shards again")
    return content


def _from_content(content: Mapping[str, Any]) -> Index:
    split = dict(content["split"])
    for name in ("train", "together"):  # of which the latter is younger than some shard sets
        split[name] = tuple(split.get(name, ()))
    return Index(
        schema=Schema.from_json(content["schema"]),
        domains=tuple(content["domains"]),
        blocks=_blocks(content["blocks"]),
        shards=dict(content["shards"]),
        vocabulary=VocabularyInfo(**content["vocabulary"]),
        source=dict(content["source"]),
        split=SplitConfig(**split),
        dropped=dict(content["dropped"]),
    )


def _blocks(rows: list[list[Any]]) -> tuple[Block, ...]:
    # by column: an index of billions of rows has millions of blocks
    for (name, kind), column in zip(_CELLS.items(), zip(*rows, strict=True), strict=bool(rows)):
        for value in column:
            if type(value) is not kind:
                raise TypeError(f"a block's {name} is {value!r}")
    blocks = tuple(Block(*row) for row in rows)
    for block in blocks:
        if not 0 <= block.rows <= block.bytes:
            raise ValueError(f"{block.rows} rows in the {block.bytes} bytes of {block.member}")
    return blocks


def _check_shards(storage: Storage, shards: Mapping[str, int]) -> None:
    for name, size in shards.items():
        found = storage.size(name)
        if found is None:
            raise UserError(f"{storage}/{name}: missing; restore it or write the shards again")
        if found != size:
            raise UserError(
                f"{storage}/{name}: {found} bytes, the index says {size}; "
                "restore it or write the shards again"
            )
