"""Where a shard set lies: a local folder or an object store's URL; files by name and byte range.

Credentials and endpoints of a store come from its driver's own environment (`FSSPEC_S3_KEY`, ...).
"""

import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Protocol, TypeVar

import fsspec
import xxhash

from data_shards.errors import PASSING, LostError, UserError

T = TypeVar("T")
Location = Path | str
"""A local folder, or any URL that fsspec knows."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".block-"


class Storage(Protocol):
    """Files by their names under one location; every error is a UserError that names the file."""

    def read(self, name: str) -> bytes:
        """A whole file."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only where the file ends before."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...


def open_storage(location: Location) -> Storage:
    """The storage at a local path or at any URL that fsspec knows."""
    text = str(location)
    if "://" not in text or text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    return RemoteStorage(text)


@lru_cache(1024)
def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise UserError(f"{name!r} is no name of a file inside a shard set; restore its index")
    return name


class LocalStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        size = self.size(name)
        return self.read_range(name, 0, 1 if size is None else size)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = f"{self.folder}/{_plain(name)}"  # in a third of a Path's time
        try:
            # a named pipe would make a blocking open wait for ever
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError("not a plain file")
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        except (OSError, OverflowError, MemoryError) as error:
            raise _unreadable(path, error) from error

    def size(self, name: str) -> int | None:
        path = self.folder / _plain(name)
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(path, error) from error

    def exists(self, name: str) -> bool:
        return self.size(name) is not None


class RemoteStorage:
    """An fsspec URL; what may pass (timeouts, resets) is tried again after each of the `waits`."""

    def __init__(self, url: str, waits: tuple[float, ...] = (0.5, 1.0, 2.0)) -> None:
        self.url = url.rstrip("/")
        self.waits = waits
        try:
            self._store, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url}: cannot be opened ({error}); check the URL, or install its fsspec driver"
            ) from error
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        return self._try(name, self._store.cat_file)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        return self._try(name, lambda path: self._store.cat_file(path, offset, offset + size))

    def size(self, name: str) -> int | None:
        def info(path: str) -> int | None:
            try:
                return self._store.info(path)["size"]
            except FileNotFoundError:
                return None

        return self._try(name, info)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def _try(self, name: str, read: Callable[[str], T]) -> T:
        path = f"{self._root}/{_plain(name)}"
        for wait in (*self.waits, None):
            try:
                return read(path)
            except Exception as error:  # each driver raises classes of its own
                if isinstance(error, _FINAL):
                    raise _unreadable(f"{self.url}/{name}", error) from error
                if wait is None:
                    raise LostError(
                        f"{self.url}/{name}: could not be read ({_why(error)}), after "
                        f"{len(self.waits) + 1} tries; start the same command again when its "
                        "store can be reached"
                    ) from error
                time.sleep(wait)
        raise AssertionError


def _unreadable(path: Path | str, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno in PASSING:
        return LostError(
            f"{path}: could not be read ({_why(error)}); start the same command again when its "
            "disk answers"
        )
    return UserError(
        f"{path}: could not be read ({_why(error)}); "
        "check that it is there, that it may be read and that its store can be reached"
    )


def _why(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said or type(error).__name__


class BlockCache:
    """Blocks on local disk by the SHA-256 of their bytes, so that any number of processes share it.

    The least recently read go first. A process looks at the whole folder after every sixteenth of
    `limit` that it adds, and then leaves at most seven eighths of `limit` bytes there.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._added = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._trim()

    def get(self, sha256: str, xxh3: str, fetch: Callable[[], bytes]) -> bytes:
        """The block of this SHA-256: from disk if it is whole there, else what `fetch` gives.

        Whole is what has this XXH3. Nothing else is kept; to judge what is fetched is the caller's
        part.
        """
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{sha256!r} is no SHA-256; restore the index of the shard set")
        path = self.folder / sha256
        try:
            data = path.read_bytes()
            if xxhash.xxh3_64_hexdigest(data) == xxh3:
                os.utime(path)
                return data
        except FileNotFoundError:
            pass  # never there, or trimmed by another process since
        except OSError as error:
            raise self._unwritable(error) from error
        data = fetch()
        if xxhash.xxh3_64_hexdigest(data) == xxh3:
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        if len(data) > self.limit // 16:
            return
        try:
            with NamedTemporaryFile(dir=self.folder, prefix=_PARTIAL, delete=False) as file:
                file.write(data)
            with suppress(FileNotFoundError):  # trimmed by another process before it had its name
                os.replace(file.name, path)
        except OSError as error:
            raise self._unwritable(error) from error
        self._added += len(data)
        if self._added > self.limit // 16:
            self._trim()

    def _trim(self) -> None:
        self._added = 0
        found = sorted(_files(self.folder), reverse=True)
        kept = 0
        for _, size, path in found:
            kept += size
            if kept > self.limit // 8 * 7:
                path.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cache folder {self.folder}: {error.strerror or error}; free some space there, lower "
            "reading.cache_bytes, or set another reading.cache_dir"
        )


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of the last reading, bytes, path) of the cache's own files, and of no others."""
    found = []
    own = (p for p in folder.iterdir() if _SHA256.fullmatch(p.name) or p.name.startswith(_PARTIAL))
    for path in own:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # trimmed by another process
        found.append((status.st_mtime, status.st_size, path))
    return found
