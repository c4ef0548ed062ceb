"""Splits: exact counts per domain, stratified by label or ordered by time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.splits import SplitConfig, assign

PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda sizes: {f"part{i}": size / sum(sizes) for i, size in enumerate(sizes)}
)
CLASSES = np.array([1, 0], np.float32)
LABELS = st.tuples(st.integers(0, 40), st.integers(0, 200)).map(
    lambda counts: np.random.default_rng(1).permutation(np.repeat(CLASSES, counts))
)


def _counts(parts: dict[str, float], n: int) -> list[int]:
    cuts = [0] + [round(c * n) for c in np.cumsum(list(parts.values()))]
    return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


@given(PARTS, LABELS, st.sampled_from(["random", "time"]))
def test_every_part_has_its_exact_count(parts: dict, label: np.ndarray, by: str) -> None:
    config = SplitConfig(by, parts)  # pyright: ignore[reportArgumentType]
    part = assign(config, "d", label, np.zeros(len(label)))
    assert np.bincount(part, minlength=len(parts)).tolist() == _counts(parts, len(label))


@given(PARTS, LABELS)
def test_every_part_has_its_share_of_positives(parts: dict, label: np.ndarray) -> None:
    part = assign(SplitConfig(parts=parts), "d", label, np.zeros(len(label)))
    for number, rows in enumerate(_counts(parts, len(label))):
        expected = label.sum() * rows / max(len(label), 1)
        assert abs(label[part == number].sum() - expected) <= 2


@given(LABELS, st.data())
def test_by_time_no_later_row_stands_in_an_earlier_part(
    label: np.ndarray, data: st.DataObject
) -> None:
    time = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=len(label), max_size=len(label)))
    )
    part = assign(SplitConfig("time"), "d", label, time)
    order = np.argsort(time, kind="stable")
    assert (np.diff(part[order]) >= 0).all()


def test_the_seed_and_the_domain_decide_and_nothing_else() -> None:
    label = np.arange(500) % 3 == 0
    time = np.zeros(500)
    first = assign(SplitConfig(), "books", label, time)
    assert (first == assign(SplitConfig(), "books", label, time)).all()
    assert (first != assign(SplitConfig(), "toys", label, time)).any()
    assert (first != assign(SplitConfig(seed=124), "books", label, time)).any()


def test_the_first_part_feeds_the_vocabulary_unless_others_are_named() -> None:
    parts = {"pretrain": 0.5, "adapt": 0.3, "test": 0.2}
    assert SplitConfig(parts=parts).vocabulary_parts == ("pretrain",)
    both = SplitConfig(parts=parts, train=("pretrain", "adapt"))
    assert both.vocabulary_parts == ("pretrain", "adapt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"by": "hash"}, "unknown way to split 'hash'"),
        ({"parts": {"train": 0.5, "test": 0.4}}, "the parts sum to 0.9; they must sum to 1"),
        ({"parts": {}}, "the parts sum to 0; they must sum to 1"),
        ({"parts": {"train": 1.5, "test": -0.5}}, "a share is above 0 and at most 1, not 1.5"),
        ({"parts": {"a/b": 1.0}}, "split 'a/b': a name is letters, digits and _"),
        ({"seed": -1}, "the seed is 0 or more, not -1"),
        ({"train": ("trian",)}, "unknown split in split.train 'trian'; the nearest is 'train'"),
    ],
)
def test_wrong_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitConfig(**config)
