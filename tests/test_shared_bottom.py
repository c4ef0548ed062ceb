"""SharedBottom: its equation, routing (S1, S2), domains that come and go (S4, S5), and a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from data_shards import UserError
from models import METHODS, EncoderConfig, Features, Parts, SharedBottom, SharedBottomConfig
from models.backbones import BackboneConfig
from tests.gang import gang
from tests.toy_method import ABC, INPUTS, copies, names_of, same, stir, vectors
from tests.toy_run import here, toy_config
from trainer.run_folder import RunFolder
from trainer.schedule import add_domain, train

PLAIN = SharedBottomConfig(bottom=(10, 7), tower=(6, 5), dropout=0.0)
EACH = pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, bottom=(9,), tower=())])
MODES = pytest.mark.parametrize("training", [False, True])
some_names = st.lists(st.sampled_from([*ABC, "unknown"]), min_size=1, max_size=80)


def _trained(config: SharedBottomConfig, domains: Sequence[str] = ABC) -> SharedBottom:
    """As if trained: a domain's tower follows its name."""
    method = SharedBottom(INPUTS, config, seed=1)
    stir(method.shared().values(), "shared")
    for domain in domains:
        method.add_domain(domain, seed=1)
        stir(method.adapter(domain).values(), domain)
    return method.double().eval()


def _features(method: SharedBottom, names: Sequence[str]) -> Features:
    place = {domain: slot for slot, domain in enumerate(method.domains)}
    slot = torch.tensor([place.get(name, -1) for name in names])
    return Features(*vectors(len(names), torch.float64), slot)


def _at(features: Features, rows: Tensor) -> Features:
    return Features(features.embedded[rows], features.numbers[rows], features.slot[rows])


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def _row_by_hand(method: SharedBottom, features: Features, row: int, config: Any) -> list[Tensor]:
    """h_t(f(x)) and h(f(x)) of one row, from the parts by their names."""
    shared = method.shared()
    x = torch.cat([features.embedded[row, :, : INPUTS.dim].flatten(), features.numbers[row]])
    for i in range(len(config.bottom)):
        layer = f"bottom.layers.{i}.linear"
        x = F.relu(shared[f"{layer}.weight"] @ x + shared[f"{layer}.bias"])

    def tower(tensors: Sequence[Tensor]) -> Tensor:
        y, pairs = x, list(zip(tensors[::2], tensors[1::2], strict=True))
        for weight, bias in pairs[:-1]:
            y = F.relu(weight @ y + bias)
        return (pairs[-1][0] @ y + pairs[-1][1])[0]

    general = tower([tensor for name, tensor in shared.items() if name.startswith("general.")])
    slot = int(features.slot[row])
    own = tower(list(method.adapter(method.domains[slot]).values())) if slot >= 0 else general
    return [own, general, torch.tensor(float(slot >= 0), dtype=torch.float64)]


@EACH
@MODES
@settings(max_examples=20)
@given(names=some_names)
def test_s2_a_row_is_scored_by_the_equation_whatever_its_batch(
    config: SharedBottomConfig, training: bool, names: list[str]
) -> None:
    method = _trained(config).train(training)
    features = _features(method, names)
    wanted = [torch.stack(_row_by_hand(method, features, i, config)) for i in range(len(names))]
    _close(method(features), torch.stack(wanted))
    _close(method(_at(features, torch.tensor([0]))), wanted[0].unsqueeze(0))


@EACH
@settings(max_examples=20)
@given(names=some_names, data=st.data())
def test_s1_permuting_a_batch_permutes_its_logits(
    config: SharedBottomConfig, names: list[str], data: st.DataObject
) -> None:
    method = _trained(config)
    features = _features(method, names)
    order = torch.tensor(data.draw(st.permutations(range(len(names)))))
    _close(method(_at(features, order)), method(features)[order])


@EACH
def test_a_domains_rows_are_scored_as_by_a_model_with_its_tower_alone(
    config: SharedBottomConfig,
) -> None:
    names = names_of(90, (*ABC, "unknown"))
    method = _trained(config)
    logit = method(_features(method, names))
    for domain in ABC:
        alone, mine = _trained(config, [domain]), torch.tensor([name == domain for name in names])
        assert torch.equal(alone(_features(alone, names))[mine], logit[mine])
    bare, unknown = _trained(config, ()), torch.tensor([name == "unknown" for name in names])
    assert torch.equal(bare(_features(bare, names))[unknown], logit[unknown])
    assert torch.equal(logit[unknown, 0], logit[unknown, 1])
    assert (logit[~unknown, 0] != logit[~unknown, 1]).all()


@EACH
def test_a_tower_learns_from_its_own_rows_alone(config: SharedBottomConfig) -> None:
    method = _trained(config).train()
    for slot, domain in enumerate(ABC):
        logit = method(_features(method, [domain, "unknown"] * 20))
        loss = method.loss(logit, torch.ones(40).double(), torch.ones(40).double(), 40)
        for grad in torch.autograd.grad(loss, method.adapter_parameters()):
            assert grad[slot].any()
            assert not torch.cat([grad[:slot], grad[slot + 1 :]]).any()


