"""Adapters on disk: `<root>/<method>/<domain>/<version>/`, a version written once, never changed.

A version holds `adapter.safetensors`, `vocabulary.arrow` (the domain's own ids) and
`adapter.json`, which carries the SHA-256 of the other two and the fingerprint of the trunk that
the adapter was trained on: on another trunk its numbers mean nothing, so loading it there is an
error.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import safetensors.torch
from torch import Tensor

from data_shards.durable import flush
from data_shards.errors import UserError, unknown
from trainer.fence import fence
from trainer.tensor_file import pieces, read_small, write_file

FORMAT = 1
MANIFEST, TENSORS, VOCABULARY = "adapter.json", "adapter.safetensors", "vocabulary.arrow"
_FACTS = {
    "method": str,
    "domain": str,
    "version": int,
    "trunk": str,
    "schema": str,
    "data": str,
    "metrics": dict,
    "kept": bool,
}
_VOCABULARY_SCHEMA = pa.schema({"field": pa.string(), "values": pa.list_(pa.string())})


@dataclass(frozen=True, eq=False)
class Adapter:
    """One domain's own parameters, and what they were trained on."""

    method: str
    domain: str
    version: int  # given by the store when it saves
    trunk: str  # fingerprint of the shared part
    schema: str
    data: str
    metrics: dict[str, object]
    kept: bool  # it beat the shared part on validation rows
    tensors: dict[str, Tensor]
    # Per field, the domain's own ids in the order of their extension rows.
    vocabulary: dict[str, tuple[str, ...]] = field(default_factory=dict)


class AdapterStore:
    """The adapters under `root`, which is made when the first one is saved."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def save(self, adapter: Adapter) -> Path:
        """Write the next version and return its folder; a failed save leaves no file behind."""
        home = self.home(adapter.method, adapter.domain)
        with _write_errors(home), _new_folder(home) as folder:
            digests = {
                TENSORS: write_file(folder / TENSORS, pieces(adapter.tensors)),
                VOCABULARY: write_file(
                    folder / VOCABULARY, [_vocabulary_bytes(adapter.vocabulary)]
                ),
            }
            while True:
                version = max(_versions(home), default=0) + 1
                write_file(
                    folder / MANIFEST, [_manifest(replace(adapter, version=version), digests)]
                )
                if _publish(folder, home / str(version)):
                    return home / str(version)

    def load(self, method: str, domain: str, version: int | None = None, *, trunk: str) -> Adapter:
        """The newest version, or the one asked for, checked against its digests and `trunk`."""
        folder = self._folder(method, domain, version)
        _require_plain(folder)
        facts, digests = _read_manifest(folder / MANIFEST)
        if facts["trunk"] != trunk:
            raise UserError(
                f"adapter {folder} was trained on trunk {facts['trunk']}, this trunk is {trunk}; "
                "load the checkpoint it was trained on, or add the domain again on this one"
            )
        return Adapter(
            **facts,
            tensors=safetensors.torch.load(_checked(folder / TENSORS, digests)),
            vocabulary=_vocabulary(_checked(folder / VOCABULARY, digests)),
        )

    def domains(self, method: str) -> tuple[str, ...]:
        """The domains that have an adapter, sorted."""
        homes = (self._root / quoted(method)).glob("*")
        return tuple(sorted(unquote(home.name) for home in homes if _versions(home)))

    def remove(self, method: str, domain: str) -> None:
        """Remove all that is kept of one domain, unless it is adapted now; nothing else moves."""
        home = self._folder(method, domain, None).parent
        with fence(home, patience=1.0):
            # One rename takes it out of sight, so that a cut removal leaves no half adapter.
            doomed = Path(tempfile.mkdtemp(prefix=".removed-", dir=self._root))
            os.rename(home, doomed / home.name)
            shutil.rmtree(doomed)

    def digest(self, method: str, domain: str) -> str:
        """SHA-256 over the bytes of the newest version, by file name."""
        total = hashlib.sha256()
        for path in sorted(self._folder(method, domain, None).iterdir()):
            total.update(f"{path.name} {_sha256(path.read_bytes())}\n".encode())
        return total.hexdigest()

    def home(self, method: str, domain: str) -> Path:
        """Where all versions of one domain lie."""
        return self._root / quoted(method) / quoted(domain)

    def _folder(self, method: str, domain: str, version: int | None) -> Path:
        home = self.home(method, domain)
        versions = _versions(home)
        if not versions:
            raise unknown(f"domain with a {method} adapter", domain, self.domains(method))
        if version is not None and version not in versions:
            known = ", ".join(map(str, sorted(versions)))
            raise UserError(f"no version {version} of adapter {home}; there are: {known}")
        return home / str(version or max(versions))


def quoted(name: str) -> str:
    """A name as one folder's name; dots too, so that none is hidden, `.` or `..`."""
    if not name:
        raise UserError("an adapter's method and domain need a name of at least one character")
    return quote(name, safe="").replace(".", "%2E")


