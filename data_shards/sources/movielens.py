"""MovieLens-1M in its original layout: a zip or an unpacked folder of three `::` separated files.

One regular expression per file both checks and splits its lines, so a malformed line is known by
its number and nothing is guessed.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.schema import Field

CHUNK_ROWS = 1 << 16
RATINGS = r"^(?P<user>\d{1,9})::(?P<movie>\d{1,9})::(?P<stars>[1-5])::(?P<time>\d{1,12})$"
USERS = (
    r"^(?P<user>\d{1,9})::(?P<gender>[FM])::(?P<age>1|18|25|35|45|50|56)"
    r"::(?P<occupation>1?\d|20)::(?P<zip>[^:]+)$"
)
MOVIES = r"^(?P<movie>\d{1,9})::(?P<title>.+)::(?P<genres>[^:]+)$"
OCCUPATIONS = (
    "other academic_educator artist clerical_admin college_grad_student customer_service "
    "doctor_health_care executive_managerial farmer homemaker k_12_student lawyer programmer "
    "retired sales_marketing scientist self_employed technician_engineer tradesman_craftsman "
    "unemployed writer"
).split()
AGE3 = {"1": "age_1_18", "18": "age_1_18", "25": "age_25"}
DOMAINS = ("gender", "age", "occupation", "age3", "all")
GENDERS = {"F": "female", "M": "male"}
AGES = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or more",
}


@dataclass(frozen=True)
class MovieLensConfig:
    """`[data.source]` with kind = "movielens"."""

    path: str
    """`ml-1m.zip`, or the folder that holds its three files."""
    kind: Literal["movielens"] = "movielens"
    label: Literal["five_stars", "drop_three"] = "five_stars"
    """5 stars are positive (MLoRA); or 4 and 5 are, and 3 are left out (UFIN)."""
    domains: Literal["gender", "age", "occupation", "age3", "all"] = "gender"
    """Groups of users, or all of them as the one domain `movielens`."""
    words: bool = False
    """Gender, age and occupation in words, for prompts: male, 25-34, programmer."""

    def __post_init__(self) -> None:
        if self.label not in ("five_stars", "drop_three"):
            raise UserError(f"label is five_stars or drop_three, not {self.label!r}")
        if self.domains not in DOMAINS:
            raise UserError(f"domains are {', '.join(DOMAINS)}, not {self.domains!r}")


class MovieLens:
    """1,000,209 ratings of 3,706 movies by 6,040 users; a domain is a group of users.

    Fields: user, movie, gender, age, occupation, zip, title, year, genres (multi), domain.
    """

    def __init__(self, config: MovieLensConfig, fields: tuple[Field, ...] = ()) -> None:
        self.config = config

    def pieces(self) -> tuple[str, ...]:
        """All in one: the three files are small and joined."""
        return ("ratings.dat",)

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """Rows in the order of ratings.dat; `row_id` is the 0-based line."""
        if self.config.label == "drop_three":
            dropped["three_stars"] += self._ratings.num_rows - self._rows.num_rows
        for start in range(0, self._rows.num_rows, CHUNK_ROWS):
            yield self._rows.slice(start, CHUNK_ROWS)

    def state(self) -> list[Any]:
        """The zip, or the folder's files."""
        path = Path(self.config.path)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the place where they happen to lie."""
        config = self.config
        words = {"words": True} if config.words else {}
        return {"kind": config.kind, "label": config.label, "domains": config.domains, **words}

    @cached_property
    def _ratings(self) -> pa.Table:
        return self._parse("ratings.dat", RATINGS, "user::movie::stars 1-5::seconds")

    @cached_property
    def _users(self) -> pa.Table:
        expected = "user::F or M::age group::occupation 0-20::zip"
        users = self._parse("users.dat", USERS, expected)
        domain = _domain_of(users, self.config.domains)
        users = _in_words(users) if self.config.words else users
        return users.append_column("domain", domain)

    @cached_property
    def _movies(self) -> pa.Table:
        movies = self._parse("movies.dat", MOVIES, "movie::title::genre|genre")
        year = pc.extract_regex(movies["title"], r"\((?P<year>\d{4})\)\s*$")
        movies = movies.append_column("year", pc.struct_field(year, "year"))
        genres = pc.split_pattern(movies["genres"], "|")
        return movies.set_column(movies.column_names.index("genres"), "genres", genres)

    @cached_property
    def _rows(self) -> pa.Table:
        ratings = self._ratings
        stars = pc.cast(ratings["stars"], pa.int8())
        five = self.config.label == "five_stars"
        rows = pa.table(
            {
                "row_id": pa.array(range(len(ratings)), pa.int64()),
                "label": pc.cast(pc.greater(stars, 4 if five else 3), pa.float32()),
                "time": pc.cast(ratings["time"], pa.int64()),
                **self._joined("users.dat", self._users, "user"),
                **self._joined("movies.dat", self._movies, "movie"),
            }
        )
        return rows if five else rows.filter(pc.not_equal(stars, 3))

    def _joined(self, file: str, side: pa.Table, key: str) -> dict[str, pa.ChunkedArray]:
        """The columns of one side for every rating; an id that the side lacks is a UserError."""
        ids = self._ratings[key]
        found = pc.index_in(ids, value_set=side[key].combine_chunks())
        if found.null_count:
            line = pc.index(pc.is_null(found), True).as_py()
            raise UserError(
                f"{self.config.path}: ratings.dat line {line + 1} names {key} {ids[line]}, "
                f"which {file} does not have; take the three files of one release"
            )
        joined = side.take(found)
        return {name: joined[name] for name in side.column_names}

    def _parse(self, member: str, pattern: str, expected: str) -> pa.Table:
        """The named groups of `pattern` as string columns, one row per line."""
        where = f"{self.config.path}: {member}"
        lines = _read(Path(self.config.path), member).decode("latin-1").split("\n")
        if lines.pop():
            raise UserError(f"{where} ends in the middle of line {len(lines) + 1}; fetch it again")
        found = pc.extract_regex(pa.array(lines, pa.string()), pattern)
        if found.null_count:
            bad = pc.index(pc.is_null(found), True).as_py()
            raise UserError(
                f"{where} line {bad + 1} is {lines[bad][:80]!r}; expected {expected}; "
                "mend the line or fetch the file again"
            )
        return pa.Table.from_struct_array(found)


def _domain_of(users: pa.Table, domains: str) -> pa.Array | pa.ChunkedArray:
    if domains == "gender":
        return users["gender"]
    if domains == "all":
        return pa.repeat("movielens", len(users))
    if domains == "age":
        return pc.binary_join_element_wise("age", users["age"], "_")
    if domains == "age3":
        ages = users["age"].to_pylist()
        return pa.array([AGE3.get(age, "age_35_56") for age in ages], pa.string())
    return pa.array(OCCUPATIONS).take(pc.cast(users["occupation"], pa.int32()))


def _in_words(users: pa.Table) -> pa.Table:
    """What the codes of README stand for."""
    occupations = {str(n): name.replace("_", " ") for n, name in enumerate(OCCUPATIONS)}
    for name, words in (("gender", GENDERS), ("age", AGES), ("occupation", occupations)):
        values = pa.array([words[code] for code in users[name].to_pylist()])
        users = users.set_column(users.column_names.index(name), name, values)
    return users


def _read(path: Path, member: str) -> bytes:
    """Bytes of one of the three files."""
    try:
        if path.is_dir():
            return (path / member).read_bytes()
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"ml-1m/{member}")
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file; give ml-1m.zip or the folder that holds {member}"
        ) from error
    except KeyError as error:
        raise UserError(f"{path}: no ml-1m/{member} inside; give MovieLens-1M") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{path}: cut or corrupt at ml-1m/{member} ({error}); fetch it again"
        ) from error
