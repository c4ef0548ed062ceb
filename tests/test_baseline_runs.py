"""Every backbone and every multi-domain baseline under the real engine, on two ranks with ZeRO 3,
and runs to which a domain is added."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_shards import Cursor, Index
from models.backbones import BACKBONES
from models.multi_domain import BASELINES
from tests.gang import gang
from tests.toy_run import here, toy_config
from trainer.adding import add_domain
from trainer.fit import trainee_of
from trainer.run_folder import RunFolder
from trainer.schedule import train
from trainer.trunk import new_trunk

pytestmark = pytest.mark.dist

# it gathers a layer's weights only where the layer itself is called
SHORT = ("reading.global_batch=128", "engine.zero_stage=3", "pretrain.max_epochs=1")
SMALL = {
    "shared_bottom": "bottom=[16]",
    "mmoe": "experts=3, expert=[16]",
    "ple": "expert=[16]",
    "hmoe": "experts=3, expert=[16], others=2",
    "aesm2": "experts=5, expert=[16]",
    "star": "hidden=[16], auxiliary=[4]",
    "pepnet": "hidden=[16], gate=4",
    "dffm": "hidden=[16]",
    "hinet": "experts=2, expert=[16], others=2",
}
MODELS = {
    **{name: f"backbone={{name='{name}'}}" for name in BACKBONES},
    **{
        name: f"method={{name='{name}', {sizes}, tower=[8], dropout=0.0}}"
        for name, sizes in SMALL.items()
    },
}


def _losses(toy: Path, steps: int) -> dict[str, list[float]]:
    """This rank's share of those of one global batch, learned from again and again."""
    found, batches = {}, []
    for name, override in MODELS.items():
        config = toy_config(toy, toy, *SHORT, override)
        index = Index.load(config.data.shards)
        trunk = new_trunk(config, here(), index)
        method = trunk.method()
        for domain in index.domains if name in BASELINES else ():
            method.add_domain(domain, config.seed)
        trainee = trainee_of(trunk, method, list(method.parameters()), config.pretrain)
        loader = trunk.loader(config.data.shards, ("train",), shuffle=True)
        batches = batches or [*islice(loader.batches(Cursor()), 1)] * steps
        slots = trainee.model.slots(loader)
        trainee.engine.train(False)  # no dropout: each step lowers the loss
        each = trainee.ahead(batches, slots, loader.extended)
        found[name] = [float(trainee.step(*pair, at)) for at, pair in enumerate(each)]
    return found


def test_every_backbone_and_every_baseline_learns(toy: Path) -> None:
    assert SMALL.keys() == BASELINES.keys()
    first, second = gang(2, _losses, toy, 4, timeout=300)
    for name in MODELS:
        losses = [sum(pair) for pair in zip(first[name], second[name], strict=True)]
        assert losses[-1] < losses[0], (name, losses)


def _run(toy: Path, output: Path) -> dict[str, Any]:
    found = {}
    for name in ("shared_bottom", "star"):
        config = toy_config(toy, output, f"name={name}", *SHORT, MODELS[name], "adapt.min_rows=100")
        summary = train(config, here())
        folder = RunFolder(config.folder)
        found[name] = summary, add_domain(config, folder, "games", str(toy / "added"), here())
    return found


def test_s4_a_run_learns_and_an_added_domain_moves_nothing(toy: Path, tmp_path: Path) -> None:
    for summary, added in gang(2, _run, toy, tmp_path, timeout=300)[0].values():
        assert "tiny" in summary["skipped"] and added["moved"] == []
