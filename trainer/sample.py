"""A few test rows of each domain as a method sees them: the same rows at any number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from data_shards import Cursor, Loader
from data_shards.hashing import mixed
from models import Method, Seen
from trainer.adapter_store import Adapter
from trainer.evaluate import gathered
from trainer.model import Model, method_with, model_of
from trainer.own_rows import own_of
from trainer.trunk import Trunk

DOMAINS, ROWS, EACH = 20, 3000, 300
"""At most: domains, those with the most rows; rows of all; rows of each."""


@dataclass(frozen=True)
class Sample:
    """What is seen of n rows, and of the weights, by kind."""

    domains: tuple[str, ...]
    """Those with the most rows first"""
    domain: np.ndarray
    """[n] each row's place in `domains`"""
    row_id: np.ndarray
    seen: dict[str, Seen]
    """Values are [n, ...], those of `Method.pictured_weights` apart"""


@torch.no_grad()
def sample(trunk: Trunk, adapters: Sequence[Adapter], test: Loader) -> Sample | None:
    """Some of the rows that `test` selects. None on all ranks but the first, and where the method
    has nothing to show. Collective."""
    method = method_with(trunk, adapters)
    domains = sorted(test.domains, key=lambda name: -test.rows_by_domain[name])[:DOMAINS]
    if not method.shows or not domains:
        return None
    model = model_of(trunk, method, own_of(trunk, method.own_width, adapters))
    each = min(EACH, ROWS // len(domains))
    parts = [_of_domain(trunk, model, method, domain, each) for domain in domains]
    if not trunk.ranks.first:
        return None
    seen = {kind: _joined([part[kind] for _, part in parts]) for kind in parts[0][1]}
    row_id = [part for part, _ in parts]
    domain = np.repeat(np.arange(len(domains)), [len(part) for part in row_id])
    every = {**seen, **method.pictured_weights()}
    return Sample(tuple(domains), domain, np.concatenate(row_id), every)


def _of_domain(
    trunk: Trunk, model: Model, method: Method, domain: str, count: int
) -> tuple[np.ndarray, dict[str, Seen]]:
    """Rows of the first global batches of a shuffled epoch: the ids, and what is seen of them."""
    config, ranks = trunk.config, trunk.ranks
    loader = trunk.loader(config.data.shards, config.test, (domain,), shuffle=True)
    slots = model.slots(loader).to(ranks.device)
    row_ids, parts = [], []
    for batch in islice(loader.batches(Cursor()), -(-count // config.reading.global_batch)):
        moved = batch.to(ranks.device)
        sent = model.send(moved, slots, loader.extended)
        row_ids.append(moved.row_id)
        parts.append(method.pictured(model.features(sent)))
    row_id = gathered(torch.cat(row_ids), ranks)
    chosen = np.argsort(mixed(row_id, config.seed), kind="stable")
    chosen = chosen[row_id[chosen] >= 0][:count]  # the others are padding
    seen = {kind: _joined([part[kind] for part in parts]) for kind in parts[0]}
    values = {kind: gathered(one.values.float(), ranks) for kind, one in seen.items()}
    return row_id[chosen], {
        kind: one._replace(values=torch.from_numpy(values[kind][chosen]))
        for kind, one in seen.items()
    } if ranks.first else {}


def _joined(parts: Sequence[Seen]) -> Seen:
    return parts[0]._replace(values=torch.cat([part.values for part in parts]))
