"""Scores of whole row sets: each rank scores its share, the first rank sees all rows."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from data_shards import Cursor, Loader
from trainer import heartbeat
from trainer.log import Progress
from trainer.metrics import Scores, score
from trainer.model import Model
from trainer.ranks import Ranks, together


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
    """Logits of every row that the loader selects; None on all ranks but the first."""
    if what:
        heartbeat.at(what)
    slots = model.slots(loader).to(ranks.device)
    progress = Progress(what or "predicting", loader.total_rows, "rows", ranks.first and bool(what))
    parts = []
    for batch in loader.batches(Cursor()):
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
