"""Hashing: xxHash64 as its own library has it, and a table of strings as a dictionary has it."""

import numpy as np
import pyarrow as pa
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_shards.hashing import StringTable, mixed, paired, xxh64

FIRST_TWO = [6685036501382267578, 3047811371739217279]
TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=80)), max_size=30)


@given(TEXTS, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_xxh64_is_that_of_the_library(texts: list, seed: int, skip: int) -> None:
    values = pa.array(texts, pa.string()).slice(skip)
    expected = [xxhash.xxh64_intdigest((t or "").encode(), seed) for t in texts[skip:]]
    assert xxh64(values, seed).tolist() == expected


@given(TEXTS, TEXTS, st.integers(0, 3))
def test_a_string_table_is_a_dictionary(known: list, asked: list, skip: int) -> None:
    distinct = list(dict.fromkeys(text for text in known if text is not None))
    table = StringTable(pa.array(distinct, pa.string()))
    places = {text: i for i, text in enumerate(distinct)}
    values = pa.array(asked + known, pa.string()).slice(skip)
    expected = [places.get(text, -1) for text in (asked + known)[skip:]]
    assert table.find(values).tolist() == expected
    assert table.repeated() is None
    if distinct:
        assert StringTable(pa.array([*distinct, distinct[0]])).repeated() == len(distinct)


def test_mixed_spreads_neighbours_and_follows_its_seed() -> None:
    hashes = mixed(np.arange(100_000), 1)
    assert len(np.unique(hashes)) == 100_000
    assert abs((hashes / 2.0**64).mean() - 0.5) < 0.01
    bits = np.unpackbits(hashes.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.01
    assert (hashes != mixed(np.arange(100_000), 2)).all()
    # written down from a first run: a change would redraw every negative and every random split
    assert hashes[:2].tolist() == FIRST_TWO


def test_a_pair_is_ordered() -> None:
    a, b = mixed(np.arange(1000), 1), mixed(np.arange(1000), 2)
    assert len(np.unique(np.concatenate([paired(a, b), paired(b, a)]))) == 2000
