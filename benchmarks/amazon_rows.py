"""Rows of some users of the four Amazon domains: their shards, their sizes, and what their titles
tell without any training."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from data_shards import Cursor, Index, Loader, Rows, Source, open_source, write_shards
from data_shards.hashing import xxh64
from trainer.config import RunConfig
from trainer.metrics import score
from trainer.prompting import prompter_of

NEW = "office"


@dataclass(frozen=True)
class Chosen:
    """The rows of some users of a source; their negatives are drawn from all of its items."""

    source: Source
    users: pa.Array

    def pieces(self) -> tuple[str, ...]:
        return self.source.pieces()

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        for rows in self.source.read(piece, dropped):
            kept = rows.filter(pc.is_in(rows["user"], self.users))
            if len(kept):
                yield kept

    def state(self) -> list[Any]:
        return self.source.state()

    def describe(self) -> dict[str, Any]:
        return self.source.describe() | {"users": len(self.users)}


def chosen(run: RunConfig, users: int) -> Chosen:
    """So many users of each domain, those whose ids have the smallest hashes."""
    path = Path(run.data.source.path)
    found = []
    for file in sorted(path.parent.glob(path.name)):
        ids = pc.unique(csv.read_csv(file)["user_id"])
        ids = ids.take(pa.array(np.argsort(xxh64(ids))[:users]))
        domain = file.name.partition(".")[0]
        found += [f"{domain}:{user}" for user in ids.to_pylist()]
    return Chosen(open_source(run.data.source, run.data.raw.fields), pa.array(found))


def write_rows(run: RunConfig, new: Path, users: int) -> None:
    """The run's shards, and in `new` those of the held-out domain."""
    if new.exists():
        return
    shards, data, prompter = Path(run.data.shards), run.data, prompter_of(run)
    source = chosen(run, users)
    if not shards.exists():
        write_shards(
            source, data.schema, data.split, shards, hold_out=data.hold_out, prompter=prompter
        )
    base = Index.load(shards).load_vocabulary(shards)
    write_shards(
        source, data.schema, data.split, new, only_domains=(NEW,), base=base, prompter=prompter
    )


def sizes(run: RunConfig, new: Path) -> dict[str, Any]:
    """Rows and positives by split and domain; of the test rows, the share whose item and whose
    user no training row has."""
    blocks = [block for path in (run.data.shards, new) for block in Index.load(path).blocks]
    counts: dict[str, dict[str, list[int]]] = {split: {} for split in run.data.split.names}
    for block in blocks:
        count = counts[block.split].setdefault(block.domain, [0, 0])
        counts[block.split][block.domain] = [count[0] + block.rows, count[1] + block.positives]
    vocabulary = Index.load(run.data.shards).vocabulary.sizes
    return {
        "rows and positives": counts,
        "ids in training rows": {key: rows - 1 for key, rows in vocabulary.items()},
        "share of test rows with unseen": {key: _unseen(run, key) for key in ("user", "item")},
    }


def _unseen(run: RunConfig, key: str) -> float:
    rows = [batch.ids[key].values() == 0 for batch in _test_rows(run, run.data.shards).batches]
    return round(float(torch.cat(rows).double().mean()), 4)


@dataclass(frozen=True)
class _Test:
    batches: list[Any]
    domains: tuple[str, ...]


def _test_rows(run: RunConfig, shards: Path | str) -> _Test:
    loader = Loader(str(shards), Rows(run.test), run.reading, 0, 1, shuffle=False)
    return _Test(list(loader.batches(Cursor())), loader.domains)


def title_cosines(run: RunConfig, new: Path, users: int) -> dict[str, object]:
    """Scores of the test rows by the encoder as it comes: the largest cosine between the title of
    the item and those of the history, as many words of each as the prompts have."""
    test = {
        row
        for shards in (run.data.shards, new)
        for batch in _test_rows(run, shards).batches
        for row in batch.row_id[batch.weight > 0].tolist()
    }
    source, dropped = chosen(run, users), Counter[str]()
    pieces = range(len(source.pieces()))
    table = pa.concat_tables([rows for piece in pieces for rows in source.read(piece, dropped)])
    rows = table.filter(pc.is_in(table["row_id"], pa.array(sorted(test)))).combine_chunks()
    prompt = run.data.prompt
    assert prompt is not None
    items = _first_words(rows["title"].to_pylist(), prompt.words["title"])
    lists = [
        _first_words(texts or [], prompt.words["history"]) for texts in rows["history"].to_pylist()
    ]
    texts = sorted({*items, *(text for texts in lists for text in texts)})
    vectors = dict(zip(texts, _vectors(run.encoder.path, texts), strict=True))
    none = torch.zeros(1, len(vectors[texts[0]]))
    nearest = [
        float((torch.stack([vectors[text] for text in texts] or [none[0]]) @ vectors[item]).max())
        for item, texts in zip(items, lists, strict=True)
    ]
    domain = rows["domain"].combine_chunks().dictionary_encode()
    places, names = domain.indices.to_numpy(), domain.dictionary.to_pylist()
    return score(rows["label"].to_numpy(), np.array(nearest), places, names).to_dict()


def _first_words(texts: list[str | None], words: int) -> list[str]:
    return [" ".join((text or "").split()[:words]) for text in texts]


def _vectors(encoder: str, texts: list[str]) -> torch.Tensor:
    """[n, D] of length 1: the mean of the last states, as this encoder was trained."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            part = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            mask = part["attention_mask"].unsqueeze(2)
            states = model(**part).last_hidden_state
            found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)