def _versions(home: Path) -> set[int]:
    """Folders with a number for a name; a link to another place is none."""
    found = (path for path in home.glob("*") if path.name.isdecimal())
    return {int(path.name) for path in found if path.is_dir() and not path.is_symlink()}


@contextmanager
def _write_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not save adapter {home}: {error.strerror}; nothing was written. "
            "Free space there or mend the folder's rights, and save again"
        ) from error


@contextmanager
def _new_folder(home: Path) -> Iterator[Path]:
    """A temporary folder beside the versions, gone at the end unless renamed."""
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> bool:
    """Rename `folder` to `target` for good; False where another process has just made it."""
    flush(folder)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    flush(target.parent)
    return True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _require_plain(folder: Path) -> None:
    """A version holds plain files of these three names: what a copy from elsewhere adds, such as a
    link to another place, is refused before anything is read."""
    for path in sorted(folder.iterdir()):
        if path.name not in (MANIFEST, TENSORS, VOCABULARY) or not _plain(path):
            raise UserError(
                f"{path}: not a plain file of an adapter; expected {MANIFEST}, {TENSORS} and "
                f"{VOCABULARY} alone: take the folder from a source you trust"
            )


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _checked(path: Path, digests: dict[str, str]) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    if _sha256(content) != digests[path.name]:
        raise UserError(
            f"{path} is missing or damaged: its SHA-256 is not the {digests[path.name]} that "
            f"{MANIFEST} names; copy the folder again, or load an older version"
        )
    return content


def _manifest(adapter: Adapter, digests: dict[str, str]) -> bytes:
    facts = {"format": FORMAT} | {name: vars(adapter)[name] for name in _FACTS}
    return json.dumps(facts | {"sha256": digests}, indent=2, allow_nan=False).encode()


def _read_manifest(path: Path) -> tuple[dict, dict[str, str]]:
    """The facts and the digests of one `adapter.json`, by name and type."""
    expected = _FACTS | {"format": int, "sha256": dict}
    try:
        found = json.loads(read_small(path))
        wrong = [key for key, kind in expected.items() if type(found[key]) is not kind]
        wrong += [name for name in (TENSORS, VOCABULARY) if name not in found["sha256"]]
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is missing or cut ({error}); copy the folder again, or load an older version"
        ) from error
    if wrong or found["format"] != FORMAT:
        at = wrong[0] if wrong else f"format {found['format']}"
        raise UserError(f"{path} is not of format {FORMAT} (see {at!r}); add the domain again")
    return {key: found[key] for key in _FACTS}, found["sha256"]


def _vocabulary_bytes(vocabulary: dict[str, tuple[str, ...]]) -> bytes:
    sink = pa.BufferOutputStream()
    columns = [list(vocabulary), [list(values) for values in vocabulary.values()]]
    with pa.ipc.new_file(sink, _VOCABULARY_SCHEMA) as writer:
        writer.write(pa.record_batch(columns, schema=_VOCABULARY_SCHEMA))
    return sink.getvalue().to_pybytes()


def _vocabulary(content: bytes) -> dict[str, tuple[str, ...]]:
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    return {row["field"]: tuple(row["values"]) for row in table.to_pylist()}
