"""Log files of three forms, wherever they lie, read in bounded memory.

A Parquet file is cut into ranges of row groups; a CSV or JSON-lines file (.gz or not) is one
piece. Values keep the types they have in the file; a CSV cell is bytes, an empty one is null.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_shards.errors import UserError, unknown
from data_shards.sources.csv_rows import QuoteCounter, Skipped
from data_shards.sources.json_lines import BadLine, Parse, json_object, line_blocks, read_block

Format = Literal["parquet", "csv", "jsonl"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
FIRST_ROW = {"parquet": ("row", 1), "csv": ("row", 2), "jsonl": ("line", 1)}
"""How people count the rows of a file: a CSV's header is row 1."""
CHUNK_ROWS = 1 << 16
PIECE_ROWS = 4_000_000
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: the columns asked for, and each row's 0-based place in the file."""

    table: pa.Table
    rows: np.ndarray


@dataclass(frozen=True)
class Piece:
    """A file, or a range of a Parquet file's row groups."""

    file: int
    first_row: int = 0
    groups: tuple[int, ...] = ()


class Files:
    """The files of one place: a file, a folder, a glob, or any fsspec URL of these.

    `keys` has the run file's keys that name columns, by column.
    """

    def __init__(
        self,
        path: str,
        form: Format | None = None,
        delimiter: str = ",",
        quoted: bool = True,
        parse: Parse = json_object,
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.filesystem, self.names = find(path)
        self.forms = [form or _form(name) for name in self.names]
        self.delimiter = delimiter
        self.quoted = quoted
        self.parse = parse
        self.keys = keys

    def stem(self, file: int) -> str:
        """A file's name up to its first dot."""
        return PurePosixPath(self.names[file]).name.split(".")[0]

    def states(self) -> list[list[object]]:
        """Name, size and time of change of each file, as far as the store tells."""
        infos = self.filesystem.get_file_info(list(self.names))
        return [[info.path, info.size, info.mtime_ns] for info in infos]

    def row_name(self, file: int, row: int) -> str:
        """What people call a row of a file."""
        word, first = FIRST_ROW[self.forms[file]]
        return f"{self.names[file]} {word} {row + first}"

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Units of parallel work, in order."""
        return tuple(piece for file in range(len(self.names)) for piece in self._cut(file))

    def _cut(self, file: int) -> Iterator[Piece]:
        if self.forms[file] != "parquet":
            yield Piece(file)
            return
        with self._readable(file), self._parquet(file) as parquet:
            groups = range(parquet.metadata.num_row_groups)
            sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
        first = start = rows = 0
        for group, size in enumerate(sizes):
            if rows and rows + size > PIECE_ROWS:
                yield Piece(file, start, tuple(range(first, group)))
                first, start, rows = group, start + rows, 0
            rows += size
        yield Piece(file, start, tuple(range(first, len(sizes))))

    def read(self, piece: Piece, columns: Sequence[str], bad_line: BadLine) -> Iterator[Chunk]:
        """The piece's rows in order, at most `CHUNK_ROWS` at a time."""
        readers = {"parquet": self._read_parquet, "csv": self._read_csv, "jsonl": self._read_json}
        chunks = readers[self.forms[piece.file]](piece, tuple(dict.fromkeys(columns)), bad_line)
        while True:
            with self._readable(piece.file):
                chunk = next(chunks, None)
            if chunk is None:
                return
            for start in range(0, len(chunk.rows), CHUNK_ROWS):
                rows = chunk.rows[start : start + CHUNK_ROWS]
                yield Chunk(chunk.table.slice(start, CHUNK_ROWS), rows)

    def _read_parquet(
        self, piece: Piece, columns: tuple[str, ...], bad_line: BadLine
    ) -> Iterator[Chunk]:
        del bad_line  # a Parquet file has no lines
        with self._parquet(piece.file) as parquet:
            self._require(piece.file, columns, parquet.schema_arrow.names)
            row = piece.first_row
            for batch in parquet.iter_batches(CHUNK_ROWS, list(piece.groups), list(columns)):
                table = pa.Table.from_batches([batch]).select(list(columns))
                yield Chunk(table, np.arange(row, row + len(table)))
                row += len(table)

    def _read_csv(
        self, piece: Piece, columns: tuple[str, ...], bad_line: BadLine
    ) -> Iterator[Chunk]:
        with self._stream(piece.file) as stream, self._csv(stream, (), None) as header:
            self._require(piece.file, columns, header.schema.names)
        skipped = Skipped()
        good = told = 0
        with self._stream(piece.file) as stream:
            counted = QuoteCounter(stream)
            for batch in self._csv(counted, columns, skipped):
                told = skipped.tell(bad_line, told)
                rows = skipped.places(np.arange(good, good + len(batch)))
                yield Chunk(pa.Table.from_batches([batch]).select(list(columns)), rows)
                good += len(batch)
        skipped.tell(bad_line, told)
        if self.quoted and counted.quotes % 2:
            raise UserError(
                f"{self.names[piece.file]}: a quote is opened and not closed, and what follows it "
                'cannot be told apart; write "" for a quote inside a quoted value, or set '
                "quoted = false where quotes are plain characters"
            )

    def _csv(self, stream: Any, columns: tuple[str, ...], skipped: "Skipped | None") -> Any:
        read = pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
        parse = pa_csv.ParseOptions(
            delimiter=self.delimiter,
            quote_char='"' if self.quoted else False,
            newlines_in_values=self.quoted,
            ignore_empty_lines=False,
            invalid_row_handler=skipped or (lambda row: "skip"),
        )
        convert = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.binary()),
            include_columns=list(columns),
            null_values=[""],
            strings_can_be_null=True,
        )
        return pa_csv.open_csv(stream, read, parse, convert)

    def _read_json(
        self, piece: Piece, columns: tuple[str, ...], bad_line: BadLine
    ) -> Iterator[Chunk]:
        with self._stream(piece.file) as stream:
            for first, block in line_blocks(stream, BLOCK_BYTES):
                if not first:
                    named = [name for name in columns if _names(block, name)]
                    self._require(piece.file, columns, named)
                yield Chunk(*read_block(first, block, columns, bad_line, self.parse))

    def objects(self, file: int, bad_line: BadLine) -> Iterator[dict[str, Any]]:
        """The objects of a JSON-lines file, whole."""
        with self._readable(file), self._stream(file) as stream:
            for first, block in line_blocks(stream, BLOCK_BYTES):
                for row, line in enumerate(block.split(b"\n"), first):
                    try:
                        found = self.parse(line) if line.strip() else None
                    except (ValueError, RecursionError) as error:
                        bad_line(row, f"is no row: {error}")
                        continue
                    if found is not None:
                        yield found

    def _stream(self, file: int) -> IO[bytes]:
        gzipped = self.names[file].endswith(".gz")
        compression = "gzip" if gzipped else None
        return self.filesystem.open_input_stream(self.names[file], compression)

    def _parquet(self, file: int) -> pq.ParquetFile:
        return pq.ParquetFile(self.filesystem.open_input_file(self.names[file]))

    @contextmanager
    def _readable(self, file: int) -> Iterator[None]:
        """What the store or Arrow cannot read, as the user's own words."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.names[file]}: cannot be read as {self.forms[file]} "
                f"({str(error).splitlines()[0]}); mend the file, get it again, or set format"
            ) from error

    def _require(self, file: int, columns: tuple[str, ...], has: Sequence[str]) -> None:
        twice = [name for name, times in Counter(has).items() if times > 1 and name in columns]
        if twice:
            raise UserError(
                f"{self.names[file]}: the column {twice[0]!r} stands twice; rename one of the two"
            )
        for name in columns:
            if name not in has:
                key = self.keys.get(name)
                way_out = f"mend {key}" if key else "map a field by columns = { field = 'column' }"
                raise UserError(f"{self.names[file]}: {unknown('column', name, has)}; {way_out}")


def find(path: str) -> tuple[pa_fs.FileSystem, tuple[str, ...]]:
    """The file system and the sorted files of a path; a folder's `_` and `.` files are not data."""
    try:
        store, place = url_to_fs(path)
        if any(letter in place for letter in "*?["):
            names = sorted(str(name) for name in store.glob(place))
        elif store.isdir(place):
            names = sorted(name for name in store.find(place) if _is_data(name, place))
        else:
            names = [place] if store.exists(place) else []
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({error})") from error
    if not names:
        raise UserError(f"{path}: no such file; give a file, a folder, a glob or a URL of these")
    if isinstance(store, LocalFileSystem):
        return pa_fs.LocalFileSystem(), tuple(names)
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(store)), tuple(names)


def _names(block: bytes, key: str) -> bool:
    return any(f"{quote}{key}{quote}".encode() in block for quote in "\"'")


def _is_data(name: str, folder: str) -> bool:
    parts = PurePosixPath(name.removeprefix(folder)).parts
    return not any(part.startswith(("_", ".")) for part in parts)


def _form(name: str) -> Format:
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise UserError(
            f"{name}: the suffix does not tell the form; set format to parquet, csv or jsonl, or "
            "choose the files by a glob such as logs/*.parquet"
        )
    return SUFFIXES[suffix]
