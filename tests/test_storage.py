"""Storage: local files and object stores give the same bytes, and errors that name the file."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import LostError, UserError
from data_shards.storage import BlockCache, LocalStorage, RemoteStorage, Storage, open_storage

DATA = bytes(range(256)) * 8


class FlakyStore(MemoryFileSystem):
    """A store in memory whose first readings fail."""

    protocol = "flaky"
    failures = 0
    readings = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        FlakyStore.readings += 1
        if FlakyStore.readings <= FlakyStore.failures:
            raise TimeoutError("the store took too long")
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("flaky", FlakyStore, clobber=True)


@pytest.fixture(params=["path", "file://", "memory://"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(DATA)
    if request.param == "path":
        yield open_storage(tmp_path)
    elif request.param == "file://":
        yield open_storage(f"file://{tmp_path}")
    else:
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/set/sub/data.bin", DATA)
        yield open_storage("memory://set")
        memory.rm("/set", recursive=True)


def test_files_are_read_whole_and_in_part(storage: Storage) -> None:
    name = "sub/data.bin"
    assert storage.read(name) == DATA and storage.size(name) == len(DATA)
    assert storage.exists(name) and not storage.exists("other") and storage.size("other") is None
    for offset, size in ((0, 10), (300, 256), (2000, 48), (2000, 100), (5000, 3), (7, 0)):
        assert storage.read_range(name, offset, size) == DATA[offset : offset + size]


def test_what_cannot_be_read_is_named(storage: Storage) -> None:
    with pytest.raises(UserError, match=f"{storage}/nothing.*could not be read"):
        storage.read("nothing")
    with pytest.raises(UserError, match=f"{storage}/nothing.*could not be read"):
        storage.read_range("nothing", 0, 5)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_names_stay_inside_of_the_location(storage: Storage, name: str) -> None:
    with pytest.raises(UserError, match="is no name of a file inside a shard set"):
        storage.read(name)


def test_a_pipe_or_a_folder_is_no_file_and_nobody_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="not a plain file"):
            LocalStorage(tmp_path).read_range(name, 0, 5)


@pytest.fixture
def flaky() -> Iterator[RemoteStorage]:
    FlakyStore.readings = FlakyStore.failures = 0
    storage = RemoteStorage("flaky://set", waits=(0.0, 0.0))
    fsspec.filesystem("flaky").pipe_file("/set/data.bin", DATA)
    yield storage
    fsspec.filesystem("flaky").rm("/set", recursive=True)


def test_what_may_pass_is_tried_again(flaky: RemoteStorage) -> None:
    FlakyStore.failures = 2
    assert flaky.read_range("data.bin", 5, 20) == DATA[5:25]
    assert FlakyStore.readings == 3


def test_what_does_not_pass_is_an_error_in_the_end(flaky: RemoteStorage) -> None:
    FlakyStore.failures = 99
    wanted = (
        r"data.bin: could not be read \(the store took too long\), after 3 tries; start the same"
    )
    with pytest.raises(LostError, match=wanted):
        flaky.read_range("data.bin", 5, 20)
    assert FlakyStore.readings == 3


def test_what_is_not_there_is_asked_for_once(flaky: RemoteStorage) -> None:
    with pytest.raises(UserError, match="flaky://set/other"):
        flaky.read("other")
    assert FlakyStore.readings == 1


def test_a_url_of_no_known_store_says_so() -> None:
    with pytest.raises(UserError, match="nosuch://set: cannot be opened .*fsspec driver"):
        open_storage("nosuch://set")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digests(data: bytes) -> tuple[str, str]:
    return _digest(data), xxhash.xxh3_64_hexdigest(data)


def _never() -> bytes:
    raise AssertionError("fetched again")


def test_a_block_is_fetched_once(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20)
    assert cache.get(*_digests(DATA), lambda: DATA) == DATA
    assert cache.get(*_digests(DATA), _never) == DATA
    assert BlockCache(tmp_path / "cache", 1 << 20).get(*_digests(DATA), _never) == DATA


def test_a_damaged_or_cut_block_is_fetched_again(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    cache.get(*_digests(DATA), lambda: DATA)
    for damaged in (DATA[:-1], b"", DATA[:5] + b"!" + DATA[6:]):
        (tmp_path / _digest(DATA)).write_bytes(damaged)
        assert cache.get(*_digests(DATA), lambda: DATA) == DATA
        assert cache.get(*_digests(DATA), _never) == DATA


def test_what_is_not_the_block_is_handed_on_but_not_kept(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    assert cache.get(*_digests(DATA), lambda: b"other") == b"other"
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 30), max_size=60))
def test_the_cache_keeps_to_its_limit(blocks: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "of the user").write_bytes(b"x" * 9000)
        cache = BlockCache(Path(folder), 4096)
        for number in blocks:
            data = bytes([number]) * 200
            assert cache.get(*_digests(data), lambda data=data: data) == data
            kept = [p for p in Path(folder).iterdir() if p.name != "of the user"]
            assert sum(path.stat().st_size for path in kept) <= 4096
        assert (Path(folder) / "of the user").exists()


def test_the_least_recently_read_go_first(tmp_path: Path) -> None:
    blocks = [bytes([n]) * 100 for n in range(16)]
    cache = BlockCache(tmp_path, 1600)
    for age, data in enumerate(blocks):
        cache.get(*_digests(data), lambda data=data: data)
        if (path := tmp_path / _digest(data)).exists():
            os.utime(path, (age, age))
    cache.get(*_digests(blocks[3]), _never)
    BlockCache(tmp_path, 800)
    left = {n for n, data in enumerate(blocks) if (tmp_path / _digest(data)).exists()}
    assert left == {3, 10, 11, 12, 13, 14, 15}


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 14)
    wrong: list[int] = []

    def work(start: int) -> None:
        for n in range(200):
            data = bytes([(start + n) % 50]) * 500
            if cache.get(*_digests(data), lambda data=data: data) != data:
                wrong.append(n)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 13, 26, 39)))
    assert not wrong


def test_a_cache_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache folder .*file.*reading.cache_bytes"):
        BlockCache(tmp_path / "file", 1 << 20)
    with pytest.raises(UserError, match="'../x' is no SHA-256"):
        BlockCache(tmp_path, 1 << 20).get("../x", "", _never)
