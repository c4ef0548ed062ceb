"""Adapters in a method: routing (S1, S2) and MLoRA's equations (M1-M6, M10)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models import Features, MLoRA, MLoRAConfig
from models.backbones import Inputs, MLPConfig
from tests.toy_method import (
    ABC,
    BIAS,
    EVERY,
    copies,
    fresh,
    logits,
    names_of,
    same,
    slots,
    trained,
    vectors,
    with_bias,
)


def _adapter_grads(method: MLoRA, loss: Tensor) -> dict[str, Tensor]:
    """Gradients [slots, ...] of all domains' matrices, by layer and part."""
    layers = {name: layer.low_rank for name, layer in method.backbone.adaptable().items()}
    parameters = {
        f"{name}.{part}": parameter
        for name, low_rank in layers.items()
        if low_rank is not None
        for part, parameter in low_rank.named_parameters()
    }
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@EVERY
@BIAS
def test_s1_permuting_a_batch_permutes_itslogits(backbone: str, bias: bool) -> None:
    method = trained(backbone, ABC, with_bias(bias)).double()
    names = names_of(75, (*ABC, "unknown"))
    embedded, numbers = vectors(75, torch.float64)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    slot = slots(method, names)
    shuffled = method(Features(embedded[order], numbers[order], slot[order]))
    expected = method(Features(embedded, numbers, slot))[order]
    torch.testing.assert_close(shuffled, expected, rtol=1e-11, atol=1e-11)


@EVERY
@BIAS
@pytest.mark.parametrize("training", [False, True])
def test_s2_a_logit_does_not_depend_on_its_batch(backbone: str, bias: bool, training: bool) -> None:
    method = trained(backbone, ABC, with_bias(bias)).double().train(training)
    embedded, numbers = vectors(40, torch.float64)
    slot = slots(method, names_of(40, (*ABC, "unknown")))
    logit = method(Features(embedded, numbers, slot))
    for i in range(40):
        row = slice(i, i + 1)
        alone = method(Features(embedded[row], numbers[row], slot[row]))
        torch.testing.assert_close(alone, logit[row], rtol=1e-11, atol=1e-11)


@EVERY
def test_a_row_without_an_adapter_is_scored_by_the_shared_part(backbone: str) -> None:
    names = names_of(70, (*ABC, "unknown"))
    unknown = torch.tensor([name == "unknown" for name in names])
    logit = logits(trained(backbone, ABC, with_bias(True)), names)
    plain = logits(trained(backbone, ()), names)
    assert torch.equal(logit[unknown], plain[unknown])
    assert (logit[~unknown] != plain[~unknown]).all()


@EVERY
@BIAS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("domains", [("a",), ABC])
def test_m1_a_fresh_adapter_changes_no_logit(
    backbone: str, bias: bool, training: bool, domains: tuple[str, ...]
) -> None:
    names = names_of(70, (*ABC, "unknown"))
    method = fresh(backbone, domains, with_bias(bias)).train(training)
    assert torch.equal(logits(method, names), logits(fresh(backbone, ()), names))


@EVERY
@BIAS
@pytest.mark.parametrize("domains", [("a",), ABC])
def test_m2_b_learns_first_and_then_a(backbone: str, bias: bool, domains: tuple[str, ...]) -> None:
    method = fresh(backbone, domains, with_bias(bias)).train()
    grads = _adapter_grads(method, logits(method, ["a"] * 30).square().sum())
    assert all(grad[0].any() for name, grad in grads.items() if not name.endswith(".a"))
    assert not any(grad.any() for name, grad in grads.items() if name.endswith(".a"))
    for name, tensor in method.adapter("a").items():
        tensor.sub_(0.1 * grads[name][0])
    grads = _adapter_grads(method, logits(method, ["a"] * 30).square().sum())
    assert all(grad[0].any() for grad in grads.values())


@EVERY
@BIAS
def test_m4_a_domains_rows_give_no_gradient_to_another(backbone: str, bias: bool) -> None:
    method = trained(backbone, ABC, with_bias(bias)).train()
    for slot, domain in enumerate(ABC):
        loss = logits(method, [domain] * 40).square().sum()
        for grad in _adapter_grads(method, loss).values():
            assert grad[slot].any()
            assert not torch.cat([grad[:slot], grad[slot + 1 :]]).any()


