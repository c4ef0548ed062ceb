"""Text ids: the prompt of every row, as rendered from the raw rows, through sidecar and table."""

from pathlib import Path

import pyarrow as pa
import pytest

from data_shards.errors import UserError
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.prompts import PromptConfig, render, text_id
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig
from data_shards.text_ids import write_text_ids
from data_shards.vocabulary import Vocabulary
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_rows, toy_source

PROMPT = PromptConfig(without=("page",))


def _rare(table: pa.Table) -> pa.Table:
    """Missing values and texts, quotes, blanks, and a value that stands in no training row."""
    user = table["user"].to_pylist()
    title = table["title"].to_pylist()
    user[5], user[6], title[7], title[8], title[9] = None, " ", None, 'a "b"', ""
    for name, values in (("user", user), ("title", title)):
        column = pa.array(values, pa.string())
        table = table.set_column(table.column_names.index(name), name, column)
    return table


@pytest.mark.parametrize(
    "config",
    [
        PROMPT,
        PromptConfig("ufin_pairs", ("item",), max_words=1),
        PromptConfig("uni_ctr", ("user", "item")),
        PromptConfig("ufin", ("context",), without=("page", "domain")),
    ],
)
def test_ids_and_texts_are_those_of_the_raw_rows(tmp_path: Path, config: PromptConfig) -> None:
    shards, rows = tmp_path / "shards", _rare(toy_rows())
    index = write_shards(toy_source(rows), SCHEMA, SplitConfig(), shards, block_rows=32)
    (tmp_path / ".prompts.writing").mkdir()
    (tmp_path / ".prompts.writing" / "plan.json").write_text("left by a killed writer")
    sidecar, table = write_text_ids(shards, index, config, tmp_path / "prompts")
    raw = _known(rows, index.load_vocabulary(shards))
    texts = render(SCHEMA.fields, raw, config)
    ids = dict(zip(raw["row_id"].to_pylist(), text_id(texts).tolist(), strict=True))
    reading = Reading(global_batch=48, lanes=12, shuffle_rows=150)
    loader = Loader(shards, Rows(index.splits), reading, 0, 1, sidecars=[sidecar])
    for batch in loader.batches(Cursor()):
        expected = [ids.get(row, 0) for row in batch.row_id.tolist()]
        assert batch.columns["text_id"].tolist() == expected
    assert set(table.texts.to_pylist()) == set(texts.to_pylist())
    assert sidecar.made_by["prompt"]["template"] == config.template
    assert {path.name for path in (tmp_path / "prompts").iterdir()} == {"ids", "texts"}
    assert not list(tmp_path.glob(".*"))


def _known(rows: pa.Table, vocabulary: Vocabulary) -> pa.Table:
    """Raw rows, null for values that are not in the vocabulary."""
    for name in ("item", "user"):
        known = set(vocabulary.values[name].to_pylist())
        column = [value if value in known else None for value in rows[name].to_pylist()]
        assert None in column
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, pa.array(column, pa.string()))
    return rows


def test_text_ids_of_hashes_or_in_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    shards, folder = tmp_path / "shards", tmp_path / "prompts"
    index = write_shards(toy_source(), SCHEMA, SplitConfig(), shards)
    with pytest.raises(UserError, match="hold the field 'page' as hashes.* prompt's `without`"):
        write_text_ids(shards, index, PromptConfig(), folder)
    with pytest.raises(UserError, match="unknown field of a prompt 'pages'; the nearest is 'page'"):
        write_text_ids(shards, index, PromptConfig(without=("page", "pages")), folder)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UserError, match="prompts: exists already; give another path or delete it"):
        write_text_ids(shards, index, PROMPT, folder)


def test_a_hashed_domain_is_named_after_its_blocks(tmp_path: Path) -> None:
    schema = Schema(
        (Field("user", "id", "user"), Field("domain", "id", vocabulary="hash", buckets=2))
    )
    index = write_shards(toy_source(), schema, SplitConfig(), tmp_path / "shards")
    config = PromptConfig(sides=("context",))
    _, table = write_text_ids(tmp_path / "shards", index, config, tmp_path / "prompts")
    sentences = [f"The domain is {name}." for name in ("books", "music", "toys")]
    assert sorted(table.texts.to_pylist()) == sentences
