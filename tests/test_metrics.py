"""Laws S9 and S10: AUC, log loss and their means over domains, against scikit-learn."""

import json
from math import inf, nan

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import log_loss, roc_auc_score

from data_shards.errors import UserError
from trainer.metrics import (
    BINS,
    Scores,
    auc,
    log_loss_from_logits,
    rela_impr,
    reliability,
    score,
)

DOMAINS = ("books", "films", "toys", "music")


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and domains; few distinct logits, so that many are tied."""
    n = draw(st.integers(1, 60))
    label = draw(arrays(np.float32, n, elements=st.sampled_from([0.0, 1.0])))
    logit = draw(arrays(np.float32, n, elements=st.integers(-24, 24).map(lambda k: k / 4)))
    return label, logit, draw(arrays(np.int64, n, elements=st.integers(0, len(DOMAINS) - 1)))


def _both_classes(label: np.ndarray) -> bool:
    return 0 < label.sum() < len(label)


@given(rows())
def test_auc_equals_sklearn_and_is_undefined_for_one_class(case: tuple) -> None:
    label, logit, _ = case
    if _both_classes(label):
        assert auc(label, logit) == pytest.approx(roc_auc_score(label, logit), abs=1e-14)
    else:
        assert auc(label, logit) is None


@given(rows())
def test_auc_is_the_share_of_pairs_in_order(case: tuple) -> None:
    label, logit, _ = case
    assume(_both_classes(label))
    gap = logit[label == 1][:, None] - logit[label == 0][None]
    assert auc(label, logit) == ((gap > 0).sum() + (gap >= 0).sum()) / (2 * gap.size)


@given(rows())
def test_log_loss_equals_sklearn(case: tuple) -> None:
    label, logit, _ = case
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    expected = log_loss(label, probability, labels=[0, 1])
    assert log_loss_from_logits(label, logit) == pytest.approx(expected, rel=1e-12)


def test_log_loss_of_a_sure_logit_is_its_size() -> None:
    label, logit = np.array([0.0, 1.0]), np.array([1e4, -1e4], dtype=np.float32)
    assert log_loss_from_logits(label, logit) == 1e4
    assert log_loss_from_logits(1 - label, logit / 100) == pytest.approx(np.exp(-100.0), rel=1e-12)


@given(rows())
def test_wauc_is_the_row_weighted_mean_over_domains_of_two_classes(case: tuple) -> None:
    label, logit, domain = case
    scores = score(label, logit, domain, DOMAINS)
    groups = [(label[domain == d], logit[domain == d]) for d in np.unique(domain)]
    defined = [(len(y), roc_auc_score(y, z)) for y, z in groups if _both_classes(y)]
    assert scores.undefined == len(groups) - len(defined)
    if defined:
        sizes, values = zip(*defined, strict=True)
        assert scores.wauc == pytest.approx(np.average(values, weights=sizes), abs=1e-14)
        assert scores.mean_auc == pytest.approx(np.mean(values), abs=1e-14)
    else:
        assert scores.wauc is None and scores.mean_auc is None


@given(rows())
def test_each_domain_is_scored_on_its_own_rows(case: tuple) -> None:
    label, logit, domain = case
    scores = score(label, logit, domain, DOMAINS)
    assert [one.domain for one in scores.domains] == [DOMAINS[d] for d in np.unique(domain)]
    for one in scores.domains:
        own = domain == DOMAINS.index(one.domain)
        alone = score(label[own], logit[own], domain[own], DOMAINS)
        assert alone.domains == (one,)
        assert alone.wauc == alone.auc == one.auc
        assert (one.rows, one.positives) == (own.sum(), label[own].sum())


@given(rows(), st.permutations(range(60)))
def test_the_order_of_rows_does_not_matter(case: tuple, shuffled: list[int]) -> None:
    order = [i for i in shuffled if i < len(case[0])]
    label, logit, domain = case
    before = score(label, logit, domain, DOMAINS)
    after = score(label[order], logit[order], domain[order], DOMAINS)
    assert (before.wauc, before.auc) == (after.wauc, after.auc)
    assert before.log_loss == pytest.approx(after.log_loss, rel=1e-12)


@given(rows(), st.lists(st.tuples(st.integers(1, 4), st.integers(-8, 8)), min_size=4, max_size=4))
def test_wauc_ignores_an_increasing_transform_of_each_domain(case: tuple, lines: list) -> None:
    label, logit, domain = case
    slope, shift = np.array(lines, dtype=np.float32).T
    moved = slope[domain] * logit + shift[domain]
    assert score(label, moved, domain, DOMAINS).wauc == score(label, logit, domain, DOMAINS).wauc


def test_auc_over_all_rows_does_not_ignore_it() -> None:
    label, domain = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    logit = np.array([0.0, 1.0, 0.0, 1.0])
    plain, moved = (score(label, logit + c * domain, domain, DOMAINS) for c in (0, 5))
    assert plain.wauc == moved.wauc == 1.0
    assert (plain.auc, moved.auc) == (1.0, 0.75)


@given(st.integers(1, 50), st.integers(1, 50))
def test_predicting_the_click_rate_is_calibrated(positives: int, negatives: int) -> None:
    label = np.repeat([1.0, 0.0], [positives, negatives])
    logit = np.full(len(label), np.log(positives / negatives))
    domain = np.zeros(len(label), dtype=np.int64)
    assert score(label, logit, domain, DOMAINS).calibration == pytest.approx(1.0, rel=1e-12)
    doubled = score(label, np.full(len(label), 700.0), domain, DOMAINS).calibration
    assert doubled == pytest.approx(len(label) / positives)


@given(rows())
def test_reliability_counts_every_row_once_and_parts_no_equal_predictions(case: tuple) -> None:
    label, logit, domain = case
    whole, bins = score(label, logit, domain, DOMAINS), reliability(label, logit)
    assert whole.reliability == bins and 1 <= len(bins) <= BINS
    assert sum(one.rows for one in bins) == len(label) and min(one.rows for one in bins) > 0
    assert sum(one.positives for one in bins) == label.sum()
    predicted = sum(one.rows * one.predicted for one in bins)
    assert predicted == pytest.approx((1 / (1 + np.exp(-logit.astype(float)))).sum(), rel=1e-12)
    means = [one.predicted for one in bins]
    assert means == sorted(set(means))
    order = np.random.default_rng(0).permutation(len(label))
    assert [one.rows for one in reliability(label[order], logit[order])] == [o.rows for o in bins]


def test_reliability_has_equally_many_rows_where_no_predictions_are_equal() -> None:
    logit = np.random.default_rng(0).permutation(1000) / 100.0
    bins = reliability(logit > 5, logit)
    assert [one.rows for one in bins] == [100] * BINS
    assert [one.positives for one in bins] == [0] * 5 + [99] + [100] * 4


@given(rows())
def test_scores_survive_json(case: tuple) -> None:
    label, logit, domain = case
    plain = score(label, logit, domain, DOMAINS).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def _two_domains() -> Scores:
    return score(np.array([0, 1, 1]), np.array([0.0, 1.0, 2.0]), np.array([0, 0, 2]), DOMAINS)


def test_metric_by_name() -> None:
    scores = _two_domains()
    assert (scores.metric("wauc"), scores.metric("mean_auc"), scores.metric("auc")) == (1, 1, 1)
    assert scores.metric("log_loss") == scores.log_loss
    assert scores.metric("auc/books") == 1.0
    assert scores.metric("auc/toys") is None
    assert scores.domains[1].calibration is not None


@pytest.mark.parametrize(("name", "near"), [("wauk", "wauc"), ("auc/book", "auc/books"), ("", "")])
def test_an_unknown_metric_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown metric '{name}'; the nearest is '{near}"):
        _two_domains().metric(name)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_logits_that_are_not_finite_are_counted_and_placed(value: float) -> None:
    logit = np.array([0.0, 1.0, value, value])
    with pytest.raises(UserError, match=r"2 of 4 logits are not finite.*'toys' \(row 2"):
        score(np.array([0, 1, 0, 1]), logit, np.array([0, 0, 2, 1]), DOMAINS)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="no rows to score"):
        score(np.array([]), np.array([]), np.array([], dtype=np.int64), DOMAINS)


@pytest.mark.parametrize(
    ("value", "base", "expected"),
    [(0.8, 0.7, 0.5), (0.7, 0.7, 0.0), (0.8, 0.5, None), (0.8, 0.4, None), (None, 0.7, None)],
)
def test_rela_impr(value: float | None, base: float | None, expected: float | None) -> None:
    assert rela_impr(value, base) == (None if expected is None else pytest.approx(expected))
