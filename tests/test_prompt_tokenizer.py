"""Prompts as token ids: those of the model's own tokenizer, cut where the run file says."""

import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_shards.errors import UserError
from models.encoder import EncoderConfig
from models.prompt_tokenizer import PromptTokenizer
from tests.toy_encoder import WORDS, minilm, write_encoder, write_tokenizer

TEXTS = pa.array(["red dress", "blue guitar song " * 20, "", "users buys"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "encoder", "bert")


def _tokenizer(path: Path, max_tokens: int = 16) -> PromptTokenizer:
    return PromptTokenizer(EncoderConfig(str(path), max_tokens=max_tokens))


@cache
def _own():  # noqa: ANN202
    return AutoTokenizer.from_pretrained(minilm())


@cache
def _ours(max_tokens: int) -> PromptTokenizer:
    return _tokenizer(minilm(), max_tokens)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=80)), st.sampled_from([3, 8, 256]))
def test_ids_are_those_of_the_models_own_tokenizer(texts: list[str], most: int) -> None:
    valid = [text.encode("utf-8", "ignore").decode() for text in texts]
    ours, before = _ours(most), _ours(most).cut
    ids = ours(pa.array(valid, pa.string()))
    assert ids.type == pa.list_(pa.int32()) and ids.null_count == 0
    whole = [_own()(text)["input_ids"] for text in valid]
    cut = [_own()(text, truncation=True, max_length=most)["input_ids"] for text in valid]
    assert ids.to_pylist() == cut
    assert ours.cut - before == sum(len(row) > most for row in whole)
    for row in ids.to_pylist():
        assert len(row) <= most and row[0] == _own().cls_token_id and row[-1] == _own().sep_token_id
        assert _own().pad_token_id not in row


def test_a_slice_of_a_column_is_read_as_it_stands(folder: Path) -> None:
    tokenize = _tokenizer(folder)
    assert tokenize(TEXTS.slice(2, 2)).to_pylist() == tokenize(TEXTS).to_pylist()[2:]
    assert tokenize(TEXTS.slice(0, 0)).to_pylist() == []


def test_an_empty_text_is_the_special_tokens_alone(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder", "llama")
    assert _tokenizer(folder)(TEXTS)[2].as_py() == [1, 2]
    write_tokenizer(folder, special=False)
    assert _tokenizer(folder)(TEXTS)[2].as_py() == []


def test_a_missing_text_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match="row 1: a prompt is missing; expected text, which may be em"
    ):
        _tokenizer(folder)(pa.array(["red", None]))


def _in_another_process(
    tokenize: PromptTokenizer,
) -> tuple[list[list[int]], dict[str, object], int]:
    return tokenize(TEXTS).to_pylist(), tokenize.describe(), tokenize.cut


def test_it_travels_to_another_process(folder: Path) -> None:
    tokenize = _tokenizer(folder)
    assert not (folder / "gone").exists() and len(pickle.dumps(_tokenizer(folder / "gone"))) < 1000
    here = _in_another_process(tokenize)
    assert len(pickle.dumps(tokenize)) < 1000 and here[2] == 1
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_in_another_process, tokenize).result() == here


def test_it_describes_what_decides_the_ids_and_not_where_it_lies(
    folder: Path, tmp_path: Path
) -> None:
    described = _tokenizer(folder).describe()
    assert json.loads(json.dumps(described)) == described
    used = _tokenizer(folder)
    used(TEXTS)
    elsewhere = write_encoder(tmp_path / "elsewhere", "llama")
    assert used.describe() == described == _tokenizer(elsewhere).describe()
    assert _tokenizer(folder, 17).describe() == {**described, "max_tokens": 17}
    write_tokenizer(elsewhere, (*WORDS[1:], WORDS[0]))
    assert _tokenizer(elsewhere).describe()["tokenizer"] != described["tokenizer"]
    write_tokenizer(elsewhere, special=False)
    assert _tokenizer(elsewhere).describe()["tokenizer"] != described["tokenizer"]


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    write_tokenizer(folder, tuple(f"word{i}" for i in range(61)))
    with pytest.raises(
        UserError, match="tokenizer gives ids up to 64, its embedding has 64 rows; ta"
    ):
        _tokenizer(folder)(TEXTS)
    write_tokenizer(folder, tuple(f"word{i}" for i in range(60)))
    assert len(_tokenizer(folder)(TEXTS)) == len(TEXTS)


def test_special_tokens_must_leave_room(folder: Path) -> None:
    with pytest.raises(UserError, match="encoder.max_tokens: 2, but 2 of each prompt are special"):
        _tokenizer(folder, 2)(TEXTS)
    assert _tokenizer(folder, 3)(TEXTS).value_lengths().to_pylist() == [3, 3, 2, 3]


def test_a_tokenizer_without_a_fast_form_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(
        UserError, match="its tokenizer has no fast form; expected a tokenizer.json"
    ):
        _tokenizer(folder)(TEXTS)


@pytest.mark.parametrize("content", ["{}", "{", '{"version": "1.0", "model": {"type": "?"}}'])
def test_a_tokenizer_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(
        UserError, match="encoder: the tokenizer could not be read .*; copy the enc"
    ):
        _tokenizer(folder).describe()
