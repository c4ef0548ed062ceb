"""CTRL: a row's vector is drawn to its text's, and then the backbone is alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards import UserError
from models import CTRL, METHODS, CTRLConfig, EncoderConfig, Features, MLoRA, MLoRAConfig, Parts
from models.backbones import BACKBONES
from models.backbones.backbone import VectorBackbone
from models.ctrl import contrast
from models.euler import precise
from tests.toy_method import INPUTS, copies, same, stir, vectors, without_dropout

TEXT, GROUP, ROWS = 6, 5, 15
CONFIG = CTRLConfig(alpha=4, width=6, spaces=3, group=GROUP)
KNOWN = [name for name, one in BACKBONES.items() if issubclass(one, VectorBackbone)]
EVERY = pytest.mark.parametrize("backbone", KNOWN)


def _fresh(backbone: str, text: int = TEXT, config: CTRLConfig = CONFIG) -> CTRL:
    """As a run begins with it, in float64: in the first stage, or without text in the others."""
    torch.manual_seed(7)
    parts = Parts(INPUTS, without_dropout(backbone, (9, 7)), EncoderConfig(), 1, text_width=text)
    found = METHODS["ctrl"](config, parts)
    assert isinstance(found, CTRL)
    return found.double().eval()


def _trained(backbone: str) -> CTRL:
    method = _fresh(backbone)
    stir(method.shared().values(), "shared")
    return method


def _features(rows: int = ROWS) -> Features:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(rows, TEXT, generator=generator, dtype=torch.float64) * 3
    slot = torch.full((rows,), -1)
    return Features(*vectors(rows, torch.float64), slot, text=text)


def _labels(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The last two rows are padding."""
    return torch.arange(rows).double() % 3 % 2, (torch.arange(rows) < rows - 2).double()


def _close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def _spaces(method: CTRL, name: str, x: Tensor) -> list[Tensor]:
    """h_m of one row, of all m."""
    alignment, width = method.get_submodule("alignment"), CONFIG.width // CONFIG.spaces
    first, second = (alignment.get_submodule(f"{name}.{i}") for i in (0, 1))
    h = first.get_parameter("weight") @ x + first.get_parameter("bias")
    weight, bias = second.get_parameter("weight"), second.get_parameter("bias")
    return [
        weight[m * width : (m + 1) * width] @ h + bias[m * width : (m + 1) * width]
        for m in range(CONFIG.spaces)
    ]


def _similar(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([max(a @ b for b in other) for a in one]).sum()


def _by_hand(method: CTRL, features: Features) -> Tensor:
    """The loss of the first stage, a row and a pair at a time."""
    assert features.text is not None
    label, weight = _labels()
    told = torch.zeros((), dtype=torch.float64)
    tab, text = [], []
    for i in range(ROWS):
        one = [part[i : i + 1] for part in method.read(features)]
        vector, s = method.tower.vector(*one)[0], features.text[i]
        s = (s - s.mean()) / ((s - s.mean()).square().mean() + 1e-5).sqrt()
        tab.append(_spaces(method, "tab", vector))
        text.append(_spaces(method, "text", s))
        probe = method.get_submodule("alignment.probe")
        logit = (probe.get_parameter("weight") @ vector.detach() + probe.get_parameter("bias"))[0]
        right = logit.sigmoid() if label[i] else 1 - logit.sigmoid()
        told = told - weight[i] * right.log()
    for k in range(ROWS - 2):
        mine = [j for j in range(ROWS - 2) if j // GROUP == k // GROUP]
        for a, b in ((text, tab), (tab, text)):
            each = [torch.exp(_similar(a[k], b[j]) / CONFIG.temperature) for j in mine]
            told = told - (each[mine.index(k)] / sum(each)).log() / 2
    return told / (ROWS - 2)


@EVERY
def test_the_first_stages_loss_and_its_gradients_are_those_of_the_equations(backbone: str) -> None:
    method, features = _trained(backbone).train(), _features()
    loss = method.loss(method(features), *_labels(), ROWS - 2)
    wanted = _by_hand(method, features)
    _close(loss, wanted)
    inner = [features.embedded.requires_grad_(), *method.shared_parameters()]
    loss = method.loss(method(features), *_labels(), ROWS - 2)
    got, by_hand = (torch.autograd.grad(one, inner) for one in (loss, _by_hand(method, features)))
    _close(got, by_hand)
    assert all(grad.any() for grad in got)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = 2, 4, 3, 2
    tab, text = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in "ab"
    )
    weight = torch.tensor([[1.0, 2.0, 0.5, 1.0], [1.0, 1.0, 0.0, 0.0]]).double()
    assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, weight, 0.7), (tab, text))


