"""Uni-CTR runs on any ranks (S6), and what its heads read of items that no id model knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tests.gang import gang
from tests.toy_run import Step, checkpoint_at, here, recording
from tests.toy_unictr_run import (
    ADDED,
    LIKED,
    SIZES,
    STEPS,
    adapters_at,
    configured,
    write_toy,
)
from trainer import adding, schedule
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.dist

STAGES = {1: (1, 3), 2: (1, 2, 3)}
"""ZeRO's, by number of ranks; the first of one rank is what the others must equal."""
PAIRS = [(world, stage) for world in STAGES for stage in STAGES[world]][1:]
EVERY = pytest.mark.parametrize(("world", "stage"), PAIRS)
LEARNING = ("reading.global_batch=128", "reading.shuffle_rows=4096", "pretrain.max_epochs=8")
METHODS = {"unictr": (), "mlora": ('method={name="mlora", alpha=4}', "pretrain.lr=0.01")}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unictr")
    write_toy(folder, SIZES, ADDED)
    return folder


def on_ranks(toy: Path, output: Path, stages: tuple[int, ...]) -> dict[int, Any]:
    """Both phases under each ZeRO stage, and a domain added: by stage the two summaries, and the
    steps as this rank took them."""
    found = {}
    for stage in stages:
        config = configured(toy, output, f"zero{stage}", f"engine.zero_stage={stage}")
        with recording() as steps:
            summary = schedule.train(config, here())
            folder = RunFolder(config.folder)
            added = adding.add_domain(config, folder, "games", toy / "added", here())
        found[stage] = summary, added, steps
    return found


@dataclass(frozen=True)
class Ranked:
    """The runs of each world and ZeRO stage: folders, and what each rank saw."""

    folder: Path
    answers: dict[int, list[dict[int, Any]]]

    def run(self, world: int, stage: int) -> Path:
        return self.folder / str(world) / f"zero{stage}"

    def steps(self, world: int, stage: int) -> list[tuple[Step, ...]]:
        """Each global batch as its ranks took it."""
        return list(zip(*(answer[stage][2] for answer in self.answers[world]), strict=True))


@pytest.fixture(scope="module")
def ranked(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    output = tmp_path_factory.mktemp("ranks")
    answers = {
        world: gang(world, on_ranks, toy, output / str(world), stages, timeout=240)
        for world, stages in STAGES.items()
    }
    return Ranked(output, answers)


@EVERY
def test_s6_the_same_global_batches_give_the_same_losses(
    ranked: Ranked, world: int, stage: int
) -> None:
    ours, theirs = (_global(ranked.steps(*pair)) for pair in ((world, stage), (1, 1)))
    assert [rows for _, rows in ours] == [rows for _, rows in theirs]
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-5)


def _global(steps: list[tuple[Step, ...]]) -> list[tuple[float, list[int]]]:
    return [
        (sum(s.loss for s in shares), sorted(r for s in shares for r in s.row_ids))
        for shares in steps
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_domains_are_unevenly_spread(ranked: Ranked, stage: int) -> None:
    """What makes the law above worth its name: ranks, and whole batches, that lack a domain."""
    steps = ranked.steps(2, stage)[:STEPS]
    assert any(a.domains - b.domains or b.domains - a.domains for a, b in steps)
    present = [len(a.domains | b.domains) for a, b in steps]
    assert min(present) == 2 and max(present) == 3


@EVERY
def test_s6_the_same_trunk_heads_and_added_domain(ranked: Ranked, world: int, stage: int) -> None:
    ours, theirs = ranked.run(world, stage), ranked.run(1, 1)
    for answer in ranked.answers[world]:
        summary, added, _ = answer[stage]
        wanted, wanted_added, _ = ranked.answers[1][0][1]
        assert summary["kept"] == wanted["kept"] and summary["skipped"].keys() == {"toys"}
        assert added["moved"] == [] == wanted_added["moved"]
    name = f"checkpoints/step-{STEPS:010d}"
    _require_close(checkpoint_at(ours / name)[0], checkpoint_at(theirs / name)[0])
    _require_close(_dense(ours / "trunk"), _dense(theirs / "trunk"))
    found, expected = adapters_at(ours), adapters_at(theirs)
    assert found.keys() == expected.keys() == {"books", "music", "games"}
    for domain, tensors in found.items():
        _require_close(tensors, expected[domain])


def _dense(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "dense.safetensors")


def _require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        wanted = expected[name]
        if "attention.qkv.bias" in name:  # softmax is blind to the keys' bias: Adam steps on noise
            tensor, wanted = (t.tensor_split(3)[::2] for t in (tensor, wanted))
            tensor, wanted = torch.cat(tensor), torch.cat(wanted)
        torch.testing.assert_close(
            tensor, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def learned(toy: Path, output: Path) -> dict[str, dict[str, Any]]:
    """By method, the summary of a run on the same shards."""
    configs = {
        name: configured(toy, output, name, *LEARNING, *own) for name, own in METHODS.items()
    }
    return {name: schedule.train(config, here()) for name, config in configs.items()}


def test_heads_read_of_new_items_what_no_id_tells(tmp_path: Path) -> None:
    """A word of the title decides; no item of the test rows was ever trained on."""
    rows = write_toy(tmp_path, {"books": 1400, "music": 1400, "toys": 1200}, {})
    [summaries] = gang(1, learned, tmp_path, tmp_path)
    test = rows.slice(3200)
    assert not set(test["item"].to_pylist()) & set(rows["item"][:3200].to_pylist())
    found = {name: _aucs(summary["adapted"]) for name, summary in summaries.items()}
    best = {domain: _best(test, domain) for domain in ("books", "music", "toys")}
    assert {0.85 < auc < 0.95 for auc in best.values()} == {True}
    for domain, auc in best.items():
        assert found["unictr"][domain] > auc - 0.04
        assert abs(found["mlora"][domain] - 0.5) < 0.08


def _aucs(scores: dict[str, Any]) -> dict[str, float]:
    return {one["domain"]: one["auc"] for one in scores["domains"]}


def _best(rows: pa.Table, domain: str) -> float:
    """Of what decides, on these rows: the noise beyond it nothing can tell."""
    mine = [row for row in rows.to_pylist() if row["domain"] == domain]
    liked = [row["title"].split()[1] in LIKED[domain] for row in mine]
    return float(roc_auc_score([row["label"] for row in mine], liked))
