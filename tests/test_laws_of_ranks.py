"""S6: whole runs read, learn and predict the same on 1, 2 and 4 ranks, whatever the ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gang import gang
from tests.toy_run import Step, adapters_at, checkpoint_at, here, recording, toy_config
from trainer.schedule import train

pytestmark = pytest.mark.dist

SPREAD = 'tables.pinned={user="row_wise", item="column_wise", tags="row_wise"}'
ONE_PHASE = ("pretrain.one_phase=true", 'phases=["pretrain"]')
# Which runs each number of ranks makes; the first of one rank are what the others must equal.
RUNS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"two_phases": ("engine.zero_stage=0",), "one_phase": ("engine.zero_stage=0", *ONE_PHASE)},
    2: {
        "two_phases": ("engine.zero_stage=0",),
        "two_phases_zero1": ("engine.zero_stage=1", SPREAD),
        "one_phase": ("engine.zero_stage=2", *ONE_PHASE),
    },
    4: {
        "two_phases_zero3": ("engine.zero_stage=3", SPREAD),
        "one_phase": ("engine.zero_stage=0", *ONE_PHASE),
    },
}
PAIRS = [(world, name) for world in (2, 4) for name in RUNS[world]]
EVERY = pytest.mark.parametrize(("world", "name"), PAIRS)


@dataclass(frozen=True)
class Ranked:
    """All runs of each number of ranks: folders, and what each rank saw."""

    folder: Path
    summaries: dict[tuple[int, str], dict[str, Any]]
    steps: dict[tuple[int, str], list[list[Step]]]

    def run(self, world: int, name: str) -> Path:
        return self.folder / str(world) / name

    def reference(self, name: str) -> tuple[int, str]:
        return 1, "one_phase" if name.startswith("one_phase") else "two_phases"


def _runs(toy: Path, output: Path) -> dict[str, tuple[dict[str, Any], list[Step]]]:
    found = {}
    for name, overrides in RUNS[here().world].items():
        config = toy_config(
            toy, output, f"name={name}", "adapt.min_rows=80", "keep_checkpoints=9", *overrides
        )
        with recording() as steps:
            summary = train(config, here())
        found[name] = ({**summary, "pretrain_seconds": None}, steps)
    return found


@pytest.fixture(scope="module")
def ranked(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    found = Ranked(tmp_path_factory.mktemp("ranks"), {}, {})
    for world in RUNS:
        answers = gang(world, _runs, toy, found.folder / str(world), timeout=300)
        for name in RUNS[world]:
            found.summaries[world, name] = answers[0][name][0]
            assert all(answer[name][0] == answers[0][name][0] for answer in answers)
            found.steps[world, name] = [answer[name][1] for answer in answers]
    return found


def _global(steps: list[list[Step]]) -> list[tuple[int, float, list[int]]]:
    """Number, loss and rows of each global batch."""
    return [
        (shares[0].at, sum(s.loss for s in shares), sorted(r for s in shares for r in s.row_ids))
        for shares in zip(*steps, strict=True)
    ]


@EVERY
def test_the_same_global_batches_give_the_same_losses(
    ranked: Ranked, world: int, name: str
) -> None:
    ours, theirs = _global(ranked.steps[world, name]), _global(ranked.steps[ranked.reference(name)])
    assert [(at, rows) for at, _, rows in ours] == [(at, rows) for at, _, rows in theirs]
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_domains_are_unevenly_spread(ranked: Ranked, world: int) -> None:
    """What makes the other laws worth their name: ranks that lack a domain that others have."""
    steps = zip(*ranked.steps[world, "one_phase"], strict=True)
    assert any(share.domains != shares[0].domains for shares in steps for share in shares)


@EVERY
def test_the_same_gradients_weights_and_optimizer_state(
    ranked: Ranked, world: int, name: str
) -> None:
    """First moments are linear in the gradient: a wrong average over ranks would show here."""
    ours, theirs = ranked.run(world, name), ranked.run(*ranked.reference(name))
    names = sorted(path.name for path in (theirs / "checkpoints").glob("step-*"))
    assert len(names) == 2 and names == sorted(
        path.name for path in (ours / "checkpoints").glob("step-*")
    )
    for step in names:
        (tensors, values), (expected, wanted) = (
            checkpoint_at(run / "checkpoints" / step) for run in (ours, theirs)
        )
        assert values["table_steps"] == wanted["table_steps"] == [values["steps"]]
        assert any(name.endswith("exp_avg") for name in tensors)
        _require_close(tensors, expected)


@EVERY
def test_the_same_adapters(ranked: Ranked, world: int, name: str) -> None:
    ours, theirs = ranked.run(world, name), ranked.run(*ranked.reference(name))
    assert ranked.summaries[world, name]["kept"]
    found, expected = adapters_at(ours), adapters_at(theirs)
    assert found.keys() == expected.keys()
    for domain, tensors in found.items():
        _require_close(tensors, expected[domain])


@EVERY
def test_the_same_scores(ranked: Ranked, world: int, name: str) -> None:
    """S9: exact metrics of gathered rows do not know how many ranks scored them."""
    ours = ranked.summaries[world, name]
    theirs = ranked.summaries[ranked.reference(name)]
    assert ours["kept"] == theirs["kept"] and ours["skipped"] == theirs["skipped"]
    for part in ("shared", "adapted"):
        for one, other in zip(ours[part]["domains"], theirs[part]["domains"], strict=True):
            assert one["domain"] == other["domain"]
            numbers = [key for key in one if key != "domain"]
            assert [one[k] for k in numbers] == pytest.approx([other[k] for k in numbers], rel=1e-4)


def _require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