@given(names=some_names)
@settings(max_examples=20)
def test_the_loss_is_a_mean_over_rows_of_own_and_general_cross_entropy(names: list[str]) -> None:
    method, rows = _trained(PLAIN), len(names)
    features = _features(method, names)
    generator = torch.Generator().manual_seed(rows)
    label = torch.randint(2, (rows,), generator=generator).double()
    weight = (torch.arange(rows) < max(rows - 2, 1)).double()  # padding at the end
    real = int(weight.sum())
    probability = method(features)[:, :2].sigmoid()
    each = torch.where(label.unsqueeze(1) > 0, probability, 1 - probability).log().neg()
    has_own = torch.tensor([name != "unknown" for name in names])

    wanted = (each[:real, 0].sum() + each[:real, 1][has_own[:real]].sum()) / real
    _close(method.loss(method(features), label, weight, real), wanted)
    method.freeze_shared(keep=True)
    _close(method.loss(method(features), label, weight, real), each[:real, 0].mean())


@EACH
def test_shared_and_adapters_partition_the_model(config: SharedBottomConfig) -> None:
    method = _trained(config)
    everything = [*method.parameters(), *method.buffers()]
    for tensor in everything:
        tensor.detach().zero_()
    for part in (method.shared(), *(method.adapter(domain) for domain in ABC)):
        for tensor in part.values():
            tensor.add_(1)
    assert all((tensor == 1).all() for tensor in everything)
    lists = [*method.shared_parameters(), *method.adapter_parameters()]
    assert sorted(map(id, lists)) == sorted(map(id, method.parameters()))
    assert {p.data_ptr() for p in method.shared_parameters()} == {
        t.data_ptr() for t in method.shared().values()
    }


@EACH
def test_s4_adding_and_s5_removing_a_domain_move_no_bit_of_the_others(
    config: SharedBottomConfig,
) -> None:
    names = names_of(70, (*ABC, "new"))
    method = _trained(config)
    parts = [copies(method.shared()), *(copies(method.adapter(domain)) for domain in ABC)]
    others = torch.tensor([name != "new" for name in names])
    before = method(_features(method, names))
    method.add_domain("new", seed=9)
    assert not method.towers.training  # type: ignore[union-attr]
    method.train()
    adam = torch.optim.Adam(method.adapter_parameters(), lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        method(_features(method, ["new"] * 40))[:, 0].square().sum().backward()
        adam.step()
    after = method.eval()(_features(method, names))
    assert torch.equal(after[others], before[others]) and not (after == before)[~others, 0].any()
    now = [method.shared(), *(method.adapter(domain) for domain in ABC)]
    assert all(same(*pair) for pair in zip(now, parts, strict=True))

    method.remove_domain("a")
    assert method.domains == ["b", "c", "new"]
    kept = torch.tensor([name != "a" for name in names])
    assert torch.equal(method(_features(method, names))[kept], after[kept])
    for domain in ("b", "c", "new"):
        method.remove_domain(domain)
    assert not method.adapter_parameters()
    assert torch.equal(method(_features(method, names))[:, 1], before[:, 1])


def test_first_weights_do_not_depend_on_the_order_of_adding() -> None:
    forth, back = (SharedBottom(INPUTS, PLAIN, seed=1) for _ in range(2))
    for domain, other in zip(ABC, ABC[::-1], strict=True):
        forth.add_domain(domain, seed=3)
        back.add_domain(other, seed=3)
    assert all(same(forth.adapter(domain), back.adapter(domain)) for domain in ABC)
    assert not same(forth.adapter("a"), forth.adapter("b"))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"bottom": ()}, "bottom has a layer or more"),
        ({"tower": (4, 0)}, "widths are 1 or more"),
        ({"dropout": 1.0}, r"method\.dropout is 0 to below 1, not 1\.0"),
    ],
)
def test_a_shape_that_is_none_is_refused(mistake: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SharedBottomConfig(**mistake)


def test_it_is_found_by_its_configs_name() -> None:
    parts = Parts(INPUTS, BackboneConfig(), EncoderConfig(), seed=1)
    assert isinstance(METHODS[PLAIN.name](PLAIN, parts), SharedBottom)


def _run(toy: Path, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    method = 'method={name="shared_bottom", bottom=[16], tower=[8], dropout=0.0}'
    # ZeRO 3 gathers a layer's weights only where the layer itself is called
    config = toy_config(toy, output, method, "engine.zero_stage=3", "adapt.min_rows=100")
    summary = train(config, here())
    added = add_domain(config, RunFolder(config.folder), "games", str(toy / "added"), here())
    return summary, added


@pytest.mark.dist
def test_s4_a_run_learns_and_an_added_domain_moves_nothing(toy: Path, tmp_path: Path) -> None:
    summary, added = gang(1, _run, toy, tmp_path)[0]
    assert summary["kept"] == ["books"] and summary["skipped"].keys() == {"music", "tiny", "toys"}
    assert summary["shared"]["wauc"] > 0.6
    assert added["moved"] == [] and added["kept"]
    assert added["adapted"]["auc"] > added["shared"]["auc"]