@pytest.mark.parametrize(
    ("dim", "alpha", "own", "shared"),
    [
        (8, 32, 4_160, 47_552),
        (8, 256, 856, 47_552),
        (128, 32, 7_040, 139_712),
        (128, 256, 1_216, 139_712),
    ],
)
def test_m5_counts_of_the_papers_sizes(dim: int, alpha: int, own: int, shared: int) -> None:
    backbone = MLPConfig((256, 128, 64))
    method = MLoRA(Inputs(3, dim, 0), backbone, MLoRAConfig(alpha=alpha))
    method.add_domain("a", seed=1)
    assert sum(t.numel() for t in method.adapter("a").values()) == own
    assert sum(t.numel() for t in method.shared().values()) == shared + 64 + 1  # the logit's layer


@BIAS
@given(
    hidden=st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple),
    alpha=st.integers(1, 100),
)
def test_m5_a_rank_is_the_layers_width_over_alpha(
    bias: bool, hidden: tuple[int, ...], alpha: int
) -> None:
    method = fresh("mlp", ("a",), MLoRAConfig(alpha=alpha, bias=bias), hidden)
    widths = list(zip([14, *hidden], hidden, strict=False))
    ranks = [max(d_out // alpha, 1) for _, d_out in widths]
    expected = sum(
        rank * (d_in + d_out) + bias * d_out
        for rank, (d_in, d_out) in zip(ranks, widths, strict=True)
    )
    assert sum(t.numel() for t in method.adapter("a").values()) == expected
    assert [method.adapter("a")[f"deep{i}.a"].shape[0] for i in range(len(hidden))] == ranks


@EVERY
@BIAS
def test_m6_merged_weights_give_the_samelogits(backbone: str, bias: bool) -> None:
    method, plain = (trained(backbone, d, with_bias(bias)).double() for d in (ABC, ()))
    shared = copies(method.shared())
    for slot, domain in enumerate(ABC):
        for name, layer in method.backbone.adaptable().items():
            weight, bias_t = layer.merged(slot)
            plain.backbone.adaptable()[name].linear.weight.data.copy_(weight)
            plain.backbone.adaptable()[name].linear.bias.data.copy_(bias_t)
        names, features = [domain] * 40, vectors(40, torch.float64)
        expected = plain(Features(*features, slots(plain, names)))
        logit = method(Features(*features, slots(method, names)))
        torch.testing.assert_close(logit, expected, rtol=1e-11, atol=1e-11)
    assert same(method.shared(), shared)


@EVERY
def test_m10_one_phase_with_b_held_at_zero_is_plain_training(backbone: str) -> None:
    plain, method = (fresh(backbone, domains).train() for domains in ((), ABC))
    adams = [torch.optim.Adam(m.shared_parameters(), lr=0.01) for m in (plain, method)]
    for _ in range(3):
        for adam, m in zip(adams, (plain, method), strict=True):
            adam.zero_grad()
            logits(m, names_of(60, (*ABC, "unknown"))).square().sum().backward()
            adam.step()
    assert not same(plain.shared(), fresh(backbone, ()).shared())
    for name, tensor in method.shared().items():
        torch.testing.assert_close(tensor, plain.shared()[name], rtol=1e-6, atol=1e-7)


@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans(), st.booleans()), min_size=1), st.data())
def test_losses_of_parts_add_up_to_the_mean_over_real_rows(rows: list, data: st.DataObject) -> None:
    logit, label, weight = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    cut, real = data.draw(st.integers(0, len(rows))), weight > 0
    method, total = fresh("mlp", ()), int(real.sum())
    parts = [
        method.loss(logit[part, None], label[part], weight[part], total)
        for part in (slice(cut), slice(cut, None))
    ]
    expected = (
        F.binary_cross_entropy_with_logits(logit[real], label[real]) if total else torch.tensor(0.0)
    )
    assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-12)
