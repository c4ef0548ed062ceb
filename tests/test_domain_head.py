"""Ladder, gate and tower of Uni-CTR against their equations, prompt by prompt (C6, C7, S2, S3)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.domain_head import DomainHead, Gate, HeadShape, LadderBlock, SelfAttention, new_head
from tests.toy_method import stir

SHAPE = HeadShape(
    hidden=12,
    blocks=3,
    width=6,
    heads=2,
    ladder_dropout=0.0,
    combine="concat",
    tower=(9, 5),
    dropout=0.0,
    beside=4,
)
PAPER = HeadShape(
    hidden=2048,
    blocks=4,
    width=512,
    heads=2,
    ladder_dropout=0.2,
    combine="concat",
    tower=(512, 256, 128),
    dropout=0.3,
    beside=0,
)
SHAPES = (
    SHAPE,
    replace(SHAPE, combine="sum"),
    replace(SHAPE, blocks=0),
    replace(SHAPE, heads=3, blocks=1, beside=0, tower=()),
)
lengths_ = st.lists(st.integers(1, 6), min_size=1, max_size=7)


def _head(shape: HeadShape) -> DomainHead:
    head = new_head(shape, 0, "a").double()
    stir((p.data for p in head.parameters()), "head")
    return head


def _prompts(lengths: list[int], states: int = 4, spare: int = 0) -> tuple[list[Tensor], Tensor]:
    """Random states, on padding too, and the mask."""
    longest = max(lengths) + spare
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(longest)
    shape = (states, len(lengths), longest, SHAPE.hidden)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64)), mask


def _beside(rows: int, shape: HeadShape) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, shape.beside, generator=generator, dtype=torch.float64)


def _attention_by_hand(attention: SelfAttention, x: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of the tokens [T, W] of one prompt, head by head."""
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=1)
    size = q.shape[1] // attention.split[1]
    seen = []
    for at in range(0, q.shape[1], size):
        part = slice(at, at + size)
        scores = (q[:, part] @ k[:, part].T / math.sqrt(size)).exp()
        seen.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(seen, 1) @ attention.out.weight.T + attention.out.bias


def _norm_by_hand(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return centred / scale * norm.weight + norm.bias


def _block_by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """Down, attention, residual and norm, up, residual with the input, norm."""
    assert isinstance(block, LadderBlock)
    low = block.down[2](block.down[0](x).clamp(min=0))
    low = _norm_by_hand(block.low_norm, low + _attention_by_hand(block.attention, low))
    return _norm_by_hand(block.norm, x + block.up[2](block.up[0](low).clamp(min=0)))


def _gate_by_hand(gate: Gate, o: Tensor, b_q: float = 0.0) -> Tensor:
    """Eq. 9-11 of the tokens [T, D] of one prompt."""
    s = torch.tanh(o @ gate.key.weight.T + gate.key.bias)
    scores = (s @ gate.query.weight.T + b_q).exp()
    return (scores / scores.sum()).T[0] @ o


def _head_by_hand(head: DomainHead, states: list[Tensor], beside: Tensor) -> Tensor:
    """Eq. 7-12 for one row, whose prompt's states are [T, D]."""
    o = states[-1]
    if head.ladder is not None:
        out = torch.zeros_like(o)
        for block, tap in zip(head.ladder.blocks, states[:-1], strict=True):
            out = _block_by_hand(block, tap + out)
        o = o + out if head.combine == "sum" else torch.cat([o, out])
    x = torch.cat([_gate_by_hand(head.gate, o), beside])
    for layer in head.tower.layers:
        assert isinstance(layer, nn.Linear)
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    return (head.tower.out.weight @ x + head.tower.out.bias)[0]


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=25)
@given(data=st.data())
def test_a_head_is_its_equations_a_row_at_a_time(
    shape: HeadShape, training: bool, data: st.DataObject
) -> None:
    """So it is S2 and S3 too: the equations know no other row and no padding."""
    lengths = data.draw(lengths_)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    head = _head(shape).train(training)
    states, mask = _prompts(lengths, shape.blocks + 1, spare=data.draw(st.integers(0, 3)))
    beside = _beside(len(rows), shape)
    got = head(states, mask, torch.tensor(rows, dtype=torch.int64), beside)
    assert got.shape == (len(rows),)
    for row, prompt in enumerate(rows):
        own = [state[prompt, : lengths[prompt]] for state in states]
        _close(got[row], _head_by_hand(head, own, beside[row]))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25)
