"""Uni-CTR: domains come and go, and users' mistakes (C9, S4, S5)."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_shards import UserError
from models import EncoderConfig, Method, UniCTR, UniCTRConfig
from models.backbones import Inputs
from tests.toy_method import ABC, copies, same
from tests.toy_unictr import (
    EACH,
    INPUTS,
    PLAIN,
    ROWS,
    Methods,
    every_method,
    features_of,
    small_bert,
    trained,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def methods(encoder: EncoderConfig) -> Methods:
    return every_method(encoder)


@EACH
def test_shared_adapters_and_frozen_partition_the_model(
    methods: Methods, config: UniCTRConfig
) -> None:
    method = methods[config]
    owned = [
        tensor
        for part in (method.shared(), method.frozen(), *(method.adapter(d) for d in ABC))
        for tensor in part.values()
    ]
    everything = [*method.parameters(), *method.buffers()]
    assert len(owned) == len(everything)
    assert {t.data_ptr() for t in owned} == {t.data_ptr() for t in everything}
    trained = [p.data_ptr() for p in [*method.shared_parameters(), *method.adapter_parameters()]]
    frozen = {t.data_ptr() for t in method.frozen().values()}
    assert frozen.isdisjoint(trained) and len(trained) + len(frozen) == len(everything)
    assert {p.data_ptr() for p in method.shared_parameters()} == {
        t.data_ptr() for t in method.shared().values()
    }


def _bits(method: Method, domains: Sequence[str]) -> dict[str, Tensor]:
    parts = [method.shared(), method.frozen(), *(method.adapter(d) for d in domains)]
    return copies({f"{i}/{name}": t for i, part in enumerate(parts) for name, t in part.items()})


@EACH
def test_s4_c9_adding_and_training_a_domain_moves_no_bit_of_the_others(
    encoder: EncoderConfig, config: UniCTRConfig
) -> None:
    method = trained(encoder, config, ABC[:2])
    features = features_of(ROWS)
    before, logit = _bits(method, ABC[:2]), method(features)
    method.add_domain("new", seed=5)
    assert torch.equal(method(features), logit)
    new = list(method.heads[2].parameters())
    assert len(new) == len(list(method.heads[0].parameters()))
    optimizer = torch.optim.AdamW(new, lr=0.1, weight_decay=0.1)
    first = copies(method.adapter("new"))
    for _ in range(3):
        own = method.train()(features_of([(2, (5, 6)), (2, (3,))]))
        optimizer.zero_grad()
        method.loss(own, torch.ones(2), torch.ones(2), 2).backward()
        optimizer.step()
    assert not any(torch.equal(t, first[name]) for name, t in method.adapter("new").items())
    assert same(_bits(method, ABC[:2]), before)
    assert torch.equal(method.eval()(features), logit)
    # an unknown row of the batch becomes the new domain's
    learned = replace(features, slot=torch.tensor([0, 1, 2, 0, 1, -1]))
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(method(learned)[kept], logit[kept])
    assert not torch.equal(method(learned)[2], logit[2])


@EACH
def test_s5_removing_a_domain_leaves_the_others(
    encoder: EncoderConfig, config: UniCTRConfig
) -> None:
    method = trained(encoder, config, ABC)
    features = features_of([(slot + (slot > 0), prompt) for slot, prompt in ROWS])
    before, logit = _bits(method, ("a", "c")), method(features)
    method.remove_domain("b")
    assert method.domains == ["a", "c"]
    assert same(_bits(method, ("a", "c")), before)
    assert torch.equal(method(features_of(ROWS)), logit)
    method.remove_domain("a")
    method.remove_domain("c")
    assert not method.adapter_parameters()


def test_first_weights_do_not_depend_on_the_order_of_adding(encoder: EncoderConfig) -> None:
    methods = []
    for order in (ABC, ABC[::-1]):
        torch.manual_seed(len(methods))
        methods.append(UniCTR(INPUTS, encoder, PLAIN, seed=1))
        for domain in order:
            methods[-1].add_domain(domain, seed=1)
    for domain in ABC:
        assert same(methods[0].adapter(domain), methods[1].adapter(domain))
    assert same(methods[0].shared(), methods[1].shared())
    own = methods[0].adapter("a")
    for other in (methods[0].adapter("b"), UniCTR(INPUTS, encoder, PLAIN, 2).shared()):
        drawn = [n for n, t in own.items() if t.ndim == 2 and n in other]
        assert not any(torch.equal(own[n], other[n]) for n in drawn)


def test_adapters_are_live(encoder: EncoderConfig) -> None:
    method = trained(encoder, PLAIN, ABC)
    method.adapter("b")["tower.out.bias"].fill_(100)
    method.shared()["general.tower.out.bias"].fill_(-100)
    logit = method(features_of(ROWS))
    own = torch.tensor([False, True, False, False, True, False])
    assert (logit[own, 0] > 50).all() and (logit[[0, 3], 0].abs() < 50).all()
    assert (logit[:, 1] < -50).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ladder": "rnn"}, "method.ladder: unknown 'rnn'; there are: transformer, none"),
        ({"combine": "mean"}, "method.combine: unknown 'mean'; there are: concat, sum"),
        ({"general": "full"}, "method.general: unknown 'full'; there are: pool, ladder"),
        ({"dropout": 1.0}, "method.dropout is 0 to below 1, not 1.0"),
        ({"ladder_dropout": -0.1}, "method.ladder_dropout is 0 to below 1, not -0.1"),
        ({"ladder_heads": 0}, "ladder_heads and tower are 1 or more"),
        ({"ladder_width": -1}, "ladder_width 0 or more"),
        ({"tower": (4, 0)}, "ladder_heads and tower are 1 or more"),
    ],
)
def test_values_that_no_method_can_have(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UniCTRConfig(**wrong)


def test_mistakes_that_only_the_encoder_or_the_schema_shows(encoder: EncoderConfig) -> None:
    with pytest.raises(UserError, match="3 heads do not divide the ladder's width 2"):
        UniCTR(INPUTS, encoder, replace(PLAIN, ladder_heads=3), 0)
    with pytest.raises(UserError, match="method.ids: the schema has no id field"):
        UniCTR(Inputs(0, 3, 0), encoder, replace(PLAIN, ids=True), 0)
    method = UniCTR(INPUTS, encoder, PLAIN, 0)
    with pytest.raises(UserError, match="reads prompts, and these shards hold none"):
        method(replace(features_of(ROWS), tokens=None))


def test_domains_that_are_there_twice_or_not_at_all(encoder: EncoderConfig) -> None:
    method = trained(encoder, PLAIN, ABC)
    with pytest.raises(UserError, match="domain 'b' has an adapter already; remove it first"):
        method.add_domain("b", 0)
    with pytest.raises(UserError, match="no adapter for domain 'z' is loaded; loaded: a, b, c"):
        method.adapter("z")
    with pytest.raises(UserError, match="no adapter for domain 'z' is loaded"):
        method.remove_domain("z")