def test_padding_is_nobodys_negative_and_has_no_loss() -> None:
    """A group of nothing else too."""
    tab, text = torch.randn(2, 2, GROUP, 3, 2).double().unbind(0)
    weight = torch.tensor([[1.0] * 3 + [0.0] * 2, [0.0] * GROUP]).double()
    told = contrast(tab.requires_grad_(), text, weight, 0.7)
    assert told.isfinite().all() and not told[weight == 0].any() and told[weight > 0].all()
    [grad] = torch.autograd.grad(told.sum(), tab)
    assert not grad[weight == 0].any() and grad[weight > 0].any()
    less = contrast(tab[:1, :3], text[:1, :3], weight[:1, :3], 0.7)
    _close(told[:1, :3], less)


@EVERY
def test_rows_are_coupled_by_the_first_stages_loss_alone_and_within_a_group(backbone: str) -> None:
    """S2, and what makes the loss the same at any number of ranks (S6)."""
    method, features = _trained(backbone).train(), _features()
    columns = method(features)
    for i in range(ROWS):
        one = slice(i, i + 1)
        embedded, numbers = features.embedded[one], features.numbers[one]
        alone = Features(embedded, numbers, features.slot[one], text=_text(features)[one])
        _close(method(alone), columns[one])
    label, weight = _labels()
    groups = [slice(start, start + GROUP) for start in range(0, ROWS, GROUP)]
    shares = [method.loss(columns[g], label[g], weight[g], ROWS - 2) for g in groups]
    _close(sum(shares), method.loss(columns, label, weight, ROWS - 2))
    order = torch.cat([torch.randperm(GROUP) + start for start in range(0, ROWS, GROUP)])
    _close(
        method.loss(columns[order], label[order], weight[order], ROWS - 2),
        method.loss(columns, label, weight, ROWS - 2),
    )
    narrow = method.loss(columns, label, weight, ROWS - 2)
    method.settings = replace(CONFIG, group=ROWS)  # more to be told from
    assert method.loss(columns, label, weight, ROWS - 2) > narrow + 0.1


def _text(features: Features) -> Tensor:
    assert features.text is not None
    return features.text


@EVERY
def test_labels_teach_the_probe_and_nothing_else_in_the_first_stage(backbone: str) -> None:
    method, features = _trained(backbone).train(), _features()
    _, weight = _labels()
    probe = {id(p) for p in method.get_submodule("alignment.probe").parameters()}
    rest = [features.embedded.requires_grad_()]
    rest += [p for p in method.shared_parameters() if id(p) not in probe]
    columns = method(features)
    liked, not_liked = (
        torch.autograd.grad(
            method.loss(columns, torch.full_like(weight, label), weight, ROWS),
            rest,
            retain_graph=True,
        )
        for label in (0.0, 1.0)
    )
    assert all(torch.equal(*pair) for pair in zip(liked, not_liked, strict=True))


@EVERY
def test_the_first_stage_trains_all_but_the_last_layers(backbone: str) -> None:
    method = _fresh(backbone)
    idle = {id(p) for layer in method.tower.outputs() for p in layer.parameters()}
    trained = {id(p) for p in method.shared_parameters()}
    assert idle and trained.isdisjoint(idle)
    assert trained | idle == {id(p) for p in method.parameters()}
    named = {name: p for name, p in method.named_parameters()}
    assert method.frozen().keys() == {name for name, p in named.items() if id(p) in idle}
    assert method.shared().keys() == named.keys() - method.frozen().keys()


