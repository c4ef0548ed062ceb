"""Vectors of a frozen encoder for the rows of a run: read where `cache-text` wrote them, and made
on the spot for rows that are in no shard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_shards import Index, UserError, Vocabulary
from data_shards.prompts import PromptConfig, text_id
from data_shards.row_files import load_manifest, plain
from data_shards.sidecars import Sidecar
from data_shards.text_parts import TextConfig, texts_of
from data_shards.text_vectors import TextVectors
from data_shards.texts import TextTable
from models.encoder import EncoderConfig
from models.text_encoder import TextEncoder
from trainer.config import first_difference

FORMAT = 1
FILE = "text.json"
KEPT = 1 << 16  # texts encoded on the spot whose vectors are remembered
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TextCache:
    """The text vectors of a run, of the shard sets that were opened.

    A set has a folder: `text.json` says what made it, and by column of text ids a folder `ids`
    (sidecar), `texts` (each once) and `vectors`.
    """

    def __init__(
        self, text: TextConfig, encoder: EncoderConfig, device: torch.device | None = None
    ) -> None:
        self.text = text
        self.encoder = TextEncoder(encoder, device)
        self.encoded = 0
        """Texts so far that no opened set had, so that they were encoded on the spot."""
        self._opened: dict[str, list[Sidecar]] = {}
        self._sets: dict[str, list[TextVectors]] = {}
        self._fresh: dict[int, Tensor] = {}

    @property
    def width(self) -> int:
        """Numbers in a row's vector."""
        return self.encoder.width

    @property
    def dtype(self) -> torch.dtype:
        """In which a vector lies on the disk."""
        return DTYPES[self.text.dtype]

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """What decides the vector of a row, so that a trunk can tell the one that it knows."""
        parts = {"prompt": asdict(self.text.prompt), "parts": self.text.parts}
        return plain({**self.encoder.describe(), **parts})

    def folder(self, index: Index) -> Path:
        """Where a shard set's vectors lie."""
        return Path(self.text.folder) / index.fingerprint[:16]

    def plan(self, index: Index) -> dict[str, Any]:
        """What the `text.json` of a shard set's folder says."""
        return {
            "format": FORMAT,
            "shards": index.fingerprint,
            "dtype": self.text.dtype,
            **self.made_by,
            "width": self.width,
        }

    def require_own(self, index: Index) -> None:
        """UserError naming the first thing in which a set's folder was made by something else."""
        folder = self.folder(index)
        content = {key: type(value) for key, value in self.plan(index).items()}
        key = first_difference(self.plan(index), load_manifest(folder / FILE, content))
        if key is not None:
            raise UserError(
                f"{folder}: its text vectors are of another run file (they differ in {key}); take "
                "the [text] and [encoder] that made them, or give another text.folder and run "
                "`cache-text RUN_FILE`"
            )

    def open(self, index: Index) -> Sequence[Sidecar]:
        """The text ids of a shard set, whose vectors are then at hand; UserError where there are
        none or others."""
        if index.fingerprint not in self._opened:
            parts = self.text.parts_of(index.schema)
            folder = self.folder(index)
            if (folder / FILE).exists():
                self.require_own(index)
            if any(not (folder / name / "vectors/vectors.json").exists() for name in parts):
                raise UserError(
                    f"{folder}: the text vectors of this shard set are not there, or not all; "
                    "`cache-text RUN_FILE` makes them, and goes on where it was stopped"
                )
            self._opened[index.fingerprint] = [
                self._open(index, folder / name, prompt) for name, prompt in parts.items()
            ]
        return self._opened[index.fingerprint]

    def _open(self, index: Index, folder: Path, prompt: PromptConfig) -> Sidecar:
        sidecar = Sidecar.open(folder / "ids", index, {"prompt": asdict(prompt)})
        table = TextTable.open(folder / "texts")
        vectors = TextVectors.open(folder / "vectors", table, self.made_by)
        self._sets.setdefault(folder.name, []).append(vectors)
        return sidecar

    def vectors(self, columns: Mapping[str, Tensor]) -> Tensor:
        """[B, width] fp32 of rows with these columns of text ids, on their device; zeros where the
        ids are 0. UserError for an id that is in no opened set."""
        names = [name for name in self._sets if name in columns]
        first, *others = (self._found_all(name, columns[name].cpu().numpy()) for name in names)
        for vectors in others:
            first += vectors
        return first.to(columns[names[0]].device)

    def _found_all(self, name: str, ids: np.ndarray) -> Tensor:
        vectors, found = self._find(name, ids)
        if not found.all():
            raise UserError(
                f"{self.text.folder}: no vector of the text {ids[~found][0]} in a row's {name}; "
                "delete the folder and run `cache-text RUN_FILE`"
            )
        return vectors

    def _find(self, name: str, ids: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """([n, width] fp32 of these texts, zeros where no set has one; [n] whether one has, or the
        id is 0)."""
        found, vectors = ids == 0, torch.zeros(len(ids), self.width)
        for one in self._sets.get(name, ()):
            left = np.flatnonzero(~found)
            places = one.table.lookup(ids[left])
            known = left[places >= 0]
            taken = one.take(places[places >= 0]).float()
            if len(known) == len(ids):  # as a rule
                return taken, np.ones_like(found)
            vectors[torch.from_numpy(known)] = taken
            found[known] = True
        return vectors, found

    def encode(self, rows: pa.Table, vocabulary: Vocabulary, domains: pa.Array) -> Tensor:
        """[n, width] fp32 of rows that are in no shard, from `vocabulary.encode`; `domains` [n] are
        the names of theirs. Texts that no opened set has are encoded, and counted."""
        total = torch.zeros(len(rows), self.width)
        for name, prompt in self.text.parts_of(vocabulary.schema).items():
            texts = texts_of(rows, vocabulary, domains, prompt).dictionary_encode()
            vectors = self._of(name, texts.dictionary)
            total += vectors[torch.from_numpy(texts.indices.to_numpy().astype(np.int64))]
        return total

    def _of(self, name: str, texts: pa.StringArray) -> Tensor:
        """[n, width] fp32 of distinct texts, known or not."""
        ids = text_id(texts)
        vectors, known = self._find(name, ids)
        missing = np.flatnonzero(~known)
        if len(self._fresh) + len(missing) > KEPT:
            self._fresh.clear()
        fresh = [place for place in missing.tolist() if int(ids[place]) not in self._fresh]
        found = self.stored(texts.take(pa.array(fresh, pa.int64())).to_pylist())
        self._fresh |= zip(ids[fresh].tolist(), found.float(), strict=True)
        self.encoded += len(fresh)
        for place in missing.tolist():
            vectors[place] = self._fresh[int(ids[place])]
        return vectors

    def stored(
        self, texts: Sequence[str], done: Callable[[int], object] = lambda count: None
    ) -> Tensor:
        """[n, width] of these texts, in the type that lies on the disk."""
        vectors = self.encoder.vectors(texts, done).to(self.dtype)
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            raise UserError(
                f"text.dtype: {self.text.dtype} cannot hold the vector of the text "
                f"{texts[int(finite.int().argmin())]!r}; take bfloat16 or float32, or where it is "
                "one of them an encoder whose states are finite"
            )
        return vectors
