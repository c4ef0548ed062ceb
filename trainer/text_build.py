"""All texts of a shard set as vectors, each once: rendered by the first rank, encoded by all.

A part of a row's text is done when its `vectors.json` is there. What a killed build left is gone
on with: rendering from its start, encoding block by block. A text that another shard set's folder
beside this one has already, made the same way, is not encoded again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data_shards import Index, Location, UserError
from data_shards.prompts import PromptConfig, text_id
from data_shards.row_files import save_json
from data_shards.text_ids import write_text_ids
from data_shards.text_vectors import TextVectors, VectorWriter
from data_shards.texts import TextTable
from trainer.config import RunConfig
from trainer.fence import others_kept_out
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
    taken: int = 0
    """Those whose vectors it has taken from other shard sets' folders"""
    seconds: float = 0.0
    bytes: int = 0


def build(config: RunConfig, shards: Location, ranks: Ranks, say: Callable[[str], None]) -> Built:
    """Encode all texts of a shard set, by all ranks together; those that are there are kept.
    LostError where another process writes to their folder, and goes on to."""
    if config.text is None:
        raise UserError(
            "text: the run file has no such section; add [text], and [text.prompt] to word the rows"
        )
    began = time.monotonic()
    index = Index.load(shards)
    cache = TextCache(config.text, config.encoder, ranks.device)
    parts = config.text.parts_of(index.schema)
    built = Built(cache.folder(index), index.rows)
    with others_kept_out(built.folder, config.faults, ranks):
        together(ranks, built.folder, lambda: _begin(cache, index) if ranks.first else None)
        for name, prompt in parts.items():
            part = _Part(built.folder / name, cache, ranks)
            part.render(index, shards, prompt, say)
            built.texts[name], encoded, taken = part.encode(say)
            built.encoded, built.taken = built.encoded + encoded, built.taken + taken
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

    def encode(self, say: Callable[[str], None]) -> tuple[int, int, int]:
        """(distinct texts; how many of them were encoded now, and how many taken from other sets'
        folders), by all ranks."""
        ranks = self.ranks
        found = together(ranks, self.folder, lambda: self._lenders(say) if ranks.first else [])[0]
        done = together(ranks, self.folder, lambda: self._encode(list(map(_open, found))))
        together(ranks, self.folder, lambda: self._finish() if ranks.first else None)
        return done[0][0], sum(one[1] for one in done), sum(one[2] for one in done)

    def _lenders(self, say: Callable[[str], None]) -> list[Path]:
        """Folders of this column of other shard sets, whole and made the same way."""
        lenders = []
        for file in sorted(self.folder.parent.parent.glob(f"*/{self.folder.name}/vectors/*.json")):
            folder = file.parents[1]
            if folder == self.folder or self.finished:
                continue
            try:
                vectors = _open(folder)
                if (vectors.made_by, vectors.dtype) == (self.cache.made_by, self.cache.dtype):
                    vectors.verify()
                    lenders.append(folder)
            except UserError as damage:
                say(f"{self.folder.name}: no vector is taken from there: {damage}")
        return lenders

    def _encode(self, lenders: Sequence[TextVectors]) -> tuple[int, int, int]:
        """This rank's blocks."""
        table = TextTable.open(self.folder / "texts")
        if self.finished:
            return len(table), 0, 0
        writer, ranks, encoded = self._writer(table), self.ranks, 0
        mine = writer.left
        # the others' blocks are as many, and their texts as long: the order is that of a hash
        progress = Progress(self.folder.name, mine * ranks.world, "texts", ranks.first)
        for block in writer.todo:
            texts = writer.texts(block)
            vectors, left = self._taken(texts, lenders)
            progress.add((len(texts) - len(left)) * ranks.world)
            if len(left):
                new = [texts[place] for place in left]
                done = self.cache.stored(new, lambda n: progress.add(n * ranks.world))
                vectors[torch.from_numpy(left)] = done
            writer.put(block, vectors)
            encoded += len(left)
        return len(table), encoded, mine - encoded

    def _taken(
        self, texts: list[str], lenders: Sequence[TextVectors]
    ) -> tuple[torch.Tensor, np.ndarray]:
        """([n, width] vectors that other sets have; places of the texts that none has)."""
        ids, left = text_id(pa.array(texts, pa.string())), np.arange(len(texts))
        vectors = torch.empty(len(texts), self.cache.width, dtype=self.cache.dtype)
        for lender in lenders:
            places = lender.table.lookup(ids[left])
            vectors[torch.from_numpy(left[places >= 0])] = lender.take(places[places >= 0])
            left = left[places < 0]
        return vectors, left

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


def _open(folder: Path) -> TextVectors:
    return TextVectors.open(folder / "vectors", TextTable.open(folder / "texts"))
