"""Beginnings that prompts share: encoded once, and nobody can tell."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.distinct import Prompts, distinct
from models.encoder import Encoder, EncoderConfig
from models.shared_beginnings import LONGEST, arranged, encode
from models.unictr import UniCTR
from tests.toy_encoder import FAMILIES, VOCABULARY, write_encoder
from tests.toy_method import ABC, stir
from tests.toy_unictr import (
    PLAIN,
    Row,
    by_hand,
    features_of,
    gradients,
    labels_of,
    tokens_of,
    trained,
)

Text = tuple[int, ...]
MANY = st.integers(1, 5)  # attentions that a token is worth, few enough to be outweighed
TOKENS = st.integers(0, 3)  # few, so that much is shared
TEXTS = st.lists(
    st.one_of(
        st.lists(TOKENS, max_size=12).map(tuple),
        st.tuples(
            st.sampled_from([(1, 2, 3, 0, 1, 2), (1, 2, 3), (2,) * 9, ()]),
            st.lists(TOKENS, max_size=5).map(tuple),
        ).map(lambda parts: parts[0] + parts[1]),
    ),
    min_size=1,
    max_size=24,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    folder = write_encoder(tmp_path_factory.mktemp("llama"), "llama")
    return EncoderConfig(str(folder), max_tokens=48, every=3, lora_dropout=0.0, chunks=2)


@pytest.fixture(scope="module")
def encoder(config: EncoderConfig) -> Encoder:
    """As if trained, in fp32."""
    encoder = Encoder(config, seed=0).eval()
    stir(encoder.lora().values(), "lora")
    return encoder


def _prompts(texts: Sequence[Text], worth: int) -> Prompts:
    return arranged(distinct(tokens_of(texts)), worth)


def _of_row(encoder: Encoder, prompts: Prompts, row: int, calls: int) -> Tensor:
    """[T, states, D]."""
    rows = [one for c in encode(encoder, prompts, calls) for one in torch.stack(c.states, 2)]
    place = int(prompts.of_row[row])
    return rows[len(rows) - len(prompts.ids) + place][: int(prompts.lengths[place])]


@settings(max_examples=20)
@given(texts=TEXTS, worth=st.sampled_from([3, 160, 10**6]), calls=MANY, data=st.data())
def test_states_and_gradients_are_those_of_each_prompt_alone(
    encoder: Encoder, texts: list[Text], worth: int, calls: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(texts) - 1))
    ids = torch.tensor([texts[row] or (0,)])
    alone = torch.stack(encoder(ids, torch.ones_like(ids, dtype=torch.bool)), 3)[0].mT
    found = _of_row(encoder, _prompts(texts, worth), row, calls)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    scale = torch.randn(found.shape, generator=torch.Generator().manual_seed(row))
    lora = encoder.lora_parameters()
    grads = [torch.autograd.grad((s * scale).mean(), lora) for s in (found, alone)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


class Reader:
    """Stands for an encoder; keeps the shape of what it reads."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def __call__(self, ids: Tensor, mask: Tensor, depth: Tensor | None = None) -> list[Tensor]:
        assert mask.any(-1).all(), "a token that sees nothing"
        self.read.append((len(ids), ids.shape[1]))
        return [torch.zeros(*ids.shape, 1)]


def _read(texts: Sequence[Text], worth: int, calls: int) -> list[tuple[int, int]]:
    reader = Reader()
    encode(reader, _prompts(texts, worth), calls)
    return reader.read


@settings(max_examples=60)
@given(texts=TEXTS, worth=st.sampled_from([3, 160, 10**6]), calls=MANY)
def test_ranks_make_as_many_calls_whatever_is_shared(
    texts: list[Text], worth: int, calls: int
) -> None:
    plain, shared = _read(texts, 0, calls), _read(texts, worth, calls)
    assert len(plain) == len(shared) == calls
    if calls == 1:
        assert math.prod(*shared) <= math.prod(*plain)


def test_what_many_prompts_share_is_read_once() -> None:
    """Users with fourteen, two and two items; the two small trees stand in one line."""
    users = [((user, *range(19)), items) for user, items in ((30, 14), (31, 2), (32, 2))]
    texts = [(*user, 40 + item, 41) for user, items in users for item in range(items)]
    assert _read(texts, 0, 1) == [(18, 22)]
    assert _read(texts, 160, 1) == [(2, 48)]
    assert _read(texts, 160, 4) == [(1, 22), (1, 22), (1, 48), (1, 48)]


@given(st.integers(1, 200), st.integers(1, 60))
def test_beginnings_are_shared_where_that_costs_less(size: int, same: int) -> None:
    """Two prompts: the tokens that they share against the attention that the mask throws away."""
    texts = [(0,) * same + (number,) * size for number in (1, 2)]
    joined = 2 * (same + size) * size < 160 * same
    assert len(_prompts(texts, 160).lines) == (1 if joined else 2)


def test_a_line_is_no_longer_than_its_bound() -> None:
    texts = [(1,) * 40 + (item // 50, item % 50) for item in range(1200)]
    lines, longest = zip(*_read(texts, 10**9, 2), strict=True)
    assert lines == (1, 1) and LONGEST - 2 <= max(longest) <= LONGEST


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_are_shared_where_later_tokens_change_nothing(
    tmp_path: Path, family: str
) -> None:
    folder = write_encoder(tmp_path, family)
    encoder = Encoder(EncoderConfig(str(folder), max_tokens=48), seed=0).eval()
    ids = torch.arange(10).expand(2, 10).clone()
    ids[1, -1] = VOCABULARY - 1
    states = encoder(ids, torch.ones_like(ids, dtype=torch.bool))[-1][:, :-1]
    assert (encoder.worth > 0) == torch.equal(*states)


def test_a_llama_that_looks_both_ways_shares_nothing(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"is_causal": false,', 1))
    assert Encoder(EncoderConfig(str(folder), max_tokens=48), seed=0).worth == 0


@pytest.fixture(scope="module", params=[False, True], ids=["encoded", "kept"])
def method(config: EncoderConfig, request: pytest.FixtureRequest) -> UniCTR:
    method = trained(replace(config, cache_gb=0.001), PLAIN, ABC)
    if request.param:
        method.freeze_shared(True)
    return method


@settings(max_examples=8)
@given(texts=TEXTS, data=st.data())
def test_s2_a_row_is_scored_as_if_it_were_alone(
    method: UniCTR, texts: list[Text], data: st.DataObject
) -> None:
    features = features_of([(data.draw(st.integers(-1, 2)), text) for text in texts])
    for _ in range(2):  # the second time from states that were kept, if they are
        torch.testing.assert_close(
            method(features), by_hand(method, features), rtol=1e-5, atol=1e-6
        )


def test_checkpointing_and_sharing_give_the_gradients_of_neither(config: EncoderConfig) -> None:
    rows: list[Row] = [(slot, (5, 6, 7, 8, 9, slot, item)) for slot in (0, 1) for item in range(6)]
    found = []
    for checkpointing, share in ((False, False), (True, True)):
        method = trained(replace(config, checkpointing=checkpointing), PLAIN, ABC).train()
        method.encoder.worth *= share
        label, weight = labels_of(len(rows))
        loss = method.loss(method(features_of(rows)), label, weight, len(rows))
        found.append(gradients(method, loss))
    assert any(grad.any() for name, grad in found[0].items() if "lora_A" in name)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
