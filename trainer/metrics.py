"""Ranking and probability metrics per domain, exact and in float64.

Pure functions on whole arrays: the caller gathers the rows of all ranks and leaves padding out.
AUC is the rank statistic with ties averaged, from one sort per domain: no bins, and equal to the
pairwise definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError, unknown

Array = NDArray[Any]

METRICS = ("wauc", "mean_auc", "auc", "log_loss")
BINS = 10


@dataclass(frozen=True)
class DomainScore:
    """One domain's rows; `auc` is None when they are of one class."""

    domain: str
    rows: int
    positives: int
    auc: float | None
    log_loss: float
    calibration: float | None  # mean prediction / click rate; None without positives


@dataclass(frozen=True)
class Bin:
    """Rows whose predictions lie next to each other."""

    rows: int
    positives: int
    predicted: float  # mean prediction


@dataclass(frozen=True)
class Scores:
    """All domains that have rows, and the totals over them; None stands for undefined."""

    domains: tuple[DomainScore, ...]
    wauc: float | None  # mean of the domains' AUC, weighted by rows
    mean_auc: float | None  # the same, unweighted
    auc: float | None  # over all rows, domains mixed
    log_loss: float
    calibration: float | None
    undefined: int  # domains of one class, left out of wauc and mean_auc
    reliability: tuple[Bin, ...]  # of all rows, by rising prediction; none where not counted

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, which has no NaN: undefined is null."""
        lists: dict[str, object] = {
            "domains": [asdict(one) for one in self.domains],
            "reliability": [asdict(one) for one in self.reliability],
        }
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Scores":
        """The inverse of `to_dict`; scores of before have no bins."""
        domains = tuple(DomainScore(**one) for one in plain["domains"])
        bins = tuple(Bin(**one) for one in plain.get("reliability", ()))
        return cls(**{**plain, "domains": domains, "reliability": bins})

    def of(self, domain: str) -> "Scores":
        """Those of one domain's rows alone, whose bins nobody has counted."""
        known = {one.domain: one for one in self.domains}
        if domain not in known:
            raise unknown("domain", domain, known)
        one = known[domain]
        rest = one.log_loss, one.calibration, int(one.auc is None)
        return Scores((one,), one.auc, one.auc, one.auc, *rest, ())

    def metric(self, name: str) -> float | None:
        """`wauc`, `mean_auc`, `auc`, `log_loss` or `auc/<domain>`; None when undefined."""
        overall = dict(
            zip(METRICS, (self.wauc, self.mean_auc, self.auc, self.log_loss), strict=True)
        )
        known = overall | {f"auc/{one.domain}": one.auc for one in self.domains}
        if name not in known:
            raise unknown("metric", name, known)
        return known[name]


def auc(label: Array, logit: Array) -> float | None:
    """P(a positive outranks a negative), ties counting half; None for rows of one class."""
    order = np.argsort(logit)
    ranked, positive = logit[order], label[order] > 0.5
    positives, rows = int(positive.sum()), len(order)
    if positives in (0, rows):
        return None
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # each tie's last row
    wins = np.diff(np.cumsum(positive)[last], prepend=0)
    losses = np.diff(last, prepend=-1) - wins
    below = np.cumsum(losses) - losses
    # Counted in half pairs, as integers: the only rounding is the division.
    return int((wins * (2 * below + losses)).sum()) / (2 * positives * (rows - positives))


def log_loss_from_logits(label: Array, logit: Array) -> float:
    """Mean of -log p(label), without forming p, so that a sure and wrong logit stays finite."""
    margin = np.where(label > 0.5, -1.0, 1.0) * logit.astype(np.float64)
    return float(np.logaddexp(0.0, margin).mean())


def reliability(label: Array, logit: Array) -> tuple[Bin, ...]:
    """At most BINS bins of about equally many rows; equal predictions are never parted."""
    places = np.arange(1, BINS) * len(logit) // BINS
    cuts = np.unique(np.partition(logit, places)[places])
    bin_of = np.searchsorted(cuts, logit, side="right")
    columns = [np.bincount(bin_of, weights) for weights in (None, label > 0.5, _probability(logit))]
    return tuple(
        Bin(int(rows), int(positives), float(predicted / rows))
        for rows, positives, predicted in zip(*columns, strict=True)
        if rows
    )


def rela_impr(auc: float | None, base: float | None) -> float | None:
    """(auc - 0.5) / (base - 0.5) - 1: the gain over chance, relative to the base's.

    None where either is undefined or the base is no better than chance: nothing to be relative to.
    """
    if auc is None or base is None or base <= 0.5:
        return None
    return (auc - 0.5) / (base - 0.5) - 1.0


def score(label: Array, logit: Array, domain_index: Array, domains: Sequence[str]) -> Scores:
    """Scores of rows [N] of 0/1 labels; `domain_index` points into `domains`.

    Domains without rows are left out. UserError for no rows at all or a logit that is not finite.
    """
    _check(logit, domain_index, domains)
    order = np.argsort(domain_index, kind="stable")
    first = np.flatnonzero(np.diff(domain_index[order], prepend=-1))
    scores = tuple(
        _domain_score(domains[int(domain_index[rows[0]])], label[rows], logit[rows])
        for rows in np.split(order, first[1:])
    )
    defined = [(one.rows, one.auc) for one in scores if one.auc is not None]
    whole = _domain_score("", label, logit)
    return Scores(
        domains=scores,
        wauc=_mean(defined),
        mean_auc=_mean([(1, value) for _, value in defined]),
        auc=whole.auc,
        log_loss=whole.log_loss,
        calibration=whole.calibration,
        undefined=len(scores) - len(defined),
        reliability=reliability(label, logit),
    )


def _check(logit: Array, domain_index: Array, domains: Sequence[str]) -> None:
    if not len(logit):
        raise UserError("no rows to score; choose a split and domains that have rows")
    bad = np.flatnonzero(~np.isfinite(logit))
    if len(bad):
        raise UserError(
            f"{len(bad):,} of {len(logit):,} logits are not finite, the first in domain "
            f"{domains[int(domain_index[bad[0]])]!r} (row {bad[0]:,} of those scored); training "
            "diverged: lower the learning rate, or go back to an earlier checkpoint"
        )


def _domain_score(domain: str, label: Array, logit: Array) -> DomainScore:
    rows, positives = len(label), int((label > 0.5).sum())
    predicted = float(_probability(logit).sum())
    return DomainScore(
        domain=domain,
        rows=rows,
        positives=positives,
        auc=auc(label, logit),
        log_loss=log_loss_from_logits(label, logit),
        calibration=predicted / positives if positives else None,
    )


def _probability(logit: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))


def _mean(weighted: list[tuple[int, float]]) -> float | None:
    """Weighted mean; weights are normalised first, so that a lone value comes back unrounded."""
    total = sum(weight for weight, _ in weighted)
    return sum(weight / total * value for weight, value in weighted) if weighted else None
