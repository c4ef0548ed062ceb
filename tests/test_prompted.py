"""Prompts in the shards: the raw rows' own texts, tokenised once, the same for any writer."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import Index, Schema, SplitConfig, UserError, open_source, write_shards
from data_shards.prompted import CUT, PromptedConfig, Prompter
from data_shards.prompts import render
from data_shards.schema import Field
from data_shards.sources.per_user import FIRST_NEGATIVE, HistoryConfig, PerUserConfig
from tests.toy_log import read_log
from tests.toy_prompts import (
    LOG_FIELDS,
    PROMPT,
    Bytes,
    rows_of,
    texts_of,
    toy_history,
    toy_prompter,
)
from tests.toy_source import SCHEMA, toy_rows, toy_source

TOKENS = Field("prompt", "tokens")
WITH_PROMPT = Schema((*SCHEMA.fields, TOKENS))
SPLIT = SplitConfig(by="random")


def _prompter(tokenize: Bytes | None = None, **config: Any) -> Prompter:
    return Prompter(PromptedConfig("uni_ctr", **config), SCHEMA.fields, tokenize or Bytes())


def _write(out: Path, prompter: Prompter, rows: pa.Table, **choices: Any) -> Index:
    source = toy_source(rows, pieces=4)
    return write_shards(
        source, WITH_PROMPT, SPLIT, out, prompter=prompter, block_rows=64, **choices
    )


@settings(max_examples=10)
@given(
    titles=st.lists(st.text(max_size=12), min_size=40, max_size=40),
    places=st.lists(st.integers(0, 9), min_size=40, max_size=40),
    most=st.integers(1, 200),
)
def test_the_shards_hold_the_tokens_of_each_raw_row(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], places: list[int], most: int
) -> None:
    """Also of rows with the same prompt, of which each counts as cut."""
    rows = toy_rows({"books": 30, "toys": 10}).set_column(9, "title", pa.array(titles))
    rows = rows.take([place if place < 5 else at for at, place in enumerate(places)])
    rows = rows.set_column(0, "row_id", pa.array(range(len(rows))))
    out = tmp_path_factory.mktemp("prompted") / "shards"
    index = _write(out, _prompter(Bytes(most)), rows)
    texts = [
        render(SCHEMA.fields, rows.slice(at, 1), PromptedConfig("uni_ctr"))[0].as_py()
        for at in range(len(rows))
    ]
    written = rows_of(out).to_pylist()
    assert len(written) == len(rows)
    for row in written:
        assert row["prompt"] == Bytes(most)(pa.array([texts[row["row_id"]]]))[0].as_py()
    cut = sum(len(text.encode()) > most for text in texts)
    assert index.dropped.get(CUT, 0) == cut


def test_each_text_is_tokenised_once_and_held_out_rows_never(tmp_path: Path) -> None:
    """Split and vocabulary read the source too; rows there are not tokenised."""
    tokenize, rows = Bytes(), toy_rows()
    prompter = _prompter(tokenize, without=("user", "item", "page", "price", "title"))
    out = tmp_path / "shards"
    split = SplitConfig(by="time")
    write_shards(toy_source(rows), WITH_PROMPT, split, out, hold_out=("books",), prompter=prompter)
    expected = Counter[str]()
    for start in range(0, len(rows), 97):  # the tables of the source
        texts = prompter.texts(rows.slice(start, 97)).to_pylist()
        expected.update({text for text in texts if not text.startswith("books")})
    assert tokenize.seen == expected and max(expected.values()) > 1
    assert expected.total() < Index.load(out).rows


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return _write(tmp_path_factory.mktemp("written") / "shards", _prompter(Bytes(60)), toy_rows())


def test_any_number_of_jobs_writes_the_same_shards(written: Index, tmp_path: Path) -> None:
    assert written.dropped[CUT]
    again = _write(tmp_path / "shards", _prompter(Bytes(60)), toy_rows(), jobs=4)
    assert again == written and again.fingerprint == written.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        _prompter(Bytes(60), names={"user": "reader"}),
        replace(_prompter(Bytes(60)), config=PromptedConfig("ufin")),
        _prompter(Bytes(61)),
        _prompter(Bytes(60, "other")),
        replace(_prompter(Bytes(60)), local=("item",)),
    ],
)
def test_the_fingerprint_tells_how_prompts_were_made(
    written: Index, other: Prompter, tmp_path: Path
) -> None:
    index = _write(tmp_path / "shards", other, toy_rows())
    assert index.fingerprint != written.fingerprint
    assert index.source["prompt"] != written.source["prompt"]
    assert Index.load(tmp_path / "shards").fingerprint == index.fingerprint


def test_a_writer_does_not_go_on_with_other_prompts(tmp_path: Path) -> None:
    (tmp_path / ".shards.writing").mkdir()
    source, prompter = toy_source(pieces=4), _prompter(Bytes(60))
    killed = SplitConfig(by="time")
    with pytest.raises(KeyboardInterrupt):
        write_shards(_Killed(source), WITH_PROMPT, killed, tmp_path / "shards", prompter=prompter)
    with pytest.raises(UserError, match="begun with other choices .they differ in source"):
        write_shards(
            source, WITH_PROMPT, killed, tmp_path / "shards", prompter=_prompter(Bytes(61))
        )


class _Killed:
    """Stops in its third reading."""

    def __init__(self, source: Any) -> None:
        self.source, self.reads = source, 0
        self.pieces, self.state, self.describe = source.pieces, source.state, source.describe

    def read(self, piece: int, dropped: Counter[str]) -> Any:
        self.reads += 1
        if self.reads > 3:
            raise KeyboardInterrupt
        return self.source.read(piece, dropped)


def test_rows_of_an_added_domain_get_prompts_of_the_same_kind(tmp_path: Path) -> None:
    rows = toy_rows()
    _write(tmp_path / "trunk", _prompter(), rows, hold_out=("music",))
    base = Index.load(tmp_path / "trunk").load_vocabulary(tmp_path / "trunk")
    _write(tmp_path / "added", _prompter(), rows, only_domains=("music",), base=base)
    texts = _prompter().texts(rows).to_pylist()
    for row in rows_of(tmp_path / "added").to_pylist():
        assert texts_of([row["prompt"]]) == [texts[row["row_id"]]]


CLICKS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 8), st.booleans(), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=15)
@given(clicks=CLICKS)
def test_a_prompt_tells_of_earlier_positives_alone(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[tuple[int, int, bool, int]]
) -> None:
    """Law C10, read back from the shards: at most five, all before the row, never itself."""
    folder = tmp_path_factory.mktemp("history")
    log = "".join(f"u{user},i{item},{int(click)},{at}\n" for user, item, click, at in clicks)
    items = "".join(f"i{item},name {item}\n" for item in range(9))
    config = toy_history(folder, log, items, local=("user", "item"))
    prompter = toy_prompter(local=("user", "item"))
    schema = Schema((*LOG_FIELDS, TOKENS))
    source = open_source(config, prompter.fields)
    write_shards(source, schema, SplitConfig(), folder / "shards", prompter=prompter)
    written = rows_of(folder / "shards").to_pylist()
    texts = texts_of([row["prompt"] for row in written])
    assert sum(row["row_id"] < FIRST_NEGATIVE for row in written) == len(clicks)
    for row, text in zip(written, texts, strict=True):
        found = re.fullmatch(
            r"shop: The user ID is user_u(\d), who clicked on (.+) recently\. The ID of the "
            r"current product is product_i(\d), the title is name \3\.",
            text,
        )
        assert found, text
        earlier = [
            (at, place, f"name {item}")
            for place, (user, item, click, at) in enumerate(clicks)
            if user == int(found[1]) and click and at < row["time"]
        ]
        names = [name for _, _, name in sorted(earlier)][-5:]
        assert found[2].split(" & ") == (names or ["nothing"])
        if row["row_id"] < FIRST_NEGATIVE:
            user, item, _, _ = clicks[row["row_id"]]
            assert (user, item) == (int(found[1]), int(found[3]))


def test_a_history_of_titles_is_that_of_items_looked_up(tmp_path: Path) -> None:
    log = "u,a,1,0\nu,b,1,1\nu,c,1,2\nu,b,0,3\n"
    config = toy_history(tmp_path, log, "a,Apple\nb,\nc,Cherry\n")
    rows, _ = read_log(config, (*LOG_FIELDS, *PROMPT.fields))
    histories = [row["history"] for row in rows.sort_by("time").to_pylist() if row["time"] == 3]
    assert histories == [["Apple", None, "Cherry"]]
    join = replace(config.join[0], columns={"title": "name", "tags": "name"})
    stage = PerUserConfig(history=HistoryConfig(of="tags"))
    fields = (*PROMPT.fields, Field("tags", "id", multi=True))
    with pytest.raises(UserError, match="history: 'tags' is multi-valued; name a single value"):
        read_log(replace(config, join=(join,), per_user=stage), fields)


def test_a_local_id_is_told_without_its_domain() -> None:
    rows = pa.table(
        {
            "user": ["shop:u1", None],
            "item": ["shop:a:b", "plain"],
            "domain": ["shop", "shop"],
            "history": pa.array([["shop:x", "shop:y"], None], pa.list_(pa.string())),
            "title": ["shop: a title", "x"],
        }
    )
    assert toy_prompter(local=("user", "item", "history")).texts(rows).to_pylist() == [
        "shop: The user ID is user_u1, who clicked on x & y recently. The ID of the current "
        "product is product_a:b, the title is shop: a title.",
        "shop: who clicked on nothing recently. The ID of the current product is product_plain, "
        "the title is x.",
    ]


def test_words_are_kept_of_each_value() -> None:
    fields = (Field("tags", "id", "item", multi=True), Field("title", "text", "item"))
    rows = pa.table({"tags": [["a b c", "d", "e f g"]], "title": ["one two three"]})
    for words, told in (
        ({"tags": 2}, "a b & d & e f, the title is one two three"),
        ({"tags": 1, "title": 2}, "a & d & e, the title is one two"),
    ):
        config = PromptedConfig("uni_ctr", words=words)
        assert render(fields, rows, config).to_pylist() == [f"the tags is {told}."]
    config = PromptedConfig("uni_ctr", max_words=3, words={"tags": 1})
    assert render(fields, rows, config)[0].as_py().startswith("the tags is a & d, the title")
    with pytest.raises(UserError, match="words.tags is 0 or more, not -1"):
        PromptedConfig(words={"tags": -1})


def test_a_field_that_no_row_has_is_named_before_anything_is_read() -> None:
    with pytest.raises(UserError, match="unknown field of a prompt 'titel'; the nearest is"):
        _prompter(words={"titel": 3})
