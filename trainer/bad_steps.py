"""Steps whose loss or gradient is not finite, or too large to be squared.

They are found before any weight moves, and named by rows.
Tables train inside their own backward. So the graph is cut where the dense part reads their
vectors: the gradient stops there, is looked at by all ranks, and only then goes on to the tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_shards import Batch
from models import Features
from trainer.ranks import Ranks

NAMED = 5  # rows of each domain that a message names


@dataclass(frozen=True)
class Cut:
    """Vectors of the tables, and the leaves that the dense part reads in their place."""

    vectors: list[Tensor]
    leaves: list[Tensor]

    @classmethod
    def of(cls, features: Features) -> tuple[Features, "Cut"]:
        """The same features for the dense part, cut off from the tables that train."""
        cut = cls([], [])
        own = None if features.own is None else cut._leaf(features.own)
        return replace(features, embedded=cut._leaf(features.embedded), own=own), cut

    def _leaf(self, vectors: Tensor) -> Tensor:
        if not vectors.requires_grad:
            return vectors
        self.vectors.append(vectors)
        self.leaves.append(vectors.detach().requires_grad_())
        return self.leaves[-1]

    def gradients(self) -> list[Tensor]:
        """What a backward through the dense part has left at the cut."""
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def backward(self, largest: float) -> None:
        """On into the tables, which train by it. Entries are clamped to `largest`; 0: they are not.

        A row's gradient stays the sum over the rows of a batch that read it, each clamped, as by
        fbgemm's max_gradient: so it depends neither on the plan nor on the number of ranks.
        """
        pairs = [
            (vectors, leaf.grad.clamp_(-largest, largest) if largest else leaf.grad)
            for vectors, leaf in zip(self.vectors, self.leaves, strict=True)
            if leaf.grad is not None
        ]
        if pairs:
            vectors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(vectors, gradients)


class BadStepError(Exception):
    """No weight has moved in this step. `rows`: (domain's place in the loader, row id) of rows
    that gave something of the kind, of all ranks; none where it came of no single row."""

    def __init__(self, rows: list[tuple[int, int]]) -> None:
        super().__init__(f"{len(rows)} rows")
        self.rows = rows

    def named(self, domains: Sequence[str]) -> dict[str, list[int]]:
        """The ids of the rows, by domain."""
        found: dict[str, list[int]] = {}
        for place, row in self.rows:
            found.setdefault(domains[place], []).append(row)
        return found


def bad_rows(batch: Batch, logit: Tensor, cut: Cut, ranks: Ranks) -> list[tuple[int, int]]:
    """For `BadStepError`: looks at each row's inputs, logit and gradient. Collective."""
    parts = (batch.numbers, batch.label, logit.detach(), *cut.gradients())
    # a row's norm is no number where an entry is none, or too large to be squared
    norms = [part.reshape(len(batch), -1).float().norm(dim=1) for part in parts]
    fine = torch.stack(norms).isfinite().all(0)
    bad = ~fine & (batch.weight > 0)
    mine = list(zip(batch.domain[bad].tolist(), batch.row_id[bad].tolist(), strict=True))
    return sorted(row for part in ranks.gather(mine) for row in part)


def listed(rows: dict[str, list[int]]) -> str:
    """Rows by domain, as a message names them."""
    if not rows:
        return "no single row gave it"
    return "rows " + ", ".join(
        f"{', '.join(map(str, ids[:NAMED]))}{' and more' if len(ids) > NAMED else ''} of {domain}"
        for domain, ids in rows.items()
    )
