"""Text table, its vectors, and the column of text ids: against a dictionary and the raw rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import texts as module
from data_shards.errors import UserError
from data_shards.prompts import PromptConfig, text_id
from data_shards.text_vectors import BLOCK, TextVectors, VectorWriter
from data_shards.texts import TextTable

MADE_BY = {"encoder": "e1"}
PROMPT = PromptConfig(without=("page",))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _strings(texts: list[Any]) -> pa.Array:
    return pa.array(texts, pa.string())


def _many(count: int) -> list[str]:
    return [f"text {i} " + "x" * (i % 7) for i in range(count)]


def _ids(texts: list[Any]) -> np.ndarray:
    return text_id(_strings(texts))


def _check_table(table: TextTable, texts: list[Any]) -> None:
    """The table holds these texts and no others, ascending by id, and looks up as a dictionary."""
    unique = {text or "" for text in texts}
    stored = table.texts.to_pylist()
    assert len(table) == len(stored) == len(unique) and set(stored) == unique
    assert (table.ids[1:] > table.ids[:-1]).all()  # a difference may not fit into an int64
    assert table.ids.tolist() == _ids(stored).tolist()
    places = dict(zip(stored, range(len(stored)), strict=True))
    asked = [*texts, "not there", ""]
    expected = [places.get(text or "", -1) for text in asked]
    assert table.lookup(_ids(asked)).tolist() == expected
    extremes = np.array([-(2**63), 2**63 - 1, 0])
    known = dict(zip(table.ids.tolist(), range(len(table)), strict=True))
    assert table.lookup(extremes).tolist() == [known.get(i, -1) for i in extremes.tolist()]


@settings(max_examples=30)
@given(
    parts=st.lists(st.lists(st.none() | st.text(max_size=9), max_size=30), max_size=6),
    buffer_bytes=st.sampled_from([1, 100, 1 << 20]),
)
def test_a_table_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str | None]], buffer_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("case") / "texts"
    table = TextTable.build(folder, map(_strings, parts), buffer_bytes)
    _check_table(table, [text for part in parts for text in part])
    table.verify()
    assert {path.name for path in folder.iterdir()} == {"ids.i64", "texts.arrow", "texts.json"}


def test_runs_on_disk_and_their_order_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _many(1500) * 2
    whole = TextTable.build(tmp_path / "whole", [_strings(texts)])
    # many small runs, merged in several rounds
    monkeypatch.setattr(module, "_FAN", 3)
    monkeypatch.setattr(module, "_CHUNK", 7)
    parts = (_strings(texts[i : i + 100]) for i in range(2900, -1, -100))
    parted = TextTable.build(tmp_path / "parted", parts, buffer_bytes=500)
    _check_table(parted, texts)
    assert parted.fingerprint == whole.fingerprint
    assert parted.texts.to_pylist() == whole.texts.to_pylist()


def test_tables_of_several_processes_become_one(tmp_path: Path) -> None:
    texts = _many(900)
    one = TextTable.build(tmp_path / "one", [_strings(texts[:500])])
    two = TextTable.build(tmp_path / "two", [_strings(texts[300:])])
    both = TextTable.build(tmp_path / "both", (*one.texts.chunks, *two.texts.chunks))
    _check_table(both, texts)
    alone = TextTable.build(tmp_path / "alone", [_strings(texts)])
    assert both.fingerprint == alone.fingerprint != one.fingerprint


def test_what_a_killed_builder_left_does_not_matter(tmp_path: Path) -> None:
    def killed() -> Any:
        yield _strings(_many(50))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextTable.build(tmp_path / "texts", killed(), buffer_bytes=1)
    with pytest.raises(UserError, match="texts.json: missing, so it was never finished"):
        TextTable.open(tmp_path / "texts")
    _check_table(TextTable.build(tmp_path / "texts", [_strings(["a"])]), ["a"])
    with pytest.raises(UserError, match="texts: exists already; give another path or delete it"):
        TextTable.build(tmp_path / "texts", [])


def _colliding() -> tuple[str, str]:
    """Two texts of one xxHash64: whatever the first 8 bytes are, some next 8 lead to one state."""
    p1, p2, p5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x27D4EB2F165667C5
    p4, full = 0x85EBCA77C2B2AE63, 2**64 - 1

    def rotated(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) & full

    def after(state: int, word: bytes) -> int:
        mixed = rotated(int.from_bytes(word, "little") * p2 & full, 31) * p1 & full
        return (rotated(state ^ mixed, 27) * p1 + p4) & full

    def leading(state: int, end: int) -> bytes:
        mixed = rotated((end - p4) * pow(p1, -1, 2**64) & full, 64 - 27) ^ state
        word = rotated(mixed * pow(p1, -1, 2**64) & full, 64 - 31) * pow(p2, -1, 2**64)
        return (word & full).to_bytes(8, "little")

    start = p5 + 16
    end = after(after(start, b"one text"), b" of many")
    for number in range(10**5):
        first = f"{number:08d}".encode()
        try:
            return "one text of many", (first + leading(after(start, first), end)).decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])
def test_two_texts_of_one_id_are_named(tmp_path: Path, buffer_bytes: int) -> None:
    one, other = _colliding()
    assert one != other and _ids([one]) == _ids([other])
    parts = [_strings(["a", one]), _strings(["b", other])]
    with pytest.raises(UserError, match=f"two texts have the id {_ids([one])[0]}: ") as error:
        TextTable.build(tmp_path / "texts", parts, buffer_bytes)
    assert repr(one) in str(error.value) and repr(other) in str(error.value)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    table = TextTable.build(tmp_path / "texts", [_strings(["first", "second", "third"])])
    arrow, ids = tmp_path / "texts" / "texts.arrow", tmp_path / "texts" / "ids.i64"
    said, whole = (tmp_path / "texts" / "texts.json").read_text(), arrow.read_bytes()
    del table
    arrow.write_bytes(whole.replace(b"second", b"sekond"))
    with pytest.raises(UserError, match=r"texts.arrow: text \d is not the one that was written"):
        TextTable.open(tmp_path / "texts").verify()
    arrow.write_bytes(whole[:200])
    with pytest.raises(UserError, match="texts.arrow: not readable .*write the table again"):
        TextTable.open(tmp_path / "texts")
    with pa.ipc.new_file(str(arrow), pa.schema([("text", pa.string())])):
        pass
    with pytest.raises(UserError, match="texts.arrow: its number of texts is 0, expected 3"):
        TextTable.open(tmp_path / "texts")
    arrow.write_bytes(whole)
    data = ids.read_bytes()
    ids.write_bytes(data[:-8])
    with pytest.raises(UserError, match="ids.i64: its size in bytes is 16, expected 24"):
        TextTable.open(tmp_path / "texts")
    ids.write_bytes(data[8:] + data[:8])
    with pytest.raises(UserError, match="ids.i64: its sha256 is"):
        TextTable.open(tmp_path / "texts").verify()
    changed = json.dumps(json.loads(said) | {"format": 2})
    (tmp_path / "texts" / "texts.json").write_text(changed)
    with pytest.raises(UserError, match="its format is 2, expected 1"):
        TextTable.open(tmp_path / "texts")


def _vectors(texts: list[str], width: int) -> torch.Tensor:
    """A function of the text alone, exact in every type."""
    seeds = _ids(texts)[:, None] >> np.arange(width)
    return torch.from_numpy(seeds % 64).float() / 8


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TextTable:
    texts = _strings(_many(2 * BLOCK + 77))
    return TextTable.build(tmp_path_factory.mktemp("table") / "texts", [texts])


def _write(writer: VectorWriter, blocks: list[int], width: int) -> None:
    for block in blocks:
        writer.put(block, _vectors(writer.texts(block), width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_vectors_come_back_as_they_were(
    table: TextTable, tmp_path: Path, dtype: str, ranks: int
) -> None:
    folder, width = tmp_path / "vectors", 5
    killed = VectorWriter(folder, table, width, dtype, MADE_BY)
    _write(killed, killed.todo[1:2], width)
    writers = [VectorWriter(folder, table, width, dtype, MADE_BY, r, ranks) for r in range(ranks)]
    assert sorted(block for writer in writers for block in writer.todo) == [0, 2]
    for writer in writers:
        _write(writer, writer.todo, width)
    writers[-1].finish()
    vectors = TextVectors.open(folder, table, MADE_BY)
    vectors.verify()
    asked = [*_many(100)[::-1], "text 3 xxx", "not there", "nor this", "text 3 xxx"]
    found, missing = vectors.gather(np.append(_ids(asked), 0))
    expected = _vectors([*asked, ""], width).to(DTYPES[dtype])
    expected[-4:-2] = expected[-1] = 0
    assert found.dtype == DTYPES[dtype] and found.shape == (len(asked) + 1, width)
    assert torch.equal(found, expected) and missing == 2
    assert vectors.gather(np.array([0]))[1] == 0, "the id of padding"
    size = (folder / "vectors.bin").stat().st_size
    assert size == len(table) * width * found.element_size()


def test_an_empty_table_has_no_vectors(tmp_path: Path) -> None:
    empty = TextTable.build(tmp_path / "texts", [])
    VectorWriter(tmp_path / "vectors", empty, 3, "float16", {}).finish()
    found, missing = TextVectors.open(tmp_path / "vectors", empty).gather(np.array([5, 0]))
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float16)) and missing == 1


def test_vectors_that_do_not_belong_are_refused(table: TextTable, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    other = TextTable.build(tmp_path / "texts", [_strings(["another"])])
    writer = VectorWriter(folder, table, 2, "bfloat16", MADE_BY)
    _write(writer, writer.todo[:-1], 2)
    with pytest.raises(UserError, match="vectors.json: missing, so it was never finished"):
        TextVectors.open(folder, table)
    with pytest.raises(UserError, match="1 of 3 blocks are not written, first block 2"):
        writer.finish()
    with pytest.raises(UserError, match="begun with other choices .they differ in width, dtype."):
        VectorWriter(folder, table, 3, "float32", MADE_BY)
    with pytest.raises(AssertionError):
        writer.put(2, torch.zeros(77, 3))
    _write(writer, writer.todo[-1:], 2)
    writer.finish()
    with pytest.raises(UserError, match="its text table is .*, expected "):
        TextVectors.open(folder, other)
    with pytest.raises(UserError, match="its made_by.encoder is 'e1', expected 'e2'"):
        TextVectors.open(folder, table, {"encoder": "e2"})
    with pytest.raises(UserError, match="vectors: exists already"):
        VectorWriter(folder, table, 2, "bfloat16", MADE_BY)
    with pytest.raises(UserError, match="unknown type of vectors 'float8'; the nearest is"):
        VectorWriter(tmp_path / "new", table, 2, "float8", {})
    with pytest.raises(UserError, match="the width of vectors is 1 or more, not 0"):
        VectorWriter(tmp_path / "new", table, 0, "float32", {})


def test_damaged_vectors_are_refused(table: TextTable, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    writer = VectorWriter(folder, table, 2, "float16", MADE_BY)
    _write(writer, writer.todo, 2)
    writer.finish()
    with (folder / "vectors.bin").open("r+b") as file:
        file.write(b"??")
    with pytest.raises(UserError, match="vectors.bin: its sha256 is .*write it again"):
        TextVectors.open(folder, table).verify()
    size = len(table) * 4
    (folder / "vectors.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"its size in bytes is 0, expected {size}"):
        TextVectors.open(folder, table)
    manifest = folder / "vectors.json"
    content = json.loads(manifest.read_text())
    for key, value in (("count", 7), ("format", 3)):
        manifest.write_text(json.dumps(content | {key: value}))
        with pytest.raises(UserError, match=f"its {key} is {value}, expected"):
            TextVectors.open(folder, table)
