"""Scores of row sets, and of runs on them: each rank scores its share, the first one sees all."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from data_shards import Cursor, Loader, Location, UserError
from trainer import heartbeat, preemption
from trainer.config import RunConfig
from trainer.log import Progress
from trainer.metrics import Scores, score
from trainer.model import Model, trunk_alone, with_adapters
from trainer.own_rows import renumbered
from trainer.preemption import PreemptedError
from trainer.ranks import Ranks, together
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Predictions:
    """Rows of all ranks, without padding, in the order of `row_id` within a domain."""

    row_id: np.ndarray
    domain: np.ndarray
    label: np.ndarray
    logit: np.ndarray
    domains: tuple[str, ...]

    @property
    def probability(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logit.astype(np.float64)))

    def scores(self) -> Scores:
        return score(self.label, self.logit, self.domain, self.domains)


@torch.no_grad()
def predict(model: Model, loader: Loader, ranks: Ranks, what: str = "") -> Predictions | None:
    """Logits of every row that the loader selects; None on all ranks but the first.

    PreemptedError, on all ranks, where one of them has to go and what it has learned can be saved.
    """
    if what:
        heartbeat.at(what)
    slots = model.slots(loader).to(ranks.device)
    progress = Progress(what or "predicting", loader.total_rows, "rows", ranks.first and bool(what))
    parts = []
    for batch in loader.batches(Cursor()):
        if preemption.saves() and ranks.any(preemption.asked())[0]:
            raise PreemptedError
        moved = batch.to(ranks.device)
        logit = model.logits(moved, slots, loader.extended)
        parts.append((moved.row_id, moved.domain, moved.label, logit.float()))
        progress.add(batch.rows)
    columns = [gathered(torch.cat(column), ranks) for column in zip(*parts, strict=True)]
    if not ranks.first:
        return None
    row_id, domain, label, logit = columns
    order = np.lexsort((row_id, domain))
    order = order[row_id[order] >= 0]  # padding
    return Predictions(row_id[order], domain[order], label[order], logit[order], loader.domains)


def evaluate(model: Model, loader: Loader, ranks: Ranks, what: str = "") -> Scores:
    """Exact metrics over the rows of all ranks, the same on every rank."""
    found = predict(model, loader, ranks, what)
    [scores, *_] = together(ranks, what, lambda: found.scores() if found else None)
    assert scores is not None
    return scores


def gathered(mine: torch.Tensor, ranks: Ranks) -> np.ndarray:
    """All ranks' values on the first rank; every rank has equally many."""
    if ranks.world == 1:
        return mine.cpu().numpy()
    into = [torch.empty_like(mine) for _ in range(ranks.world)] if ranks.first else None
    dist.gather(mine, into)
    return torch.cat(into).cpu().numpy() if into else mine.cpu().numpy()


def evaluate_run(
    config: RunConfig,
    folder: RunFolder,
    shards: Location,
    splits: tuple[str, ...],
    domains: tuple[str, ...] | None,
    ranks: Ranks,
) -> tuple[Scores, Scores]:
    """Scores of the shared part alone and with the kept adapters, on any shard set."""
    trunk = folder.load_trunk(config, ranks)
    loader = trunk.loader(shards, splits, domains)
    kept = folder.kept_adapters(trunk, trunk.fingerprint())
    vocabulary = loader.indexes[0].load_vocabulary(shards)
    kept = [renumbered(adapter, vocabulary) for adapter in kept]
    base = evaluate(trunk_alone(trunk), loader, ranks, "shared part")
    return base, evaluate(with_adapters(trunk, kept), loader, ranks, "with adapters")


def zero_shot(
    config: RunConfig,
    folder: RunFolder,
    shards: Location,
    splits: tuple[str, ...],
    domain: str,
    ranks: Ranks,
) -> Scores:
    """Scores of the shared part on a domain that phase 1 has not seen."""
    if domain in folder.trunk_values()["domains"]:
        raise UserError(
            f"domain {domain!r}: {folder.path} has learned from it, so this is not zero-shot; "
            "name one that was held out, or leave --zero-shot away"
        )
    trunk = folder.load_trunk(config, ranks)
    loader = trunk.loader(shards, splits, (domain,))
    return evaluate(trunk_alone(trunk), loader, ranks, f"{domain}, shared part")
