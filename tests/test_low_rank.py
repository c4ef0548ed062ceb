"""One adapted layer: mixed batches (M7), rank (M8), peft (M11), first weights, and the tiles."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from models.adapters import TILE, AdapterShape, DomainLinear, LowRank, tiles
from tests.toy_method import (
    stir,
)


@st.composite
def mixed(draw: st.DrawFn) -> tuple[DomainLinear, Tensor, Tensor]:
    """A layer with adapters, rows of all kinds, and each row's slot."""
    d_in, d_out, count = (
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 5)),
    )
    shape = AdapterShape(draw(st.integers(1, 4)), draw(st.booleans()), 0.0, 0.0)
    layer = DomainLinear(d_in, d_out).double()
    for _ in range(count):
        layer.append(shape, torch.Generator())
    stir((p.data for p in layer.parameters()), "layer")
    lowest = draw(st.integers(-1, count - 1))  # the highest too: a batch of one domain
    slot = draw(st.lists(st.integers(lowest, count - 1), min_size=1, max_size=4 * TILE))
    x = torch.randn(
        len(slot), d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return layer, x, torch.tensor(slot)


def _by_loop(layer: DomainLinear, x: Tensor, slot: Tensor) -> Tensor:
    low_rank, linear = layer.low_rank, layer.linear
    assert low_rank is not None
    rows = []
    for row, at in zip(x, slot.tolist(), strict=True):
        h = linear.weight @ row + linear.bias
        if at >= 0:
            h = h + low_rank.b[at] @ (low_rank.a[at] @ row)
            h = h if low_rank.bias is None else h + low_rank.bias[at]
        rows.append(h)
    return torch.stack(rows)


def _by_merged(layer: DomainLinear, x: Tensor, slot: Tensor) -> Tensor:
    low_rank, linear = layer.low_rank, layer.linear
    assert low_rank is not None
    bias = (
        low_rank.bias if low_rank.bias is not None else low_rank.b.new_zeros(low_rank.b.shape[:2])
    )
    weights = torch.cat([linear.weight + low_rank.b @ low_rank.a, linear.weight[None]])
    biases = torch.cat([linear.bias + bias, linear.bias[None]])
    return torch.einsum("bi,boi->bo", x, weights[slot]) + biases[slot]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("oracle", [_by_loop, _by_merged])
@settings(max_examples=40)
@given(case=mixed())
def test_m7_a_mixed_batch_equals_one_row_at_a_time_and_merged_weights(
    training: bool,
    oracle: Callable[[DomainLinear, Tensor, Tensor], Tensor],
    case: tuple[DomainLinear, Tensor, Tensor],
) -> None:
    layer, x, slot = case
    x.requires_grad_()
    got, wanted = layer.train(training)(x, slot), oracle(layer, x, slot)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    inner = [x, *layer.parameters()]
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    got_grads, wanted_grads = (
        torch.autograd.grad((h * weights).sum(), inner, materialize_grads=True)
        for h in (got, wanted)
    )
    torch.testing.assert_close(got_grads, wanted_grads, rtol=1e-10, atol=1e-10)


@given(case=mixed())
def test_m8_a_domain_moves_a_weight_by_no_more_than_its_rank(case: tuple) -> None:
    layer, _, _ = case
    for slot in range(len(layer.low_rank.a)):
        moved = layer.merged(slot)[0] - layer.linear.weight.detach()
        assert torch.linalg.matrix_rank(moved, atol=1e-10) <= layer.low_rank.a.shape[1]


@pytest.mark.parametrize("rank", [1, 3])
def test_m11_peft_gives_the_same_layer(rank: int) -> None:
    layer = DomainLinear(10, 7)
    layer.append(AdapterShape(rank, False, 0.0, 0.0), torch.Generator())
    stir((p.data for p in layer.parameters()), "layer")
    peer = nn.Sequential(nn.Linear(10, 7))
    peer.load_state_dict({f"0.{name}": t for name, t in layer.linear.state_dict().items()})
    lora = get_peft_model(peer, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))  # type: ignore[arg-type]
    for name, parameter in lora.named_parameters():
        if "lora" in name:
            parameter.data.copy_(layer.own(0)["a" if "lora_A" in name else "b"])
    x = torch.randn(50, 10)
    torch.testing.assert_close(lora(x), layer(x, torch.zeros(50, dtype=torch.int64)))


@pytest.mark.parametrize(("asked", "std"), [(0.0, (2 / (400 + 8)) ** 0.5), (0.3, 0.3)])
def test_a_starts_gaussian_and_b_at_zero(asked: float, std: float) -> None:
    layer = DomainLinear(400, 6)
    layer.append(AdapterShape(8, True, 0.0, asked), torch.Generator().manual_seed(0))
    own = layer.own(0)
    assert float(own["a"].std()) == pytest.approx(std, rel=0.05)
    assert abs(float(own["a"].mean())) < 0.05 * std
    assert not own["b"].any() and not own["bias"].any()


def test_dropout_of_the_low_rank_branch_works_in_training_alone() -> None:
    layer = DomainLinear(30, 6)
    layer.append(AdapterShape(2, False, 0.5, 0.0), torch.Generator())
    stir((p.data for p in layer.parameters()), "layer")
    x, slot = torch.randn(40, 30), torch.tensor([0, -1] * 20)
    plain = layer.linear(x)
    kept = LowRank({name: tensor[None] for name, tensor in layer.own(0).items()}, 0.0)
    assert torch.equal(layer.eval()(x, slot), plain + kept.eval()(x, slot))
    dropped = layer.train()(x, slot)
    assert torch.equal(dropped[1::2], plain[1::2])
    assert (dropped[::2] != layer.eval()(x, slot)[::2]).all()


@given(st.lists(st.integers(-1, 60), max_size=400))
def test_tiles_hold_every_row_once_and_one_slot_each(slot: list[int]) -> None:
    slots_ = torch.tensor(slot, dtype=torch.int64)
    place, tile_slot = tiles(slots_)
    assert len(set(place.tolist())) == len(slot)
    assert torch.equal(tile_slot[place // TILE], slots_)
    assert len(tile_slot) <= len(slot) / TILE + len(set(slot))


@given(st.lists(st.integers(0, 3), max_size=200), st.lists(st.integers(-1, 9), max_size=50))
def test_a_rows_place_in_its_tile_follows_from_its_own_domains_rows(
    slot: list[int], others: list[int]
) -> None:
    rows = torch.tensor([*slot, *(-1 if other < 4 else other for other in others)])
    mine = rows == 2
    place, alone = tiles(rows)[0], tiles(torch.where(mine, rows, -1))[0]
    assert torch.equal(place[mine] % TILE, alone[mine] % TILE)
