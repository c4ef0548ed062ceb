"""Uni-CTR: how rows and prompts are scored, whatever the batch (C3, C5, C6, S1-S3)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import EncoderConfig, UniCTRConfig
from models.distinct import distinct
from models.domain_head import DomainHead
from tests.toy_method import ABC
from tests.toy_unictr import (
    CHUNKS,
    CONFIGS,
    EACH,
    PLAIN,
    ROWS,
    Methods,
    Row,
    by_hand,
    close,
    every_method,
    features_of,
    gradients,
    labels_of,
    part_of,
    small_bert,
    some_rows,
    tokens_of,
    trained,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def methods(encoder: EncoderConfig) -> Methods:
    return every_method(encoder)


@EACH
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=12)
@given(rows=some_rows)
def test_c5_s2_s3_a_row_is_scored_as_if_it_were_alone(
    methods: Methods, config: UniCTRConfig, training: bool, rows: list[Row]
) -> None:
    method = methods[config].train(training)
    features = features_of(rows)
    close(method(features), by_hand(method, features))
    every = replace(features, slots=(0, 1, 2))
    assert torch.equal(method(every), method(features))


@EACH
@settings(max_examples=12)
@given(rows=some_rows, data=st.data())
def test_s1_permuting_a_batch_permutes_its_logits(
    methods: Methods,
    config: UniCTRConfig,
    rows: list[Row],
    data: st.DataObject,
) -> None:
    method, features = methods[config].eval(), features_of(rows)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    shuffled, expected = method(part_of(features, order)), method(features)[order]
    close(shuffled, expected)
    if len({prompt or (0,) for _, prompt in rows}) == len(rows):  # what is equal may change places
        assert torch.equal(shuffled, expected)


@EACH
@settings(max_examples=8)
@given(rows=some_rows, data=st.data())
def test_c3_the_general_logit_does_not_know_the_domain(
    methods: Methods,
    config: UniCTRConfig,
    rows: list[Row],
    data: st.DataObject,
) -> None:
    method, features = methods[config].eval(), features_of(rows)
    moved = torch.tensor([data.draw(st.integers(-1, 2)) for _ in rows])
    got, wanted = method(replace(features, slot=moved)), method(features)
    assert torch.equal(got[:, 1], wanted[:, 1])
    assert torch.equal(got[moved < 0, 0], wanted[moved < 0, 1])


@given(rows=some_rows, calls=st.integers(1, 6))
@settings(max_examples=30)
def test_identical_prompts_are_encoded_once_in_as_many_calls_whatever_the_batch(
    methods: Methods, rows: list[Row], calls: int
) -> None:
    method = methods[PLAIN].eval()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = method.encoder.register_forward_hook(lambda _, inputs, out: seen.append(inputs))
    method.calls = calls
    method(features_of(rows))
    method.calls = CHUNKS
    hook.remove()
    assert len(seen) == calls
    wanted = {prompt or (0,) for _, prompt in rows}
    encoded = [
        tuple(row[own].tolist()) for ids, mask in seen for row, own in zip(ids, mask, strict=True)
    ]
    assert set(encoded) == wanted
    assert len(encoded) == max(len(wanted), calls)
    assert [len(prompt) for prompt in encoded] == sorted(len(prompt) for prompt in encoded)
    for ids, mask in seen:
        assert ids.shape == mask.shape and len(ids) > 0
        assert mask.shape[1] == int(mask.sum(1).max()) and mask[:, 0].all()
        assert (mask[:, :-1] >= mask[:, 1:]).all()


@given(prompts=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=20))
def test_distinct_prompts_are_exact(prompts: list[list[int]]) -> None:
    found = distinct(tokens_of(prompts))
    texts = [
        tuple(ids[:length].tolist())
        for ids, length in zip(found.ids, found.lengths.tolist(), strict=True)
    ]
    assert [texts[int(i)] for i in found.of_row] == [tuple(p) or (0,) for p in prompts]
    assert len(set(texts)) == len(texts)
    assert found.lengths.tolist() == sorted(found.lengths.tolist())


@EACH
@pytest.mark.parametrize("rows", [[(-1, ())], [(1, ())] * 5, [(-1, ()), (0, (5,)), (0, ())]])
def test_padding_rows_are_finite_and_teach_nothing(
    methods: Methods, config: UniCTRConfig, rows: list[Row]
) -> None:
    method = methods[config].train()
    features = features_of(rows, slots=(0, 1))
    label, weight = labels_of(len(rows))
    weight = torch.tensor([float(bool(prompt)) for _, prompt in rows]) * weight
    loss = method.loss(method(features), label, weight, int((weight > 0).sum()))
    assert method(features).isfinite().all() and loss.isfinite()
    grads = gradients(method, loss)
    assert all(grad.isfinite().all() for grad in grads.values())
    if not weight.any():
        assert not any(grad.any() for grad in grads.values())


def _blocks(head: nn.Module) -> list[nn.Module]:
    assert isinstance(head, DomainHead) and head.ladder is not None
    return list(head.ladder.blocks)


@pytest.mark.parametrize(("every", "blocks"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_c6_a_ladder_has_a_block_for_each_tap(
    encoder: EncoderConfig, every: int, blocks: int
) -> None:
    method = trained(replace(encoder, every=every), PLAIN, ABC)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in _blocks(method.heads[1]):
        block.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
        block.register_forward_hook(lambda *io: outputs.append(io[2]))
    method(features_of([(1, (5, 6, 7, 2))]))
    ids = torch.tensor([[5, 6, 7, 2]])
    states = method.encoder.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    ).hidden_states
    assert len(inputs) == blocks == 3 // every + 1
    for i in range(blocks):
        close(inputs[i], states[i * every] + (outputs[i - 1] if i else 0))


def test_a_bf16_method_runs(encoder: EncoderConfig) -> None:
    method = trained(encoder, replace(PLAIN, ids=True), ABC)
    wanted = method(features_of(ROWS))
    logit = method.bfloat16()(features_of(ROWS).to(torch.bfloat16))
    assert logit.dtype == torch.bfloat16
    torch.testing.assert_close(logit.double(), wanted, rtol=0.3, atol=0.3)
    assert torch.equal(logit[:, 2].double(), wanted[:, 2])
    loss = method.loss(logit.float(), torch.ones(6), torch.ones(6), 6)
    assert all(grad.isfinite().all() for grad in gradients(method, loss).values())


def test_ids_reach_every_tower_and_only_by_option(
    methods: Methods,
) -> None:
    for config in CONFIGS:
        method = methods[config].eval()
        moved = [method(features_of(ROWS, seed=seed))[:, :2] for seed in (0, 1)]
        assert (moved[0] != moved[1]).all() if config.ids else torch.equal(moved[0], moved[1])
    none = replace(features_of(ROWS), embedded=torch.zeros(len(ROWS), 0, 0, dtype=torch.float64))
    assert torch.equal(methods[PLAIN](none), methods[PLAIN](features_of(ROWS)))


def test_dropout_is_drawn_in_training_alone(encoder: EncoderConfig) -> None:
    config = replace(PLAIN, ladder_dropout=0.4, dropout=0.4)
    method, plain = trained(encoder, config, ABC), trained(encoder, PLAIN, ABC)
    features = features_of(ROWS)
    assert torch.equal(method(features), plain(features))
    torch.manual_seed(0)
    drawn = [method.train()(features) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(method(features), drawn[0]) and not torch.equal(*drawn)


def test_a_row_of_an_unlisted_slot_is_our_mistake(methods: Methods) -> None:
    with pytest.raises(AssertionError, match="not among Features.slots"):
        methods[PLAIN](features_of([(0, (5,)), (1, (6,))], slots=(1,)))
