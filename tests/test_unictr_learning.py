"""Uni-CTR: what each part learns from which rows (C1-C4, S6)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import EncoderConfig, UniCTRConfig
from tests.toy_method import same
from tests.toy_unictr import (
    EACH,
    Methods,
    Row,
    close,
    every_method,
    features_of,
    gradients,
    labels_of,
    of_head,
    part_of,
    row_by_hand,
    small_bert,
    some_rows,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def methods(encoder: EncoderConfig) -> Methods:
    return every_method(encoder)


@EACH
@settings(max_examples=12)
@given(rows=some_rows)
def test_c4_the_loss_is_the_mean_of_own_and_general_cross_entropy(
    methods: Methods, config: UniCTRConfig, rows: list[Row]
) -> None:
    method, features = methods[config].eval(), features_of(rows)
    label, weight = labels_of(len(rows))
    loss = method.loss(method(features), label, weight, 7)
    wanted = torch.zeros((), dtype=torch.float64)
    for row, (slot, _) in enumerate(rows):
        own, general = (torch.sigmoid(logit) for logit in row_by_hand(method, features, row))
        terms = [own, general] if slot >= 0 else [general]
        for p in terms:
            truth = p if label[row] else 1 - p
            wanted = wanted - weight[row] * truth.log() / 7
    close(loss, wanted)
    got, expected = gradients(method, loss), gradients(method, wanted)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@EACH
@settings(max_examples=8)
@given(rows=some_rows, data=st.data())
def test_s6_the_shares_of_any_ranks_sum_to_the_whole(
    methods: Methods,
    config: UniCTRConfig,
    rows: list[Row],
    data: st.DataObject,
) -> None:
    """Also where a rank has rows of one domain alone, or padding rows alone."""
    method, features = methods[config].eval(), features_of(rows)
    label, weight = labels_of(len(rows))
    present = tuple(sorted({slot for slot, _ in rows} - {-1}))
    rank = torch.tensor([data.draw(st.integers(0, 2)) for _ in rows])
    whole = method.loss(method(features), label, weight, len(rows))
    shares = [
        method.loss(method(part_of(features, mine, present)), label[mine], weight[mine], len(rows))
        for mine in (torch.nonzero(rank == r)[:, 0] for r in range(3))
        if len(mine)
    ]
    close(sum(shares, torch.zeros_like(whole)), whole)
    summed = [gradients(method, share) for share in shares]
    for name, grad in gradients(method, whole).items():
        torch.testing.assert_close(sum(g[name] for g in summed), grad, rtol=1e-8, atol=1e-9)


@EACH
def test_c1_a_head_learns_from_its_own_rows_alone(methods: Methods, config: UniCTRConfig) -> None:
    method = methods[config].train()
    rows = [(0, (5, 6)), (1, (5, 4)), (0, (7, 8, 1)), (-1, (5, 6)), (1, ()), (0, (5, 6))]
    features, (label, weight) = features_of(rows), labels_of(len(rows))
    method.zero_grad()
    method.loss(method(replace(features, slots=(0, 1))), label, weight, 6).backward()
    assert all(p.grad is None for p in method.heads[2].parameters())
    assert all(p.grad is not None and p.grad.any() for p in method.heads[1].parameters())
    mixed = gradients(method, method.loss(method(features), label, weight, 6))
    mine = features.slot == 0
    own = method(part_of(features, torch.nonzero(mine)[:, 0]))
    alone = gradients(method, method.loss(own, label[mine], weight[mine], 3))
    for name, grad in of_head(mixed, 0).items():
        close(grad, alone[name] * 3 / 6)


@EACH
@pytest.mark.parametrize("rows", [[(0, (5, 6)), (-1, (7,))], [(-1, ()), (-1, ())]])
def test_a_listed_slot_without_rows_gets_zeros_and_the_unlisted_none(
    methods: Methods, config: UniCTRConfig, rows: list[Row]
) -> None:
    method = methods[config].train()
    ran: list[int] = []
    hooks = [
        head.register_forward_hook(lambda _, inputs, out: ran.append(len(out)))
        for head in method.heads
    ]
    method.zero_grad()
    logit = method(features_of(rows, slots=(0, 2)))
    method.loss(logit, *labels_of(len(rows)), 2).backward()
    for hook in hooks:
        hook.remove()
    assert ran == [sum(slot == 0 for slot, _ in rows), 0]
    for parameter in method.heads[2].parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert all(p.grad is None for p in method.heads[1].parameters())


@EACH
@settings(max_examples=8)
@given(rows=some_rows, data=st.data())
def test_c2_other_domains_labels_and_vectors_move_no_bit_of_a_heads_gradient(
    methods: Methods,
    config: UniCTRConfig,
    rows: list[Row],
    data: st.DataObject,
) -> None:
    method, features = methods[config].eval(), features_of(rows)
    others = features.slot != 1
    label, weight = labels_of(len(rows))
    changed = replace(
        features,
        embedded=torch.where(others[:, None, None], features.embedded + 1, features.embedded),
        slot=torch.where(others, data.draw(st.sampled_from([-1, 0, 2])), features.slot),
    )
    losses = (
        method.loss(method(changed), torch.where(others, 1 - label, label), weight, 9),
        method.loss(method(features), label, weight, 9),
    )
    a, b = (of_head(gradients(method, loss), 1) for loss in losses)
    assert same(a, b)


@EACH
@settings(max_examples=8)
@given(rows=some_rows)
def test_c2_other_domains_prompts_do_not_move_a_heads_gradient(
    methods: Methods, config: UniCTRConfig, rows: list[Row]
) -> None:
    method, features = methods[config].eval(), features_of(rows)
    label, weight = labels_of(len(rows))
    other = [(slot, prompt if slot == 1 else (*prompt, 3)) for slot, prompt in rows]
    a, b = (
        of_head(gradients(method, method.loss(method(f), label, weight, 9)), 1)
        for f in (features, features_of(other))
    )
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@EACH
def test_c3_every_row_teaches_lora_and_the_general_network(
    methods: Methods, config: UniCTRConfig
) -> None:
    method = methods[config].train()
    for row in [(0, (5, 6, 2)), (2, (7, 1)), (-1, (3, 4))]:
        loss = method.loss(method(features_of([row])), *labels_of(1), 1)
        lora = torch.autograd.grad(loss, method.encoder.lora_parameters(), retain_graph=True)
        assert all(grad.any() for grad in lora)
        net = method.general
        general = torch.autograd.grad(loss, [net.gate.query.weight, net.tower.out.weight])
        assert all(grad.any() for grad in general)
