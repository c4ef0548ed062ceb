"""What belongs to whom in a method (S4, S5), and what its messages say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import UserError
from models import METHODS, EncoderConfig, MLoRA, MLoRAConfig, Parts
from models.backbones import MLPConfig
from tests.toy_method import (
    ABC,
    BIAS,
    EVERY,
    INPUTS,
    copies,
    fresh,
    logits,
    same,
    stir,
    trained,
    with_bias,
)


@EVERY
@BIAS
@pytest.mark.parametrize("one", [False, True])
def test_shared_and_adapters_partition_all_parameters_and_buffers(
    backbone: str, bias: bool, one: bool
) -> None:
    layers = tuple(fresh(backbone, ()).backbone.adaptable())[1:2] if one else ()
    method = trained(backbone, ABC, MLoRAConfig(alpha=4, bias=bias, layers=layers))
    everything = [*method.parameters(), *method.buffers()]
    for tensor in everything:
        tensor.detach().zero_()
    for part in (method.shared(), *(method.adapter(domain) for domain in ABC)):
        assert part
        for tensor in part.values():
            tensor.add_(1)
    assert all((tensor == 1).all() for tensor in everything)


@EVERY
@BIAS
def test_parameter_lists_agree_with_the_named_parts(backbone: str, bias: bool) -> None:
    method = trained(backbone, ABC, with_bias(bias))
    shared, own = method.shared_parameters(), method.adapter_parameters()
    assert {id(p) for p in method.parameters()} == {id(p) for p in shared} | {id(p) for p in own}
    assert not {id(p) for p in shared} & {id(p) for p in own}
    for parameter in own:
        parameter.data.fill_(5)
    assert all((t == 5).all() for domain in ABC for t in method.adapter(domain).values())


@EVERY
@BIAS
@settings(max_examples=15)
@given(
    hidden=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    names=st.lists(st.sampled_from([*ABC, "new", "unknown"]), min_size=1, max_size=150),
    old=st.permutations(ABC).flatmap(lambda p: st.integers(1, 3).map(lambda n: tuple(p[:n]))),
)
def test_s4_adding_and_s5_removing_a_domain_move_no_bit_of_the_others(
    backbone: str, bias: bool, hidden: tuple[int, ...], names: list[str], old: tuple[str, ...]
) -> None:
    method = trained(backbone, old, with_bias(bias), hidden)
    parts = [copies(method.shared()), *(copies(method.adapter(domain)) for domain in old)]
    others = torch.tensor([name != "new" for name in names])
    before = logits(method, names)
    method.add_domain("new", seed=9)
    stir(method.adapter("new").values(), "new")
    assert torch.equal(logits(method.eval(), names)[others], before[others])
    joined = [method.shared(), *(method.adapter(domain) for domain in old)]
    assert all(same(*pair) for pair in zip(joined, parts, strict=True))

    gone = old[0]
    method.remove_domain(gone)
    assert method.domains == [*old[1:], "new"]
    kept = torch.tensor([name not in ("new", gone) for name in names])
    assert torch.equal(logits(method.eval(), names)[kept], before[kept])
    left = [method.shared(), *(method.adapter(domain) for domain in old[1:])]
    assert all(same(*pair) for pair in zip(left, [parts[0], *parts[2:]], strict=True))


@EVERY
def test_s4_training_an_added_domain_moves_no_bit_of_the_shared_part(backbone: str) -> None:
    method = trained(backbone, ("new",), with_bias(True)).train()
    shared, own = copies(method.shared()), copies(method.adapter("new"))
    adam = torch.optim.Adam(method.adapter_parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        adam.zero_grad()
        logits(method, ["new"] * 40).square().sum().backward()
        adam.step()
    assert same(method.shared(), shared)
    assert not any(torch.equal(t, own[name]) for name, t in method.adapter("new").items())


def test_first_weights_do_not_depend_on_the_order_of_adding() -> None:
    forth, back = fresh("mlp", ABC), fresh("mlp", ABC[::-1])
    assert all(same(forth.adapter(domain), back.adapter(domain)) for domain in ABC)
    assert not same(forth.adapter("a"), forth.adapter("b"))
    forth.remove_domain("a")
    forth.add_domain("a", seed=3)
    assert forth.domains == ["b", "c", "a"]
    assert same(forth.adapter("a"), back.adapter("a"))
    forth.remove_domain("a")
    forth.add_domain("a", seed=4)
    assert not same(forth.adapter("a"), back.adapter("a"))


def test_without_its_last_domain_a_method_is_plain_again() -> None:
    method = trained("deepfm", ("a",))
    method.remove_domain("a")
    assert not method.adapter_parameters()
    assert torch.equal(logits(method, ["a"] * 9), logits(trained("deepfm", ()), ["a"] * 9))


def test_a_method_is_found_by_its_configs_name() -> None:
    parts = Parts(INPUTS, MLPConfig((4,)), EncoderConfig(), seed=1)
    assert isinstance(METHODS[MLoRAConfig().name](MLoRAConfig(), parts), MLoRA)


def test_a_domain_is_added_once() -> None:
    method = fresh("mlp", ("books",))
    with pytest.raises(UserError, match="'books' has an adapter already; remove it first"):
        method.add_domain("books", seed=1)


@pytest.mark.parametrize(("loaded", "named"), [((), "none"), (ABC, "a, b, c")])
def test_an_unknown_domain_names_those_there_are(loaded: tuple[str, ...], named: str) -> None:
    method = fresh("mlp", loaded)
    for act in (method.adapter, method.remove_domain):
        with pytest.raises(UserError, match=f"no adapter for domain 'toys' .* loaded: {named}$"):
            act("toys")


def test_an_unknown_layer_names_those_there_are() -> None:
    config = MLoRAConfig(layers=("deep0", "deep7"))
    with pytest.raises(UserError, match=r"no layer 'deep7'; it has deep0, deep1"):
        fresh("mlp", (), config)


def test_only_the_named_layers_are_adapted() -> None:
    method = trained("dcn", ("a",), MLoRAConfig(alpha=4, layers=("deep1",)))
    assert {name.split(".")[0] for name in method.adapter("a")} == {"deep1"}
    assert {name.split(".")[0] for name in trained("dcn", ("a",)).adapter("a")} == {
        "deep0",
        "deep1",
    }
