"""An adapter's rows follow its ids to wherever another vocabulary puts them."""

import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_shards import Field, Schema, Vocabulary
from data_shards.vocabulary import count_values
from trainer.adapter_store import Adapter
from trainer.own_rows import OWN_ROWS, OWN_TABLE, renumbered

BASE = Vocabulary.build(
    schema := Schema((Field("item", "anonymous", "item"),)),
    count_values(schema, pa.table({"item": ["a", "b", "c"]})),
)
WORDS = st.lists(st.sampled_from("stuvwxyz"), unique=True, max_size=6)


def _adapter(words: list[str], met: list[int]) -> Adapter:
    """Each row tells its id: the trunk's by their number, own ones by their letter."""
    size, rows = BASE.size("item"), torch.tensor(met, dtype=torch.int64)
    told = [*range(size), *(float(ord(word)) for word in words)]
    tensors = {
        f"{OWN_TABLE}item/rows": rows,
        f"{OWN_TABLE}item/values": torch.tensor([[told[n]] for n in met]).view(-1, 1),
    }
    if words:
        tensors[OWN_ROWS + "item"] = torch.tensor([[float(ord(word))] for word in words])
    facts = {"trunk": "", "schema": "", "data": "", "metrics": {}, "kept": True}
    return Adapter("ufin", "new", 1, **facts, tensors=tensors, vocabulary={"item": tuple(words)})


@given(before=WORDS, after=WORDS, data=st.data())
def test_rows_follow_their_ids(before: list[str], after: list[str], data: st.DataObject) -> None:
    size = BASE.size("item")
    every = st.sampled_from(range(size + len(before)))
    met = sorted(data.draw(st.lists(every, unique=True)))
    found = renumbered(_adapter(before, met), BASE.with_added({"item": after}))
    rows, values = (found.tensors[f"{OWN_TABLE}item/{part}"] for part in ("rows", "values"))
    kept = {n for n in met if n < size}
    own = {after.index(w) + size for n, w in enumerate(before, size) if n in met and w in after}
    assert set(rows.tolist()) == kept | own
    assert values[:, 0].tolist() == [_told(row, after) for row in rows.tolist()]
    if before and after:
        expected = [float(ord(word)) if word in before else 0.0 for word in after]
        assert found.tensors[OWN_ROWS + "item"][:, 0].tolist() == expected


def _told(row: int, words: list[str]) -> float | Tensor:
    size = BASE.size("item")
    return float(row) if row < size else float(ord(words[row - size]))
