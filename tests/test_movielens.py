"""MovieLens: the published counts on the real files, and every malformed line named."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_shards.errors import UserError
from data_shards.schema import Field, Schema
from data_shards.sources import MovieLens, MovieLensConfig
from data_shards.sources.movielens import OCCUPATIONS
from data_shards.splits import SplitConfig
from data_shards.writer import write_shards

SCHEMA = Schema((Field("user", "id"), Field("movie", "id"), Field("genres", "id", multi=True)))


def _rows(path: Path, **options: Any) -> pa.Table:
    config = MovieLensConfig(path=str(path), **options)
    return pa.concat_tables(list(MovieLens(config).read(0, Counter())))


def test_mlora_split_by_gender(movielens_zip: Path, tmp_path: Path) -> None:
    source = MovieLens(MovieLensConfig(path=str(movielens_zip)))
    index = write_shards(source, SCHEMA, SplitConfig(), tmp_path / "shards")
    rows = Counter()
    for (_, split), count in index.counts().items():
        rows[split] += count
    assert rows == {"train": 600_125, "valid": 200_042, "test": 200_042}
    assert index.domains == ("F", "M") and index.dropped == {}


def test_published_counts(movielens_zip: Path) -> None:
    rows = _rows(movielens_zip)
    assert len(rows) == 1_000_209
    assert rows["row_id"].to_pylist() == list(range(1_000_209))
    assert len(rows["user"].unique()) == 6_040 and len(rows["movie"].unique()) == 3_706
    assert all(rows[name].null_count == 0 for name in rows.column_names)
    first = rows.slice(0, 1).to_pylist()[0]
    assert first == {
        "row_id": 0,
        "label": 1.0,
        "time": 978300760,
        "user": "1",
        "gender": "F",
        "age": "1",
        "occupation": "10",
        "zip": "48067",
        "domain": "F",
        "movie": "1193",
        "title": "One Flew Over the Cuckoo's Nest (1975)",
        "genres": ["Drama"],
        "year": "1975",
    }


def test_three_stars_are_dropped_and_counted(movielens_zip: Path) -> None:
    source = MovieLens(MovieLensConfig(path=str(movielens_zip), label="drop_three"))
    dropped = Counter()
    rows = pa.concat_tables(list(source.read(0, dropped)))
    assert len(rows) == 739_012
    assert dropped == {"three_stars": 261_197}
    assert sum(rows["label"].to_pylist()) == 575_281


def test_domains_by_age_and_occupation(movielens_zip: Path) -> None:
    age3 = Counter(_rows(movielens_zip, domains="age3")["domain"].to_pylist())
    assert age3 == {"age_1_18": 210_747, "age_25": 395_556, "age_35_56": 393_906}
    ages = set(_rows(movielens_zip, domains="age")["domain"].unique().to_pylist())
    assert ages == {f"age_{age}" for age in (1, 18, 25, 35, 45, 50, 56)}
    rows = _rows(movielens_zip, domains="occupation")
    pairs = {tuple(pair.values()) for pair in rows.select(["occupation", "domain"]).to_pylist()}
    assert pairs == {(str(number), name) for number, name in enumerate(OCCUPATIONS)}
    assert OCCUPATIONS[12] == "programmer" and len(OCCUPATIONS) == 21


RATINGS = "1::10::5::978300760\n2::11::3::978300761\n1::11::1::978300762\n"
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n"
MOVIES = "10::Café: a story (1995)::Drama|Comedy\n11::Untitled::War\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("ratings", RATINGS), ("users", USERS), ("movies", MOVIES)):
        (tmp_path / f"{name}.dat").write_bytes(text.encode("latin-1"))
    return tmp_path


def test_an_unpacked_folder_reads_alike(folder: Path) -> None:
    rows = _rows(folder)
    assert rows["title"].to_pylist() == ["Café: a story (1995)", "Untitled", "Untitled"]
    assert rows["year"].to_pylist() == ["1995", None, None]
    assert rows["genres"].to_pylist() == [["Drama", "Comedy"], ["War"], ["War"]]
    assert rows["label"].to_pylist() == [1, 0, 0]
    assert _rows(folder, label="drop_three")["row_id"].to_pylist() == [0, 2]


def test_all_users_are_one_domain_and_codes_can_be_words(folder: Path) -> None:
    rows = _rows(folder, domains="all", words=True)
    assert rows["domain"].to_pylist() == ["movielens"] * 3
    told = rows.select(["gender", "age", "occupation"]).to_pylist()
    assert list(told[0].values()) == ["female", "under 18", "k 12 student"]
    assert list(told[1].values()) == ["male", "56 or more", "self employed"]


@pytest.mark.parametrize(
    ("file", "line", "text", "expected"),
    [
        ("ratings", 2, "2::11::6::978300761", "expected user::movie::stars 1-5::seconds"),
        ("ratings", 2, "2::11::3", "expected user::movie::stars 1-5::seconds"),
        ("ratings", 1, "", "expected user::movie::stars 1-5::seconds"),
        ("ratings", 3, "1,11,1,978300762", "expected user::movie::stars 1-5::seconds"),
        ("ratings", 3, "1::11::1::978300762::9", "expected user::movie::stars 1-5::seconds"),
        ("users", 1, "1::X::1::10::48067", "expected user::F or M::age group::occupation 0-20"),
        ("users", 2, "2::M::56::21::70072", "expected user::F or M::age group::occupation 0-20"),
        ("users", 2, "2::M::57::16::70072", "expected user::F or M::age group::occupation 0-20"),
        ("movies", 2, "11::Untitled", "expected movie::title::genre"),
    ],
)
def test_a_malformed_line_is_named(
    folder: Path, file: str, line: int, text: str, expected: str
) -> None:
    path = folder / f"{file}.dat"
    lines = path.read_text("latin-1").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), "latin-1")
    with pytest.raises(UserError, match=rf"{file}.dat line {line} is '{text}'; {expected}"):
        _rows(folder)


def test_ids_that_a_side_file_lacks_are_named(folder: Path) -> None:
    (folder / "movies.dat").write_text(MOVIES.split("\n")[0] + "\n", "latin-1")
    with pytest.raises(UserError, match="ratings.dat line 2 names movie 11, which movies.dat"):
        _rows(folder)
    (folder / "users.dat").write_text(USERS.split("\n")[0] + "\n")
    with pytest.raises(UserError, match="ratings.dat line 2 names user 2, which users.dat"):
        _rows(folder)


def test_a_file_that_was_cut_is_named(folder: Path) -> None:
    (folder / "ratings.dat").write_text(RATINGS[:-3])
    with pytest.raises(UserError, match="ratings.dat ends in the middle of line 3; fetch it again"):
        _rows(folder)


def test_missing_files_are_named(folder: Path, movielens_zip: Path) -> None:
    (folder / "users.dat").unlink()
    with pytest.raises(UserError, match="users.dat: no such file; give ml-1m.zip or the folder"):
        _rows(folder)
    with pytest.raises(UserError, match="nowhere.zip: no such file"):
        _rows(folder / "nowhere.zip")
    cut = folder / "cut.zip"
    cut.write_bytes(movielens_zip.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="cut or corrupt at ml-1m/ratings.dat .*; fetch it again"):
        _rows(cut)
    content = bytearray(movielens_zip.read_bytes())
    content[1_000_000] ^= 255
    cut.write_bytes(content)
    with pytest.raises(UserError, match="cut or corrupt at ml-1m/ratings.dat"):
        _rows(cut)


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("ml-20m/ratings.csv", "")
    with pytest.raises(UserError, match="no ml-1m/ratings.dat inside; give MovieLens-1M"):
        _rows(tmp_path / "other.zip")


def test_unknown_choices_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="domains are gender, age, occupation, age3, all, not"):
        _rows(folder, domains="zip")
    with pytest.raises(UserError, match="label is five_stars or drop_three, not 'four_stars'"):
        _rows(folder, label="four_stars")