@EVERY
def test_later_it_is_the_backbone_with_mloras_adapters_and_nothing_more(backbone: str) -> None:
    """As its paper counts parameters (Table 3)."""
    torch.manual_seed(7)
    plain = MLoRA(INPUTS, without_dropout(backbone, (9, 7)), MLoRAConfig(alpha=4)).double().eval()
    method = _fresh(backbone, text=0)
    assert same(method.shared(), copies(plain.shared()))
    for one in (plain, method):
        one.add_domain("a", seed=1)
        stir(one.adapter("a").values(), "a")
    features = replace(_features(), slot=torch.arange(ROWS) % 2 - 1, text=None)
    assert torch.equal(method(features), plain(features)) and method(features).shape == (ROWS, 1)
    loss = method.loss(method(features), *_labels(), ROWS)
    assert torch.equal(loss, plain.loss(plain(features), *_labels(), ROWS))
    before = _fresh(backbone)
    first = {name: p.data for name, p in before.named_parameters() if name in plain.shared()}
    assert same(first, copies(plain.shared())), "stages begin with the same backbone"


@EVERY
def test_the_logit_is_linear_in_the_vector(backbone: str) -> None:
    method = _trained(backbone)
    features = _features(200)
    read = method.read(features)
    x = torch.cat([method.tower.vector(*read), torch.ones(200, 1).double()], 1)
    logit = method.backbone(*read).unsqueeze(1)
    assert x.shape[1] < 150
    _close(precise(x @ torch.linalg.lstsq(x, logit, driver="gelsd").solution), logit)


def test_a_text_is_found_among_others_by_the_row_that_it_tells_of() -> None:
    """Texts that follow from the rows' vectors; rows that it has not learned from."""
    torch.manual_seed(0)
    count, of_text = 32, torch.randn(INPUTS.fields * INPUTS.dim, TEXT)
    config = CTRLConfig(width=16, spaces=4, group=count)
    method = _fresh("autoint", config=config).float().train()
    adam = torch.optim.Adam(method.shared_parameters(), 1e-2)

    def rows() -> Features:
        embedded, numbers = torch.randn(count, INPUTS.fields, 8), torch.zeros(count, INPUTS.numbers)
        text = embedded[:, :, : INPUTS.dim].flatten(1) @ of_text
        return Features(embedded, numbers, torch.full((count,), -1), text=text)

    def found() -> float:
        with torch.no_grad():
            tab, text = method(rows())[:, 1:].unflatten(1, (2, config.spaces, -1)).unbind(1)
        similar = torch.einsum("imw,jnw->ijmn", text, tab).amax(3).sum(2)
        return float((similar.argmax(1) == torch.arange(count)).double().mean())

    assert found() < 0.2
    for _ in range(200):
        adam.zero_grad()
        method.loss(method(rows()), torch.zeros(count), torch.ones(count), count).backward()
        adam.step()
    assert found() > 0.5


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"spaces": 3}, r"method\.spaces: 3 sub-spaces do not divide method\.width = 128"),
        ({"width": 0}, r"method\.spaces: 4 sub-spaces do not divide method\.width = 0"),
        ({"group": 1}, r"method\.group is 2 or more, not 1: one row has no other"),
        ({"temperature": 0.0}, r"method\.temperature is above 0, not 0\.0"),
    ],
)
def test_a_shape_that_is_none_is_refused(mistake: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CTRLConfig(**mistake)


def test_a_batch_that_groups_do_not_divide_is_refused() -> None:
    method, features = _fresh("mlp"), _features(7)
    with pytest.raises(UserError, match="5 rows are contrasted with one another, and a rank has 7"):
        method.loss(method(features), *_labels(7), 7)


def test_a_backbone_without_a_vector_is_refused() -> None:
    with pytest.raises(UserError, match="afm has no vector of a row .* there are: mlp, wide_deep"):
        _fresh("afm", text=0)
