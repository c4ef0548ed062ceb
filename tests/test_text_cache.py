"""Text vectors of a run: cached equals computed anew, whatever stopped the build or shared it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from data_shards import Index, Loader, Reading, Rows, SplitConfig, UserError, write_shards
from data_shards.loader import Cursor
from data_shards.text_vectors import VectorWriter
from launch.__main__ import main
from launch.group import joined
from tests.gang import gang
from tests.toy_run import digests, here
from tests.toy_source import SCHEMA, toy_rows, toy_source
from tests.toy_text import (
    SIZES,
    alone,
    cache_of,
    cache_text,
    columns_of,
    known_rows,
    text_config,
    told,
)
from trainer.text_build import Built, build
from trainer.text_cache import DTYPES as DTYPE
from trainer.text_cache import TextCache

SIDES = ("user", "item", "context")
DTYPES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}


def _index(worded: Path) -> Index:
    return Index.load(worded / "shards")


def _by_row(worded: Path, cache: TextCache) -> dict[int, Tensor]:
    """The cached vector of each row, as batches get them; those of padding are zeros."""
    index, found = _index(worded), {}
    reading = Reading(global_batch=48, lanes=12, shuffle_rows=64)
    sidecars = cache.open(index)
    loader = Loader(worded / "shards", Rows(index.splits), reading, 0, 1, sidecars=sidecars)
    for batch in loader.batches(Cursor()):
        vectors = cache.vectors(batch.columns)
        assert vectors.dtype == torch.float32 and not vectors[batch.weight == 0].any()
        found |= zip(batch.row_id.tolist(), vectors, strict=True)
    assert -1 in found
    return found


@pytest.mark.parametrize("parts", ["joint", "sides"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_equals_computed_anew(parts: str, dtype: str, worded: Path, tmp_path: Path) -> None:
    changes = [f"text.parts={parts}", f"text.dtype={dtype}", f"text.folder={tmp_path}"]
    assert cache_text(worded, *changes) == 0
    config, rows = text_config(worded, *changes), known_rows(worded)
    texts = [told(config, rows)]
    if parts == "sides":  # the sum of each side encoded on its own
        texts = [told(config, rows, sides=(side,)) for side in SIDES]
        assert len(set(texts[0])) < len(rows), "a user's text stands in many rows"
    expected = torch.stack([alone(config.encoder, part) for part in texts]).sum(0)
    found = _by_row(worded, cache_of(config))
    for row, vector in zip(rows["row_id"].to_pylist(), expected, strict=True):
        tolerance = DTYPES[dtype] * max(float(vector.abs().max()), 1)
        assert torch.allclose(found[row], vector, rtol=0, atol=tolerance)
    size = next(tmp_path.glob("*/text_*/vectors/vectors.bin")).stat().st_size
    table = next(tmp_path.glob("*/text_*/texts/ids.i64")).stat().st_size // 8
    assert size == table * 32 * (4 if dtype == "float32" else 2)


def _kill(patch: pytest.MonkeyPatch, after: int) -> None:
    """The next build is stopped in the place of its put number `after`."""
    puts = iter(range(after))
    put = VectorWriter.put

    def killing(self: VectorWriter, block: int, vectors: Tensor) -> None:
        if next(puts, None) is None:
            raise KeyboardInterrupt
        put(self, block, vectors)

    patch.setattr(VectorWriter, "put", killing)


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_killed_build_goes_on_and_ends_as_an_undisturbed_one(
    after: int, worded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.text_vectors.BLOCK", 16)
    for name in ("whole", "killed"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "killed":
                _kill(patch, after)
            assert cache_text(worded, f"text.folder={tmp_path / name}") == 130 * (name == "killed")
    killed = text_config(worded, f"text.folder={tmp_path / 'killed'}")
    with pytest.raises(UserError, match="not there, or not all; `cache-text RUN_FILE` makes them"):
        cache_of(killed).open(_index(worded))
    assert cache_text(worded, f"text.folder={tmp_path / 'killed'}") == 0
    assert _same(tmp_path / "whole", tmp_path / "killed")


def _same(one: Path, other: Path) -> bool:
    return digests(one, (".",)) == digests(other, (".",)) != {}


def test_a_build_killed_while_it_words_the_rows_begins_anew(
    worded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_shards.text_ids.text_id", _interrupt)
        assert cache_text(worded, f"text.folder={tmp_path}") == 130
    assert list(tmp_path.glob("*/.text_user.writing"))
    assert cache_text(worded, f"text.folder={tmp_path}") == 0
    assert _same(worded / "text", tmp_path)


def _interrupt(texts: pa.Array) -> np.ndarray:
    raise KeyboardInterrupt


@pytest.mark.dist
def test_two_ranks_write_the_bytes_of_one(worded: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_shards.text_vectors.BLOCK", 16)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a gang: they may change a sum's last bit
        assert cache_text(worded, f"text.folder={tmp_path / 'one'}") == 0
        torch.set_num_threads(threads)
    one, other = gang(2, _built, worded, tmp_path / "two")
    assert one == other == (101, {"text_user": 41, "text_item": 101, "text_context": 3}, 145, 83)
    assert _same(tmp_path / "one", tmp_path / "two")


def _built(worded: Path, folder: Path) -> tuple[int, dict[str, int], int, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_shards.text_vectors.BLOCK", 16)
        config = text_config(worded, f"text.folder={folder}")
        built = build(config, config.data.shards, here(), lambda text: None)
    return built.rows, built.texts, built.encoded, built.cut


def test_the_verb_says_what_it_wrote_and_keeps_what_is_there(
    worded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = f"text.folder={tmp_path}"
    for encoded in (145, 0):
        assert cache_text(worded, change, "encoder.max_tokens=8") == 0
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert "101 rows, distinct texts: text_user 41, text_item 101, text_context 3; " in told
        assert f" {encoded} encoded now, {encoded and 141} of them cut at 8 tokens; " in told


def test_a_runs_folder_stands_for_its_run_file(worded: Path, tmp_path: Path) -> None:
    shutil.copy(worded / "run.toml", tmp_path / "run.toml")
    write_shards(toy_source(toy_rows({"books": 5})), SCHEMA, SplitConfig(), tmp_path / "shards")
    options = ["--shards", str(tmp_path / "shards"), "--set", f"text.folder={tmp_path / 'text'}"]
    assert main(["cache-text", str(tmp_path), *options]) == 0
    config = text_config(worded, f"text.folder={tmp_path / 'text'}")
    cache = cache_of(config)
    (*_, context) = cache.open(Index.load(tmp_path / "shards"))
    assert len(context.columns["text_context"]) == 5


def _encoded(worded: Path, rows: pa.Table, cache: TextCache) -> Tensor:
    vocabulary = _index(worded).load_vocabulary(worded / "shards")
    return cache.encode(vocabulary.encode(rows), vocabulary, rows["domain"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [1 << 16, 20])
def test_rows_of_no_shard_are_encoded_on_the_spot_and_counted(
    dtype: str, kept: int, worded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.text_cache.KEPT", kept)
    config = text_config(worded)
    if dtype != "float32":
        config = text_config(worded, f"text.dtype={dtype}", f"text.folder={tmp_path}")
        assert cache_text(worded, f"text.dtype={dtype}", f"text.folder={tmp_path}") == 0
    cache, anew, rows = cache_of(config), cache_of(config), toy_rows(SIZES)
    by_row = _by_row(worded, cache)
    expected = torch.stack([by_row[row] for row in rows["row_id"].to_pylist()])
    assert torch.equal(_encoded(worded, rows, cache), expected) and cache.encoded == 0
    tolerance = DTYPES[dtype] * float(expected.abs().max())
    for again in range(2):
        assert torch.allclose(_encoded(worded, rows, anew), expected, rtol=0, atol=tolerance)
        # each once, as long as there is room for all
        assert anew.encoded == 145 * (1 + (again and kept == 20))


def test_what_a_row_says_does_not_depend_on_what_is_cached(worded: Path) -> None:
    cache, rows = cache_of(text_config(worded)), toy_rows(SIZES).slice(0, 4)
    cache.open(_index(worded))
    titles = pa.array(["title 0", "never seen", "title 1", "never seen"])
    rows = rows.set_column(rows.column_names.index("title"), "title", titles)
    users = pa.array(["unknown", None, "unknown", rows["user"][3].as_py()])
    rows = rows.set_column(rows.column_names.index("user"), "user", users)
    found = _encoded(worded, rows, cache)
    assert torch.allclose(found, _encoded(worded, rows, cache_of(text_config(worded))), atol=1e-5)
    before = cache.encoded
    assert 2 <= before <= 5 and torch.equal(_encoded(worded, rows, cache), found)
    assert cache.encoded == before


def _second(worded: Path, folder: Path, *overrides: str) -> Built:
    """Another set of the same rows with seven more, its texts encoded beside those of `worded`."""
    if not (folder / "shards").exists():
        rows = pa.concat_tables([toy_rows(SIZES), toy_rows({"games": 7}, seed=5)])
        rows = rows.set_column(0, "row_id", pa.array(np.arange(len(rows))))
        write_shards(toy_source(rows), SCHEMA, SplitConfig(), folder / "shards", block_rows=16)
    changes = [f"text.folder={folder / 'text'}", f"data.shards={folder / 'shards'}"]
    config = text_config(worded, *changes, *overrides)
    said: list[str] = []
    with joined() as ranks:
        built = build(config, config.data.shards, ranks, said.append)
    (folder / "said").write_text("\n".join(said), encoding="utf-8")
    return built


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_of_another_set_are_not_encoded_again(
    dtype: str, worded: Path, tmp_path: Path
) -> None:
    changes = [f"text.dtype={dtype}", "text.prompt.without=['page', 'domain']"]
    assert cache_text(worded, *changes, f"text.folder={tmp_path / 'text'}") == 0
    taken = _second(worded, tmp_path, *changes)
    assert taken.taken > 100 and 7 <= taken.encoded <= 21
    assert taken.taken + taken.encoded == sum(taken.texts.values())
    shutil.copytree(tmp_path / "shards", tmp_path / "anew" / "shards")
    anew = _second(worded, tmp_path / "anew", *changes)
    assert anew.taken == 0 and anew.texts == taken.texts
    files = [sorted(built.folder.glob("*/vectors/vectors.bin")) for built in (taken, anew)]
    for one, other in zip(*files, strict=True):
        read = [
            torch.frombuffer(bytearray(f.read_bytes()), dtype=DTYPE[dtype]) for f in (one, other)
        ]
        assert torch.allclose(read[0].float(), read[1].float(), rtol=0, atol=DTYPES[dtype])


def test_nothing_is_taken_from_what_was_made_otherwise_or_is_damaged(
    worded: Path, tmp_path: Path
) -> None:
    assert cache_text(worded, f"text.folder={tmp_path / 'text'}", "encoder.max_tokens=8") == 0
    assert _second(worded, tmp_path).taken == 0
    shutil.rmtree(tmp_path / "text")
    assert cache_text(worded, f"text.folder={tmp_path / 'text'}") == 0
    (damaged,) = tmp_path.glob("text/*/text_item/vectors/vectors.bin")
    damaged.write_bytes(bytes(damaged.stat().st_size))
    built = _second(worded, tmp_path)
    assert 0 < built.taken < 100
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "text_item: no vector is taken from there: " in said and "sha256" in said
    assert "text_user: no vector" not in said


def test_vectors_are_looked_for_in_every_opened_set(worded: Path, tmp_path: Path) -> None:
    source = toy_source(toy_rows({"books": 9, "games": 7}, seed=5))
    base = _index(worded).load_vocabulary(worded / "shards")
    other = write_shards(source, SCHEMA, SplitConfig(), tmp_path / "shards", base=base)
    shutil.copytree(worded / "text", tmp_path / "text")
    options = ["--shards", str(tmp_path / "shards"), "--set", f"text.folder={tmp_path / 'text'}"]
    assert main(["cache-text", str(worded / "run.toml"), *options]) == 0
    cache = cache_of(text_config(worded, f"text.folder={tmp_path / 'text'}"))
    both = [columns_of(cache, index) for index in (_index(worded), other)]
    assert cache.open(other) is cache.open(other)
    mixed = {name: torch.cat([part[name] for part in both]) for name in both[0]}
    separate = [cache.vectors(part) for part in both]
    assert torch.equal(cache.vectors(mixed), torch.cat(separate))
    assert separate[0].any(1).all() and separate[1].any(1).all()
