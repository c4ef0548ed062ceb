"""What a run has cost, and how long a prediction by it takes."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data_shards import Batch, Cursor, Index, Location
from trainer.adapter_store import Adapter
from trainer.align import PHASE as ALIGN
from trainer.log import lines_of
from trainer.model import Model
from trainer.teachers import phase_of
from trainer.trunk import Trunk

SIZES = (1, 32, 1024)
BATCHES = 20
SECONDS = 2.0  # after which no further batch is timed


@dataclass(frozen=True)
class Cost:
    """Of training: evaluations are not counted."""

    steps: int = 0
    seconds: float = 0.0
    rows: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.steps + other.steps, self.seconds + other.seconds, self.rows + other.rows)

    def to_dict(self) -> dict[str, Any]:
        rate = round(self.rows / self.seconds, 1) if self.seconds else None
        return {"seconds": round(self.seconds, 3), "steps": self.steps, "rows_per_second": rate}


def cost_of_shared(trunk: Trunk, metrics: Path, shards: Location) -> Cost:
    """Of teachers, CTRL's first stage and phase 1, as the last evaluation of each noted it; nothing
    where a run had none of them."""
    config = trunk.config
    phases = {name: (config.pretrain.rows, None) for name in (ALIGN, "pretrain")}
    if config.teacher:
        domains = Index.load(shards).domains
        phases |= {phase_of(domain): (config.teacher.rows, (domain,)) for domain in domains}
    noted = {one["phase"]: one for one in lines_of(metrics) if one.keys() >= {"phase", "seconds"}}
    costs = (
        _cost(noted[name]["step"], noted[name]["seconds"], trunk, shards, *of)
        for name, of in phases.items()
        if name in noted
    )
    return sum(costs, Cost())


def cost_of_adapter(trunk: Trunk, adapter: Adapter, shards: Location) -> Cost:
    """Of one domain's phase 2, whether the adapter was kept or not."""
    noted: dict[str, Any] = adapter.metrics
    rows = trunk.config.adapt.rows
    return _cost(noted["steps"], noted["seconds"], trunk, shards, rows, (adapter.domain,))


def _cost(
    steps: int,
    seconds: float,
    trunk: Trunk,
    shards: Location,
    splits: tuple[str, ...],
    domains: tuple[str, ...] | None = None,
) -> Cost:
    epoch = trunk.loader(shards, splits, domains, shuffle=True)
    return Cost(steps, seconds, steps * epoch.total_rows / epoch.steps())


def latency_ms(
    trunk: Trunk, model: Model, shards: Location, domains: tuple[str, ...] | None = None
) -> dict[str, float] | None:
    """Median milliseconds of a batch of encoded test rows, by its size; None with several ranks,
    which would wait for each other."""
    if trunk.ranks.world > 1:
        return None
    with _one_thread():
        return {str(size): _of_size(trunk, model, shards, domains, size) for size in SIZES}


@torch.no_grad()
def _of_size(
    trunk: Trunk, model: Model, shards: Location, domains: tuple[str, ...] | None, size: int
) -> float:
    config = trunk.config
    reading = replace(config.reading, global_batch=size, lanes=1)
    small = replace(trunk, config=replace(config, reading=reading))
    loader = small.loader(shards, config.test, domains)
    slots = model.slots(loader).to(trunk.ranks.device)
    batches = [batch.to(trunk.ranks.device) for batch in _some(loader.batches(Cursor()))]
    model.logits(batches[0], slots, loader.extended)  # warms up
    took, end = [], time.perf_counter() + SECONDS
    for batch in batches:
        began = time.perf_counter()
        model.logits(batch, slots, loader.extended).cpu()
        took.append(1000 * (time.perf_counter() - began))
        if time.perf_counter() > end:
            break
    return round(statistics.median(took), 4)


def _some(batches: Iterator[Batch]) -> Sequence[Batch]:
    return list(islice(batches, BATCHES))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
