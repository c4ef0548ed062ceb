"""A run file whose rows are put into words, with shards and a random encoder of its own."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import tomli_w
import torch
from torch import Tensor

from data_shards import Index, SplitConfig, write_shards
from data_shards.prompts import render
from launch.__main__ import main
from models.encoder_files import EncoderConfig
from models.text_encoder import TextEncoder
from tests.toy_encoder import SPECIAL, write_encoder, write_tokenizer
from tests.toy_source import SCHEMA, toy_rows, toy_source
from trainer import config as run_files
from trainer.config import RunConfig
from trainer.text_cache import TextCache

SIZES = {"books": 60, "toys": 30, "music": 11}
VOCABULARY = ("user", "is", "title", "domain", ".", "u", *"0123456789", "tags", *"abcd")


def write_text_run(folder: Path) -> None:
    """`encoder`, `shards`, and `run.toml` with the three sides of a row apart."""
    write_tokenizer(write_encoder(folder / "encoder", "bert"), VOCABULARY)
    assert len(VOCABULARY) + len(SPECIAL) <= 64
    rows = toy_source(toy_rows(SIZES))
    write_shards(rows, SCHEMA, SplitConfig(), folder / "shards", block_rows=16)
    values = {
        "name": "toy",
        "output": str(folder / "runs"),
        "data": {
            "shards": str(folder / "shards"),
            "source": {"kind": "planted"},  # not read: the shards are there
            "fields": [asdict(field) for field in SCHEMA.fields],
        },
        "encoder": {"path": str(folder / "encoder"), "max_tokens": 20},
        "method": {"name": "ufin"},
        "text": {
            "parts": "sides",
            "folder": str(folder / "text"),
            "prompt": {"without": ["page"]},  # hashed, so it has no words
        },
    }
    (folder / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


def text_config(folder: Path, *overrides: str) -> RunConfig:
    return run_files.load(folder / "run.toml", overrides)


def cache_text(folder: Path, *overrides: str) -> int:
    """The exit status of the verb."""
    settings = [part for override in overrides for part in ("--set", override)]
    return main(["cache-text", str(folder / "run.toml"), *settings])


def cache_of(config: RunConfig) -> TextCache:
    assert config.text is not None
    return TextCache(config.text, config.encoder)


def known_rows(folder: Path) -> pa.Table:
    """The raw rows; null for values that the vocabulary lacks."""
    rows = toy_rows(SIZES)
    vocabulary = Index.load(folder / "shards").load_vocabulary(folder / "shards")
    for name in ("item", "user"):
        known = set(vocabulary.values[name].to_pylist())
        column = [value if value in known else None for value in rows[name].to_pylist()]
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, pa.array(column, pa.string()))
    return rows


def told(config: RunConfig, rows: pa.Table, **changed: Any) -> list[str]:
    """The texts of raw rows."""
    assert config.text is not None
    prompt = replace(config.text.prompt, **changed)
    return render(SCHEMA.fields, rows, prompt).to_pylist()


def alone(config: EncoderConfig, texts: list[str]) -> Tensor:
    """[n, width] of the texts, by an encoder that knows of no cache."""
    return TextEncoder(config).vectors(texts)


def columns_of(cache: TextCache, index: Index) -> dict[str, Tensor]:
    """The text ids of some rows of a set."""
    found = {name: ids for one in cache.open(index) for name, ids in one.columns.items()}
    return {name: torch.tensor(ids[:3]) for name, ids in found.items()}
