"""The life of one run: trained, a domain added and one removed, and what each rank saw of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from data_shards import Index, Loader, Rows, write_shards
from tests.toy_run import (
    ADDED,
    SCHEMA,
    SIZES,
    SPLIT,
    adapters_at,
    digests,
    here,
    planted_rows,
    refused,
    toy_config,
)
from tests.toy_source import toy_source
from trainer import adding, schedule
from trainer.config import RunConfig
from trainer.evaluate import Predictions, evaluate, evaluate_run, predict
from trainer.metrics import Scores
from trainer.model import trunk_alone, with_adapters
from trainer.own_rows import renumbered
from trainer.run_folder import RunFolder
from trainer.trunk import Trunk

RUN = ("tables.weight_decay=0.001", "adapt.weight_decay=0.001", "engine.zero_stage=2")
LATER = planted_rows(SIZES | {"games": 700}, seed=5)


def write_sets(toy: Path, folder: Path) -> None:
    """Shard sets that do not fit, and `later`: more rows of games, whose ids are numbered anew."""
    rows = planted_rows(ADDED)
    positive = rows.set_column(2, "label", pa.array(np.ones(len(rows), np.float32)))
    without_price = replace(SCHEMA, fields=tuple(f for f in SCHEMA.fields if f.name != "price"))
    base = Index.load(toy / "shards").load_vocabulary(toy / "shards")
    write_shards(toy_source(rows), SCHEMA, SPLIT, folder / "no_base")
    write_shards(toy_source(rows), without_price, SPLIT, folder / "no_price")
    write_shards(toy_source(positive), SCHEMA, SPLIT, folder / "positive", base=base)
    later = toy_source(LATER)
    write_shards(later, SCHEMA, SPLIT, folder / "later", base=base, only_domains=("games",))


@contextmanager
def _watched(found: list[str]) -> Iterator[None]:
    """Notes in `found` every tensor of the trunk that an adaptation moves."""
    original = schedule.adapt

    def adapt(trunk: Trunk, *args: Any) -> Any:
        before = _bytes_of(trunk)
        adapter = original(trunk, *args)
        after = _bytes_of(trunk)
        found.extend(name for name in before if not torch.equal(before[name], after[name]))
        found.append(f"{len(before)} tensors watched while {adapter.domain} learned")
        return adapter

    with pytest.MonkeyPatch.context() as patch:
        for room in (schedule, adding):
            patch.setattr(room, "adapt", adapt)
        yield


def _bytes_of(trunk: Trunk) -> dict[str, Tensor]:
    """Copies of weights and optimizer state of this rank's tables, and of the dense part."""
    tables = {
        f"{shard.table}/{name}/{shard.row}/{shard.col}": tensor
        for shard in trunk.tables.shards()
        for name, tensor in shard.tensors.items()
    }
    return {name: tensor.detach().clone() for name, tensor in (tables | trunk.dense).items()}


@dataclass(frozen=True)
class Story:
    """What one rank saw. `files` are digests of every file that others depend on, by time."""

    summary: dict[str, Any]
    added: dict[str, Any]
    again: dict[str, Any]
    watched: list[str]
    told: dict[str, str]
    files: dict[str, dict[str, str]]
    books: tuple[dict[str, Tensor], dict[str, Tensor]]
    predictions: dict[str, Predictions | None]
    scores: dict[str, tuple[Scores, Scores]]


def live(toy: Path, sets: Path, output: Path) -> Story:
    config = toy_config(toy, output, *RUN)
    own_ids = replace(config, adapt=replace(config.adapt, own_ids=True))
    few = replace(config, adapt=replace(config.adapt, min_rows=1000))
    folder, watched = RunFolder(config.folder), []

    def add(domain: str, shards: Path, using: RunConfig = own_ids) -> dict[str, Any]:
        with _watched(watched):
            return adding.add_domain(using, folder, domain, shards, here())

    def files(without: str = "") -> dict[str, str]:
        here().gather(None)
        found = digests(folder.path, ("trunk", "vocabulary", "adapters"), without)
        here().gather(None)  # no rank goes on to change what another one still reads
        return found

    told = {"unfinished": refused(lambda: add("games", toy / "added"))}
    with _watched(watched):
        summary = schedule.train(config, here())
    told |= {
        "other ids": refused(lambda: add("games", sets / "no_base")),
        "other schema": refused(lambda: add("games", sets / "no_price")),
        "one class": refused(lambda: add("games", sets / "positive")),
        "unknown": refused(lambda: add("gamse", toy / "added")),
        "few rows": refused(lambda: add("games", toy / "added", few)),
    }
    trained, seen = adapters_at(folder.path)["books"], {"trained": files()}
    added = add("games", toy / "added")
    told["twice"] = refused(lambda: add("games", toy / "added"))
    seen |= {"added": files(), "added, without games": files("games")}
    predictions = {"added": logits(config, [toy / "shards", toy / "added"])}
    scores = scores_of(toy, sets, output)
    seen["without books"] = files("books")
    if here().first:
        folder.adapters.remove("mlora", "books")
    seen["removed"] = files()
    predictions["removed"] = logits(config, [toy / "shards", toy / "added"])
    again = add("books", toy / "shards")
    books = trained, adapters_at(folder.path)["books"]
    predictions["later"] = logits(config, [sets / "later"])
    told["diverged"] = refused(lambda: _evaluate_diverged(config, folder))
    return Story(summary, added, again, watched, told, seen, books, predictions, scores)


def _evaluate_diverged(config: RunConfig, folder: RunFolder) -> Scores:
    trunk = folder.load_trunk(config, here())
    model = replace(trunk_alone(trunk), dense=lambda rows: rows.slot[:, None] * torch.nan)
    return evaluate(model, trunk.loader(Path(config.data.shards), ("test",)), here())


def logits(config: RunConfig, shards: list[Path]) -> Predictions | None:
    """Of all test rows, with every kept adapter."""
    folder, ranks = RunFolder(config.folder), here()
    trunk = folder.load_trunk(config, ranks)
    kept = folder.kept_adapters(trunk, trunk.fingerprint())
    vocabulary = Index.load(shards[-1]).load_vocabulary(shards[-1])
    model = with_adapters(trunk, [renumbered(adapter, vocabulary) for adapter in kept])
    rows = Rows(config.test)
    loader = Loader(shards, rows, config.reading, ranks.rank, ranks.world, shuffle=False)
    return predict(model, loader, ranks)


def scores_of(toy: Path, sets: Path, output: Path) -> dict[str, tuple[Scores, Scores]]:
    """Of the test rows of three shard sets: without, and with adapters."""
    config = toy_config(toy, output, *RUN)
    return {
        path.name: evaluate_run(config, RunFolder(config.folder), path, config.test, None, here())
        for path in (toy / "shards", toy / "added", sets / "later")
    }
