"""Banyan's real parts, set up for timing: trunk, loader, engine and steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.measure import Side
from benchmarks.peer import Rows as PeerRows
from data_shards import Batch, Cursor, Field, Loader, Rows, Schema, encode_batch
from embeddings import Embedder
from models import Features, Method
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.fit import Trainee
from trainer.model import Model
from trainer.ranks import Ranks
from trainer.trunk import Trunk, empty_trunk

BATCH = 4096
STREAMED = 46  # steps from shards in one turn: a third of an epoch of MovieLens
NO_ADAPTER = torch.tensor([-1])
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What every part is told."""

    run: RunConfig
    ranks: Ranks
    rounds: int

    def loader(self, domains: tuple[str, ...] | None = None, shuffle: bool = True) -> Loader:
        shards, ranks = Path(self.run.data.shards), self.ranks
        rows = Rows(("train",), domains)
        return Loader(shards, rows, self.run.reading, ranks.rank, ranks.world, shuffle)


class Training:
    """Steps of a trunk's method with these domains' adapters, under the real engine."""

    def __init__(
        self,
        trunk: Trunk,
        domains: Sequence[str],
        trained: Callable[[Method], list[torch.nn.Parameter]],
    ) -> None:
        config, ranks = trunk.config, trunk.ranks
        method = trunk.method()
        for domain in domains:
            method.add_domain(domain, config.seed)
        share = config.reading.global_batch // ranks.world
        engine = Engine(method, trained(method), config.engine, 1e-3, 0.0, share)
        engine.train(True)
        self.model = Model(Embedder(trunk.tables, trunk.rows), engine, tuple(domains))
        self.trainee = Trainee(self.model, engine, method, ranks, config.seed)

    def steps(self, batches: Iterable[Batch], slots: Tensor) -> None:
        for number, pair in enumerate(self.trainee.ahead(batches, slots, False)):
            self.trainee.step(*pair, number)

    def from_shards(self, loader: Loader) -> Side:
        """The next steps from shards, through the epochs."""
        batches = endless(lambda epoch: loader.batches(Cursor(epoch)))
        slots = self.model.slots(loader)
        rows = STREAMED * loader.total_rows // loader.steps()
        return Side(lambda: self.steps(islice(batches, STREAMED), slots), STREAMED, rows)


def endless(epoch: Callable[[int], Iterable[T]]) -> Iterator[T]:
    """One epoch after the other."""
    return chain.from_iterable(epoch(number) for number in count())


def phase_1(trunk: Trunk) -> Training:
    return Training(trunk, (), lambda method: method.shared_parameters())


def some(loader: Loader, count: int) -> list[Batch]:
    """The first full batches of an epoch."""
    return [batch for _, batch in zip(range(count), loader.batches(Cursor()), strict=False)]


def over(batches: Sequence[Batch], run: Callable[[], object]) -> Side:
    return Side(run, len(batches), BATCH * len(batches))


def dense_alone(trunk: Trunk, batches: Sequence[Batch]) -> Callable[[], None]:
    """The method without tables, loader and engine: vectors are there and ask for no gradient."""
    method = trunk.method().train()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3, fused=True)
    embedded = torch.randn(BATCH, len(trunk.rows), trunk.tables.width) * 0.01
    slot = torch.full((BATCH,), -1)

    def run() -> None:
        for batch in batches:
            logit = method(Features(embedded, batch.numbers, slot))
            method.loss(logit, batch.label, batch.weight, batch.rows).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def in_memory(setting: Setting) -> PeerRows:
    """All training rows as whole tensors."""
    loader = setting.loader(shuffle=False)
    batches = list(loader.batches(Cursor()))
    fields = loader.schema.ids
    real = torch.cat([batch.weight for batch in batches]) > 0
    single = [
        torch.stack(
            [b.ids[f.name].to_padded_dense(1)[:, 0].long() for f in fields if not f.multi], 1
        )
        for b in batches
    ]
    (multi,) = [field.name for field in fields if field.multi]
    longest = max(int(b.ids[multi].lengths().max()) for b in batches)
    bags = [b.ids[multi].to_padded_dense(longest).long() for b in batches]
    label = torch.cat([b.label for b in batches])
    return torch.cat(single)[real], torch.cat(bags)[real], label[real]


def synthetic_trunk(setting: Setting, fields: int, rows: int) -> Trunk:
    """A trunk over `fields` tables of `rows` rows each."""
    schema = Schema(tuple(Field(f"f{i}", "id") for i in range(fields)))
    sizes = {field.name: rows for field in schema.ids}
    return empty_trunk(setting.run, setting.ranks, schema, sizes, "")


def synthetic_batches(trunk: Trunk, number: int, size: int = BATCH) -> list[Batch]:
    """Uniform ids: the worst case for caches, real ones are skewed."""
    rng = np.random.default_rng(1)
    ids = {key: rng.integers(0, rows, size * number) for key, rows in trunk.rows.items()}
    label = (rng.random(size * number) < 0.2).astype(np.float32)
    rows = pa.table({"row_id": np.arange(len(label)), "label": label, **ids})
    domain = np.zeros(size, np.int64)
    return [
        encode_batch(trunk.schema, rows.slice(start, size), domain)
        for start in range(0, len(rows), size)
    ]


def adapted(trunk: Trunk, count: int) -> Method:
    """The trunk's method with this many adapters, which alone learn; no engine around it."""
    method = trunk.method()
    for number in range(count):
        method.add_domain(f"domain-{number}", 1)
    for parameter in method.shared_parameters():
        parameter.requires_grad_(False)
    return method


def score(model: Model, method: Method, batches: Sequence[Batch], slots: Tensor) -> None:
    method.eval()
    with torch.no_grad():
        for batch in batches:
            model.logits(batch, slots, False)


def learn(model: Model, method: Method, batches: Sequence[Batch], slots: Tensor) -> None:
    """Forward and backward of the adapters, without an optimizer."""
    method.train()
    for batch in batches:
        method.zero_grad()
        logit = model.outputs(model.send(batch, slots, False))
        method.loss(logit, batch.label, batch.weight, batch.rows).backward()
