"""All texts of a shard set as vectors, each once: rendered by the first rank, encoded by all.

A part of a row's text is done when its `vectors.json` is there. What a killed build left is gone
on with: rendering from its start, encoding block by block.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_shards import Index, Location, UserError
from data_shards.prompts import PromptConfig
from data_shards.row_files import save_json
from data_shards.text_ids import write_text_ids
from data_shards.text_vectors import VectorWriter
from data_shards.texts import TextTable
from trainer.config import RunConfig
from trainer.log import Progress
from trainer.ranks import Ranks, together
from trainer.text_cache import FILE, TextCache


@dataclass
class Built:
    """What lies in a shard set's folder now."""

    folder: Path
    rows: int
    texts: dict[str, int] = field(default_factory=dict)
    """Distinct ones, by column of text ids."""
    encoded: int = 0
    """Those of them that this build has encoded, and of these the ones that were cut."""
    cut: int = 0
    seconds: float = 0.0
    bytes: int = 0


def build(config: RunConfig, shards: Location, ranks: Ranks, say: Callable[[str], None]) -> Built:
    """Encode all texts of a shard set, by all ranks together; those that are there are kept."""
    if config.text is None:
        raise UserError(
            "text: the run file has no such section; add [text], and [text.prompt] to word the rows"
        )
    began = time.monotonic()
    index = Index.load(shards)
    cache = TextCache(config.text, config.encoder, ranks.device)
    parts = config.text.parts_of(index.schema)
    built = Built(cache.folder(index), index.rows)
    together(ranks, built.folder, lambda: _begin(cache, index) if ranks.first else None)
    for name, prompt in parts.items():
        part = _Part(built.folder / name, cache, ranks)
        part.render(index, shards, prompt, say)
        built.texts[name], encoded = part.encode()
        built.encoded += encoded
    built.cut = sum(ranks.gather(cache.encoder.cut))
    built.bytes = sum(path.stat().st_size for path in built.folder.rglob("*") if path.is_file())
    built.seconds = time.monotonic() - began
    return built


def _begin(cache: TextCache, index: Index) -> None:
    """Start the folder, or go on with one of the same plan."""
    folder = cache.folder(index)
    if (folder / FILE).exists():
        return cache.require_own(index)
    if any(not path.name.startswith(".") for path in folder.glob("*")):
        raise UserError(
            f"{folder}: holds something else than text vectors (no {FILE}); give another "
            "text.folder, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / FILE, cache.plan(index))


@dataclass(frozen=True)
class _Part:
    """The texts of one column of text ids."""

    folder: Path
    cache: TextCache
    ranks: Ranks

    def render(
        self, index: Index, shards: Location, prompt: PromptConfig, say: Callable[[str], None]
    ) -> None:
        """By the first rank, while the others wait."""

        def act() -> None:
            if self.ranks.first and not self.folder.exists():
                say(f"{self.folder.name}: putting {index.rows:,} rows into words")
                write_text_ids(shards, index, prompt, self.folder, self.folder.name)

        together(self.ranks, self.folder, act)

    def encode(self) -> tuple[int, int]:
        """(distinct texts, how many of them were encoded now), by all ranks."""
        ranks = self.ranks
        done = together(ranks, self.folder, self._encode)
        together(ranks, self.folder, lambda: self._finish() if ranks.first else None)
        return done[0][0], sum(encoded for _, encoded in done)

    def _encode(self) -> tuple[int, int]:
        """This rank's blocks."""
        table = TextTable.open(self.folder / "texts")
        if self.finished:
            return len(table), 0
        writer, ranks = self._writer(table), self.ranks
        mine = writer.left
        # the others' blocks are as many, and their texts as long: the order is that of a hash
        progress = Progress(self.folder.name, mine * ranks.world, "texts", ranks.first)
        for block in writer.todo:
            texts = writer.texts(block)
            writer.put(block, self.cache.stored(texts, lambda n: progress.add(n * ranks.world)))
        return len(table), mine

    def _finish(self) -> None:
        if not self.finished:
            self._writer(TextTable.open(self.folder / "texts")).finish()

    @property
    def finished(self) -> bool:
        """Whether all vectors are there."""
        return (self.folder / "vectors" / "vectors.json").exists()

    def _writer(self, table: TextTable) -> VectorWriter:
        cache = self.cache
        folder, made_by = self.folder / "vectors", cache.made_by
        place = self.ranks.rank, self.ranks.world
        return VectorWriter(folder, table, cache.width, cache.text.dtype, made_by, *place)
