"""States kept of a frozen encoder: the same as computed anew, within their budget."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.distinct import Prompts, States, distinct
from models.method import Tokens
from models.state_cache import StateCache
from tests.toy_method import ABC
from tests.toy_unictr import PLAIN, ROWS, features_of, labels_of, small_bert, trained

D, TAPS = 3, 2
BATCHES = st.lists(
    st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=6), min_size=1
)


def _tokens(prompts: list[list[int]]) -> Tokens:
    values = torch.tensor([t for prompt in prompts for t in prompt], dtype=torch.int64)
    return Tokens(values, torch.tensor([len(prompt) for prompt in prompts]))


def _encode(calls: list[int], ids: Tensor, mask: Tensor) -> list[Tensor]:
    """A running sum along each prompt: what stands before a token matters, padding does not."""
    calls.append(len(ids))
    state = (ids * mask).cumsum(1).unsqueeze(2) * torch.arange(1.0, D + 1)
    return [state * tap for tap in range(1, TAPS + 1)]


def _of_row(prompts: Prompts, encoded: list[States], row: int) -> Tensor:
    """[T, TAPS, D] of one row's prompt."""
    states = [one for chunk in encoded for one in torch.stack(chunk.states, 2)]
    place = int(prompts.of_row[row])
    return states[place][: int(prompts.lengths[place])]


@given(BATCHES, st.integers(0, 400), st.integers(1, 4))
def test_kept_states_are_those_that_would_be_computed(
    batches: list[list[list[int]]], budget: int, calls: int
) -> None:
    cache = StateCache(budget)
    for batch in batches:
        expected = distinct(_tokens(batch))
        prompts, encoded = cache.encode(partial(_encode, []), expected, calls)
        assert sum(len(chunk.mask) for chunk in encoded) == len(prompts.ids) == len(expected.ids)
        for row, tokens in enumerate(batch):
            ids = torch.tensor([tokens or [0]])
            alone = torch.stack(_encode([], ids, torch.ones_like(ids)), 3)[0].mT
            assert torch.equal(_of_row(prompts, encoded, row), alone)
        assert cache.bytes <= budget


@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=6))
def test_what_is_kept_is_not_encoded_again(batch: list[list[int]]) -> None:
    cache, calls = StateCache(1 << 20), []
    for _ in range(2):
        cache.encode(partial(_encode, calls), distinct(_tokens(batch)), 4)
        assert sum(calls) == len(cache) == len({tuple(prompt or [0]) for prompt in batch})


def test_without_room_everything_is_encoded_each_time() -> None:
    cache, calls = StateCache(0), []
    for _ in range(2):
        cache.encode(partial(_encode, calls), distinct(_tokens([[1], [2], [2]])), 4)
    assert calls == [1, 1, 1, 1] and len(cache) == cache.bytes == 0


def _passes(folder: Path, keep: bool, gb: float, epochs: int) -> tuple[list[Tensor], list[int]]:
    """Adapter gradients of some epochs of phase 2 in train mode, with LoRA's dropout in the run
    file; and the prompts of each encoder call."""
    encoder = replace(small_bert(folder), lora_dropout=0.5, cache_gb=gb)
    method = trained(encoder, PLAIN, ABC)
    method.freeze_shared(keep)
    method.train()
    calls: list[int] = []
    method.encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    label, weight = labels_of(len(ROWS))
    found: list[Tensor] = []
    for _ in range(epochs):
        loss = method.loss(method(features_of(ROWS)), label, weight, len(ROWS))
        found += torch.autograd.grad(loss, method.adapter_parameters(), allow_unused=True)
    return [grad for grad in found if grad is not None], calls


def test_phase_2_learns_the_same_from_kept_states(tmp_path: Path) -> None:
    plain, every_time = _passes(tmp_path, keep=False, gb=0.0, epochs=2)
    kept, once = _passes(tmp_path, keep=True, gb=0.001, epochs=2)
    torch.testing.assert_close(kept, plain, rtol=1e-9, atol=1e-12)
    assert len(every_time) == 6 and sum(once) == len({prompt for _, prompt in ROWS})


@pytest.mark.parametrize("keep", [False, True])
def test_a_frozen_shared_part_gets_no_gradient(tmp_path: Path, keep: bool) -> None:
    method = trained(small_bert(tmp_path), PLAIN, ABC)
    method.freeze_shared(keep)
    method.train()(features_of(ROWS)).sum().backward()
    assert all(p.grad is None for p in method.encoder.parameters())
    assert not method.encoder.training and not method.general.training and method.heads.training
