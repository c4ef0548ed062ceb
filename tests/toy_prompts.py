"""A real tokenizer whose tokens are bytes, so that a prompt can be read back; and a small log."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_shards import Field, Index, ShardReader
from data_shards.prompted import PromptedConfig, Prompter
from data_shards.sources import TableConfig
from data_shards.sources.negatives import NegativesConfig
from data_shards.sources.per_user import HistoryConfig, PerUserConfig
from data_shards.sources.table_join import JoinConfig
from tests.toy_log import write_file

LOG_FIELDS = (
    Field("user", "anonymous", "user"),
    Field("item", "anonymous", "item"),
    Field("domain", "id"),
)
PROMPT = PromptedConfig(
    "uni_ctr",
    fields=(Field("history", "id", "user", multi=True), Field("title", "text", "item")),
)


class Bytes:
    """Texts as their bytes, at most `most` of them."""

    def __init__(self, most: int = 10_000, name: str = "bytes") -> None:
        self.most, self.name = most, name
        self.cut = 0
        self.seen: Counter[str] = Counter()
        self._tokenizer = _bytes()
        self._tokenizer.enable_truncation(most)

    def __call__(self, texts: pa.StringArray) -> pa.ListArray:
        self.seen.update(texts.to_pylist())
        encoded = self._tokenizer.encode_batch(texts.to_pylist())
        self.cut += sum(bool(one.overflowing) for one in encoded)
        return pa.array([one.ids for one in encoded], pa.list_(pa.int32()))

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "max_tokens": self.most}


def _bytes() -> Tokenizer:
    alphabet = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def texts_of(tokens: list[list[int]]) -> list[str]:
    """The inverse of `Bytes`."""
    return _bytes().decode_batch(tokens)


def toy_prompter(tokenize: Bytes | None = None, local: tuple[str, ...] = ()) -> Prompter:
    return Prompter(PROMPT, (*LOG_FIELDS, *PROMPT.fields), tokenize or Bytes(), local)


def toy_history(folder: Path, log: str, items: str, **options: Any) -> TableConfig:
    """A log of user,item,click,t whose history has the titles of the items' table."""
    return TableConfig(
        write_file(folder, "shop.log.csv", f"user,item,click,t\n{log}"),
        label="click",
        time="t",
        domain_from_file=True,
        join=(
            JoinConfig(
                write_file(folder, "shop.items.csv", f"item,name\n{items}"),
                "item",
                {"title": "name"},
            ),
        ),
        per_user=PerUserConfig(
            history=HistoryConfig(of="title"), negatives=NegativesConfig(per_positive=1)
        ),
        **options,
    )


def rows_of(folder: Path) -> pa.Table:
    """All rows of a shard set."""
    index = Index.load(folder)
    reader = ShardReader(folder, index)
    return pa.concat_tables([reader.read(block) for block in index.blocks])
