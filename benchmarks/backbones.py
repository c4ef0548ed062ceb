"""Every backbone beside the same model in plain torch, at MovieLens' sizes, and MLoRA's cost.

    python -m benchmarks.backbones --backbone deepfm

Rows of uniform ids, in memory for both sides; sides are timed in turns. A training step looks up,
learns and updates tables; a prediction looks up and scores. With MLoRA, adapters of two domains
learn along, as in one phase; its prediction reads rows of one domain by the matrices of that
domain.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Claim, Side, compared, table
from benchmarks.plain_backbones import PLAIN, Plain
from benchmarks.sides import (
    BATCH,
    NO_ADAPTER,
    Setting,
    Training,
    over,
    phase_1,
    score,
    synthetic_batches,
)
from data_shards import Batch, Field, Schema
from embeddings import Embedder
from models import Method
from models.backbones import BACKBONES, BackboneConfig, DeepConfig
from trainer import config as run_files
from trainer import ranks as groups
from trainer.machine import machine
from trainer.model import Model
from trainer.trunk import Trunk, empty_trunk

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "movielens_mlora.toml"
CONFIGS: dict[str, type] = {kind().name: kind for kind in get_args(BackboneConfig)}
# Fields and rows of MovieLens-1M; the plain IntTower knows that the second one is the item's.
ROWS = {"user": 6041, "item": 3707, "gender": 3, "age": 8, "job": 22, "year": 82, "surface": 3}
TWO = torch.tensor([0, 1])
SIZES = (1, 32, 1024)
STEPS = 10


def measured(setting: Setting, name: str) -> list[dict[str, Any]]:
    """Training steps, then predictions at each size."""
    trunk = _trunk(setting, name)
    deep = DeepConfig()
    plain = PLAIN[name]([*ROWS.values()], setting.run.tables.dim, deep.hidden, deep.dropout)
    return [_training(setting, trunk, plain, name)] + [
        _prediction(setting, trunk, plain, name, size) for size in SIZES
    ]


def _training(setting: Setting, trunk: Trunk, plain: Plain, name: str) -> dict[str, Any]:
    batches = synthetic_batches(trunk, STEPS)
    base = phase_1(trunk)
    mixed = [replace(batch, domain=torch.arange(BATCH) % 2) for batch in batches]
    adapted = Training(_trunk(setting, name), ["a", "b"], lambda method: [*method.parameters()])
    sides = {
        name: over(batches, lambda: base.steps(batches, NO_ADAPTER)),
        f"{name} in plain torch": over(batches, _plain_steps(plain, batches)),
        f"{name} +MLoRA": over(mixed, lambda: adapted.steps(mixed, TWO)),
    }
    ours, theirs, lora = sides
    return compared(
        f"{name}: training, {len(ROWS)} fields, batches of {BATCH}",
        sides,
        [
            Claim("times the speed of plain torch", theirs, ours, 1.0),
            Claim("step with MLoRA against base", lora, ours, 1.25, at_least=False),
        ],
        setting.rounds,
    )


def _prediction(
    setting: Setting, trunk: Trunk, plain: Plain, name: str, size: int
) -> dict[str, Any]:
    batches = synthetic_batches(trunk, 3 * STEPS, size)
    base, adapted = trunk.method(), trunk.method()
    for domain in ("a", "b"):
        adapted.add_domain(domain, 1)
    sides = {
        name: _scoring(trunk, base, batches, NO_ADAPTER),
        f"{name} in plain torch": Side(
            _plain_scores(plain, batches), len(batches), size * len(batches)
        ),
        f"{name} +MLoRA": _scoring(trunk, adapted, batches, TWO),
    }
    ours, theirs, lora = sides
    return compared(
        f"{name}: prediction, batches of {size}",
        sides,
        [
            Claim("latency against plain torch", ours, theirs, 1.0, at_least=False),
            Claim("latency with MLoRA against base", lora, ours, None, at_least=False),
        ],
        setting.rounds,
    )


def _trunk(setting: Setting, name: str) -> Trunk:
    fields = [Field(key, "id", "item" if key == "item" else "user") for key in ROWS]
    run = replace(setting.run, backbone=CONFIGS[name]())
    return empty_trunk(run, setting.ranks, Schema(tuple(fields)), ROWS, "")


def _scoring(trunk: Trunk, method: Method, batches: Sequence[Batch], slots: Tensor) -> Side:
    model = Model(Embedder(trunk.tables, trunk.rows), method, tuple(method.domains))
    rows = sum(len(batch) for batch in batches)
    return Side(partial(score, model, method, batches, slots), len(batches), rows)


def _plain_steps(model: Plain, batches: Sequence[Batch]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    ids = [_ids(batch) for batch in batches]

    def run() -> None:
        model.train()
        for one, batch in zip(ids, batches, strict=True):
            F.binary_cross_entropy_with_logits(model(one), batch.label).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _plain_scores(model: Plain, batches: Sequence[Batch]) -> Callable[[], None]:
    ids = [_ids(batch) for batch in batches]

    @torch.no_grad()
    def run() -> None:
        model.eval()
        for one in ids:
            model(one)

    return run


def _ids(batch: Batch) -> Tensor:
    """[B, F]; each field has one id."""
    return batch.ids.values().view(len(ROWS), -1).T.long().contiguous()


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--backbone", choices=BACKBONES, action="append", help="may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/backbones.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = run_files.load(RUN_FILE, [f"reading.global_batch={BATCH}"])
    setting, parts = Setting(run, groups.start(), args.rounds), []
    for name in args.backbone or BACKBONES:
        for part in measured(setting, name):
            parts.append(part)
            print(table(part), flush=True)
    groups.stop()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "threads": args.threads,
        "parts": parts,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
