"""Beginnings that prompts share: encoded once, and nobody can tell."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.distinct import Prompts, distinct
from models.encoder import Encoder, EncoderConfig
from models.shared_beginnings import arranged, encode, tree
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
MANY = st.integers(1, 5)
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


def _of_row(encoder: Encoder, prompts: Prompts, row: int, calls: int) -> Tensor:
    """[T, states, D]."""
    rows = [one for c in encode(encoder, prompts, calls) for one in torch.stack(c.states, 2)]
    place = int(prompts.of_row[row])
    return rows[len(rows) - len(prompts.ids) + place][: int(prompts.lengths[place])]


@settings(max_examples=12)
@given(texts=TEXTS, calls=MANY, data=st.data())
def test_states_and_gradients_are_those_of_each_prompt_alone(
    encoder: Encoder, texts: list[Text], calls: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(texts) - 1))
    ids = torch.tensor([texts[row] or (0,)])
    seen = torch.ones_like(ids)
    alone = torch.stack(encoder.states(ids, attention_mask=seen), 3)[0].mT  # no tree at all
    found = _of_row(encoder, arranged(distinct(tokens_of(texts)), True), row, calls)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    scale = torch.randn(found.shape, generator=torch.Generator().manual_seed(row))
    lora = encoder.lora_parameters()
    grads = [torch.autograd.grad((s * scale).mean(), lora) for s in (found, alone)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@given(texts=TEXTS, calls=MANY)
def test_ranks_make_as_many_calls_whatever_is_shared(texts: list[Text], calls: int) -> None:
    read: list[int] = []

    def reader(ids: Tensor, mask: Tensor) -> list[Tensor]:
        read.append(len(ids))
        return [torch.zeros(*ids.shape, 1)]

    prompts = arranged(distinct(tokens_of(texts)), True)
    encode(reader, prompts, calls)
    assert len(read) == calls and sum(read) == max(calls, len(prompts.ids))


@given(texts=TEXTS)
def test_a_tree_holds_each_beginning_once(texts: list[Text]) -> None:
    prompts = arranged(distinct(tokens_of(texts)), True)
    alike = tree(prompts.ids, prompts.lengths)
    ways = [text or (0,) for text in texts]
    assert alike.ids.numel() == len({way[: n + 1] for way in ways for n in range(len(way))})
    for way, row in zip(ways, alike.way[prompts.of_row], strict=True):
        assert tuple(alike.ids[0, row[: len(way)]].tolist()) == way
        assert alike.depth[0, row[: len(way)]].tolist() == [*range(len(way))]
    assert alike.way.flatten()[alike.first].tolist() == [*range(alike.ids.numel())]


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_are_shared_where_later_tokens_change_nothing(
    tmp_path: Path, family: str
) -> None:
    folder = write_encoder(tmp_path, family)
    encoder = Encoder(EncoderConfig(str(folder), max_tokens=48), seed=0).eval()
    ids = torch.arange(10).expand(2, 10).clone()
    ids[1, -1] = VOCABULARY - 1
    states = encoder.states(ids, attention_mask=torch.ones_like(ids))[-1][:, :-1]
    assert encoder.shares == (family == "llama") == torch.equal(*states)


def test_a_llama_that_looks_both_ways_shares_nothing(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"is_causal": false,', 1))
    assert Encoder(EncoderConfig(str(folder), max_tokens=48), seed=0).shares is False


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
        method.encoder.shares = share
        label, weight = labels_of(len(rows))
        loss = method.loss(method(features_of(rows)), label, weight, len(rows))
        found.append(gradients(method, loss))
    assert any(grad.any() for name, grad in found[0].items() if "lora_A" in name)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
