"""Planted rows: they follow the truth that their config says, and its best scores are right."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data_shards.sources.planted import Best, best_scores, best_scores_by_domain
from data_shards.sources.planted_rows import ITEM_WORDS, PlantedConfig, Rows, domain_shares

SMALL = PlantedConfig(rows=200_000, users=500, items=200)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(SMALL, 0, SMALL.rows)


def _within_noise(count: np.ndarray, share: np.ndarray, total: int) -> None:
    """Counts of a multinomial draw, each within five standard deviations."""
    noise = np.sqrt(total * share * (1 - share))
    assert (np.abs(count - total * share) <= 5 * noise + 1e-9).all()


@pytest.mark.parametrize("tail", [0.0, 1.0, 2.5])
def test_domain_sizes_follow_the_tail(tail: float) -> None:
    config = replace(SMALL, tail=tail, domains=10)
    count = np.bincount(Rows(config, 0, config.rows).domain, minlength=10)
    shares = domain_shares(config)
    assert shares[0] / shares[3] == pytest.approx(4**tail)
    _within_noise(count, shares, config.rows)


@pytest.mark.parametrize("skew", [0.0, 0.8, 1.0, 1.7])
def test_popularity_follows_the_skew(skew: float) -> None:
    config = replace(SMALL, skew=skew, user_overlap=1.0)
    count = np.bincount(Rows(config, 0, config.rows).user, minlength=500)
    edges = np.arange(1, 502, dtype=float)
    reached = np.log(edges) if skew == 1 else (edges ** (1 - skew) - 1) / (1 - skew)
    assert len(count) == 500
    _within_noise(count, np.diff(reached) / reached[-1], config.rows)


def test_domains_share_the_overlap_and_own_the_rest() -> None:
    config = replace(SMALL, skew=0.0, users=400, items=300, tail=0.0, domains=4)
    rows = Rows(config, 0, config.rows)
    for ids, size, overlap in ((rows.user, 400, 0.6), (rows.item, 300, 0.2)):
        seen = [set(ids[rows.domain == domain].tolist()) for domain in range(4)]
        common = set.intersection(*seen)
        assert common == {number for number in set.union(*seen) if number < size}
        assert all(len(one) == size for one in seen)
        assert len(set.union(*seen)) == len(common) + 4 * (size - len(common))
        _within_noise(np.array([len(common)]), np.array([overlap]), size)


def test_clicks_follow_the_probabilities(rows: Rows) -> None:
    probability, label = rows.probability, rows.label
    order = np.argsort(probability)
    groups = [np.arange(len(label)), *np.array_split(order, 10)]
    groups += [np.flatnonzero(rows.domain == d) for d in range(8)]
    for group in groups:
        p = probability[group].astype(np.float64)
        noise = np.sqrt((p * (1 - p)).sum())
        assert abs(label[group].sum() - p.sum()) < 5 * noise
    assert probability.min() < 0.05 and probability.max() > 0.7


def test_a_logistic_regression_on_the_true_logit_finds_it(rows: Rows) -> None:
    inputs = np.stack([np.ones(SMALL.rows), rows.logit.astype(np.float64)], axis=1)
    weights, curvature = np.zeros(2), np.eye(2)
    for _ in range(8):
        p = 1 / (1 + np.exp(-inputs @ weights))
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs
        weights += np.linalg.solve(curvature, inputs.T @ (rows.label - p))
    noise = np.sqrt(np.diag(np.linalg.inv(curvature)))
    assert (np.abs(weights - [0, 1]) < 5 * noise).all() and noise.max() < 0.02


def test_the_true_probability_scores_the_best_in_each_domain(rows: Rows) -> None:
    domain, label = rows.domain, rows.label
    probability = rows.probability.astype(np.float64)
    best = best_scores_by_domain(probability, domain)
    assert list(best) == list(range(8))
    for name, scores in best.items():
        y, p = label[domain == name], probability[domain == name]
        assert scores.auc is not None and scores.auc > 0.6
        noise = np.sqrt(scores.auc * (1 - scores.auc) / min(y.sum(), (1 - y).sum()))
        assert abs(roc_auc_score(y, p) - scores.auc) < 5 * noise
        losses = -np.where(y == 1, np.log(p), np.log1p(-p))
        assert abs(losses.mean() - scores.log_loss) < 5 * losses.std() / np.sqrt(len(losses))


def _grid(config: PlantedConfig, domain: int) -> np.ndarray:
    """[users, items] logits of 40 users and 60 items at one hour of one domain."""
    rows = Rows(config, 0, 2400)
    rows.user, rows.item = (ids.reshape(-1) for ids in np.mgrid[:40, :60])
    rows.domain, rows.hour = np.full(2400, domain), np.zeros(2400, np.int64)
    return rows.logit.astype(np.float64).reshape(40, 60)


@pytest.mark.parametrize("domain", [1, 5])
def test_a_domain_differs_by_a_matrix_of_low_rank(domain: int) -> None:
    config = replace(SMALL, spread=1.0)
    difference = _grid(config, domain) - _grid(config, 0)
    sizes = np.linalg.svd(difference, compute_uv=False)
    # one product of factors from each of the two domains, and the items' own direction
    assert sizes[3] < 1e-5 * sizes[0] and sizes[2] > 0.01 * sizes[0]
    alike = _grid(replace(config, specific=0.0), domain) - _grid(replace(config, specific=0.0), 0)
    assert np.ptp(alike) < 1e-5 and abs(alike.mean()) > 0.01
    same = replace(config, specific=0.0, spread=0.0)
    assert np.array_equal(_grid(same, domain), _grid(same, 0))


def test_effects_have_the_sizes_that_the_config_says() -> None:
    wide = replace(SMALL, users=10**6, items=10**6, skew=0.0, domains=3000, tail=0.0)
    silent = {"shared": 0.0, "specific": 0.0, "spread": 0.0, "rate": 0.5}
    for name in ("shared", "specific", "spread"):
        logit = Rows(replace(wide, **{**silent, name: 1.5}), 0, wide.rows).logit
        assert logit.std() == pytest.approx(1.5, rel=0.25)
    assert not Rows(replace(wide, **silent), 0, 100).logit.any()


@pytest.mark.parametrize(("id_share", "low", "high"), [(0.0, 0.8, 1.01), (1.0, -0.2, 0.2)])
def test_words_tell_what_items_never_seen_are_worth(
    id_share: float, low: float, high: float
) -> None:
    config = replace(SMALL, id_share=id_share, specific=0.0, spread=0.0, items=4000)
    rows = Rows(config, 0, 8000)
    rows.user, rows.item = np.zeros(8000, np.int64), np.arange(8000)
    worth = rows.logit + config.shared * rows.price / np.sqrt(12)
    hot = [np.eye(size)[rows.word(name)] for name, size in ITEM_WORDS.items()]
    words = np.concatenate(hot, axis=1)
    weights = np.linalg.lstsq(words[:6000], worth[:6000], rcond=1e-6)[0]
    found = np.corrcoef(words[6000:] @ weights, worth[6000:])[0, 1]
    assert low < found < high


@given(
    st.lists(
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1), min_size=1, max_size=25
    )
)
def test_best_scores_are_those_of_all_pairs(values: list[float]) -> None:
    p = np.array(values)
    i, j = np.nonzero(~np.eye(len(p), dtype=bool))
    weight = p[i] * (1 - p[j])
    right = (weight * ((p[i] > p[j]) + 0.5 * (p[i] == p[j]))).sum()
    inner = p[(p > 0) & (p < 1)]
    entropy = -(inner * np.log(inner) + (1 - inner) * np.log1p(-inner)).sum() / len(p)
    best = best_scores(p)
    assert best.log_loss == pytest.approx(entropy, abs=1e-12)
    if weight.sum() > 1e-9:
        assert best.auc == pytest.approx(right / weight.sum(), abs=1e-6)


@pytest.mark.parametrize("values", [[0.3], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_no_auc_where_no_pair_can_differ(values: list[float]) -> None:
    assert best_scores(np.array(values)).auc is None


def test_best_scores_of_certain_and_of_equal_rows() -> None:
    assert best_scores(np.array([0.0, 1.0, 1.0])) == Best(0.0, 1.0)
    best = best_scores(np.full(100, 0.5, np.float32))
    assert best.log_loss == pytest.approx(np.log(2)) and best.auc == pytest.approx(0.5)