@given(lengths=lengths_)
def test_s3_what_stands_on_padding_changes_no_bit(shape: HeadShape, lengths: list[int]) -> None:
    head = _head(shape)
    states, mask = _prompts(lengths, shape.blocks + 1)
    rows = torch.arange(len(lengths))
    beside = _beside(len(rows), shape)
    other = [torch.where(mask.unsqueeze(2), state, 1e3) for state in states]
    assert torch.equal(head(states, mask, rows, beside), head(other, mask, rows, beside))


@pytest.mark.parametrize("shape", SHAPES)
def test_s2_no_row_has_a_gradient_from_another_ones_logit(shape: HeadShape) -> None:
    head = _head(shape).train()
    states, mask = _prompts([3, 1, 5], shape.blocks + 1)
    states = [state.requires_grad_() for state in states]
    logit = head(states, mask, torch.arange(3), _beside(3, shape))
    for row in range(3):
        for grad in torch.autograd.grad(logit[row], states, retain_graph=True):
            assert grad[row, 0].any()
            assert not grad[torch.arange(3) != row].any() and not grad[~mask].any()


@given(lengths=lengths_, b_q=st.floats(-5, 5), spare=st.integers(0, 3))
def test_c7_gate_weights_are_a_distribution_over_tokens(
    lengths: list[int], b_q: float, spare: int
) -> None:
    gate = _head(SHAPE).gate
    (o,), mask = _prompts(lengths, 1, spare)
    weights = gate.weights(o, mask)
    assert (weights >= 0).all() and not weights[~mask].any() and weights[mask].all()
    _close(weights.sum(1), torch.ones(len(lengths), dtype=torch.float64))
    for prompt, length in enumerate(lengths):  # b_q is redundant
        _close(gate(o, mask)[prompt], _gate_by_hand(gate, o[prompt, :length], b_q))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_c6_each_block_sees_its_tap_and_the_block_before(blocks: int) -> None:
    head = _head(replace(SHAPE, blocks=blocks))
    assert head.ladder is not None and len(head.ladder.blocks) == blocks
    states, mask = _prompts([2, 4], blocks + 1)
    seen: list[Tensor] = []
    outs: list[Tensor] = []
    for block in head.ladder.blocks:
        block.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
        block.register_forward_hook(lambda *io: outs.append(io[2]))
    head(states, mask, torch.arange(2), _beside(2, SHAPE))
    assert len(seen) == blocks
    assert torch.equal(seen[0], states[0])
    for i in range(1, blocks):
        assert torch.equal(seen[i], states[i] + outs[i - 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_without_rows_has_gradients_of_zero(shape: HeadShape) -> None:
    head = _head(shape)
    states = [torch.zeros(0, 1, SHAPE.hidden, dtype=torch.float64)] * (shape.blocks + 1)
    none = torch.zeros(0, dtype=torch.int64)
    logit = head(states, torch.ones(0, 1, dtype=torch.bool), none, _beside(0, shape))
    assert logit.shape == (0,)
    for grad in torch.autograd.grad(logit.sum(), list(head.parameters())):
        assert not grad.any()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _block_size(d: int, w: int) -> int:
    down, attention, up = w * (d + 1) + w * (w + 1), 4 * w * (w + 1), (d + 1) * d + d * (w + 1)
    return down + attention + 2 * w + up + 2 * d


@given(
    d=st.integers(1, 30), half=st.integers(1, 9), blocks=st.integers(0, 4), beside=st.integers(0, 5)
)
def test_how_many_parameters_a_head_has(d: int, half: int, blocks: int, beside: int) -> None:
    shape = replace(SHAPE, hidden=d, width=2 * half, blocks=blocks, beside=beside)
    tower = 9 * (d + beside + 1) + 5 * (9 + 1) + 5 + 1
    gate = d * (d + 1) + d
    assert _count(new_head(shape, 0, "a")) == blocks * _block_size(d, 2 * half) + gate + tower


def test_the_papers_sizes() -> None:
    """Sheared-LLaMA: the 37.4 M of methods.md are with the released code's wider tower."""
    with torch.device("meta"):
        assert _count(LadderBlock(PAPER)) == 7_614_464
        assert _count(DomainHead(PAPER)) == 35_869_697
        assert _count(DomainHead(replace(PAPER, tower=(1024, 512, 256)))) == 37_410_817
        assert _count(DomainHead(replace(PAPER, width=64))) < 0.66 * 35_869_697  # narrow


def test_first_weights_follow_from_seed_owner_and_layer_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = {name: p.data for name, p in new_head(SHAPE, 1, "a").named_parameters()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = dict(new_head(replace(SHAPE, tower=(9, 5, 2)), 1, "a").named_parameters())
    for seed, owner in ((2, "a"), (1, "b")):
        other = dict(new_head(SHAPE, seed, owner).named_parameters())
        assert not any(torch.equal(other[n], p) for n, p in first.items() if p.ndim == 2)
    for name, parameter in first.items():
        assert parameter.isfinite().all()
        if name.startswith(("ladder", "gate", "tower.layers")):
            assert torch.equal(again[name], parameter)
    drawn = [p for p in first.values() if p.ndim == 2]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn)


def test_first_weights_are_glorots_and_norms_start_neutral() -> None:
    head = new_head(replace(SHAPE, hidden=200, width=100), 0, "a")
    for layer in head.modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel() > 5000:
            std = math.sqrt(2 / (layer.in_features + layer.out_features))
            assert float(layer.weight.data.std()) == pytest.approx(std, rel=0.05)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            assert not layer.bias.any()
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and not layer.bias.any()


def test_a_bf16_head_runs_with_an_exact_gate() -> None:
    head = new_head(SHAPE, 0, "a").bfloat16()
    states, mask = _prompts([2, 6, 1])
    low = [state.bfloat16() for state in states]
    weights = head.gate.weights(low[0], mask)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    logit = head(low, mask, torch.arange(3), _beside(3, SHAPE).bfloat16())
    assert logit.dtype == torch.bfloat16
    wanted = head.double()(states, mask, torch.arange(3), _beside(3, SHAPE))
    torch.testing.assert_close(logit.double(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("where", ["ladder_dropout", "dropout"])
def test_dropout_works_in_training_alone(where: str) -> None:
    dropping = replace(SHAPE, ladder_dropout=0.5 * (where == "ladder_dropout"), tower=(64,))
    dropping = replace(dropping, dropout=0.5 * (where == "dropout"))
    head, plain = _head(dropping), _head(replace(SHAPE, tower=(64,)))
    states, mask = _prompts([4] * 20)
    inputs = (states, mask, torch.arange(20), _beside(20, SHAPE))
    assert torch.equal(head.eval()(*inputs), plain(*inputs))
    assert (head.train()(*inputs) != plain(*inputs)).all()


def test_attention_runs_along_a_prompts_own_tokens() -> None:
    """The released code's runs across the prompts of a batch."""
    attention = SelfAttention(SHAPE.width, SHAPE.heads).double()
    x = torch.randn(3, 4, SHAPE.width, dtype=torch.float64, requires_grad=True)
    out = attention(x, torch.ones(3, 4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(F.gelu(out[1, 2]).sum(), x)
    assert grad[1].abs().sum(1).all() and not grad[[0, 2]].any()
