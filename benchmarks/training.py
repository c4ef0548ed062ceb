"""Training speed of Banyan beside plain torch, and what a step's cost does and does not follow.

    python -m benchmarks.training --shards data/shards/movielens-occupation

Parts (`--part`): rows per second beside plain torch and the dense part alone; step cost against
rows of the tables, phases and domains; two ranks against one. Sides are timed in turns.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Claim, Side, compared, table
from benchmarks.pair import group_of
from benchmarks.peer import PlainTorch, PlainTraining, shuffled
from benchmarks.sides import (
    BATCH,
    NO_ADAPTER,
    STREAMED,
    Setting,
    Training,
    adapted,
    dense_alone,
    endless,
    in_memory,
    learn,
    over,
    phase_1,
    score,
    some,
    synthetic_batches,
    synthetic_trunk,
)
from embeddings import Embedder
from models.backbones import DeepConfig
from trainer import config as run_files
from trainer import ranks as groups
from trainer.machine import machine
from trainer.model import Model
from trainer.trunk import new_trunk

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "movielens_mlora.toml"


def movielens(setting: Setting) -> dict[str, Any]:
    """Whole epochs from shards, beside plain torch fed from memory."""
    loader = setting.loader()
    trunk = new_trunk(setting.run, setting.ranks, loader.indexes[0])
    rows, batches = in_memory(setting), some(loader, 40)
    streamed = phase_1(trunk).from_shards(loader)
    multi = [trunk.rows[field.name] for field in trunk.schema.ids if field.multi]
    single = [trunk.rows[field.name] for field in trunk.schema.ids if not field.multi]
    network = setting.run.backbone
    assert isinstance(network, DeepConfig)
    plain = PlainTorch(single, multi, setting.run.tables.dim, network.hidden, network.dropout)
    peer = PlainTraining(plain)
    slices = endless(lambda _: shuffled(rows, BATCH))
    names = ("Banyan, from shards", "plain torch, rows in memory", "dense part alone")
    return compared(
        f"MovieLens, {loader.total_rows:,} rows, {len(trunk.rows)} fields, batches of {BATCH}",
        {
            names[0]: streamed,
            names[1]: replace(streamed, run=lambda: [*map(peer.step, islice(slices, STREAMED))]),
            names[2]: over(batches, dense_alone(trunk, batches)),
        },
        [
            Claim("times the speed of plain torch", names[1], names[0], 1.2),
            Claim("of the dense part's speed", names[2], names[0], 0.6),
        ],
        setting.rounds,
    )


def million(setting: Setting) -> dict[str, Any]:
    """20 tables of a million rows each, both sides fed from memory."""
    fields, rows, dim, network = 20, 10**6, setting.run.tables.dim, setting.run.backbone
    trunk = synthetic_trunk(setting, fields, rows)
    batches = synthetic_batches(trunk, 20)
    ours = phase_1(trunk)
    assert isinstance(network, DeepConfig)
    none = torch.empty(BATCH, 0, dtype=torch.int64)
    plain_rows = [
        (b.ids.values().view(fields, BATCH).T.contiguous(), none, b.label) for b in batches
    ]
    peers = {
        sparse: PlainTraining(
            PlainTorch([rows] * fields, [], dim, network.hidden, network.dropout, sparse), sparse
        )
        for sparse in (False, True)
    }

    def plain(sparse: bool, steps: int) -> Side:
        return Side(
            lambda: [peers[sparse].step(r) for r in plain_rows[:steps]], steps, steps * BATCH
        )

    names = ("plain torch, Adam", "plain torch, SparseAdam", "Banyan")
    return compared(
        f"{fields} tables of {rows:,} rows, uniform ids, batches of {BATCH}",
        {
            names[2]: over(batches, lambda: ours.steps(batches, NO_ADAPTER)),
            names[0]: plain(False, 2),
            names[1]: plain(True, 10),
        },
        [
            Claim("times the speed of plain torch with Adam", names[0], names[2], 10),
            Claim("times the speed of plain torch with SparseAdam", names[1], names[2]),
        ],
        setting.rounds,
    )


def table_rows(setting: Setting) -> dict[str, Any]:
    """The same step over ten tables of more and more rows."""
    sides = {}
    for rows in (10**5, 10**6, 10**7):
        trunk = synthetic_trunk(setting, 10, rows // 10)
        batches = synthetic_batches(trunk, 20)
        steps = partial(phase_1(trunk).steps, batches, NO_ADAPTER)
        sides[f"{rows:,} rows"] = over(batches, steps)
    few, some_rows, many = sides
    return compared(
        f"Step cost against table rows: 10 tables, uniform ids, batches of {BATCH}",
        sides,
        [
            Claim(f"cost of {name} against {few}", name, few, 1.15, at_least=False)
            for name in (some_rows, many)
        ],
        setting.rounds,
    )


def phases(setting: Setting) -> dict[str, Any]:
    """The same batches of one domain in phase 1 and in phase 2."""
    domain = "college_grad_student"
    loader = setting.loader((domain,))
    batches = some(loader, 15)
    slots = {phase: torch.full((len(loader.domains),), phase - 2) for phase in (1, 2)}
    trunks = {p: new_trunk(setting.run, setting.ranks, loader.indexes[0]) for p in (1, 2)}
    trunks[2].freeze()
    first = phase_1(trunks[1])
    second = Training(trunks[2], [domain], lambda method: method.adapter_parameters())
    return compared(
        f"Phase 2 against phase 1: one domain's rows, batches of {BATCH}",
        {
            "phase 1": over(batches, lambda: first.steps(batches, slots[1])),
            "phase 2": over(batches, lambda: second.steps(batches, slots[2])),
        },
        [Claim("cost of phase 2 against phase 1", "phase 2", "phase 1", 1.0, at_least=False)],
        setting.rounds,
    )


def domains(setting: Setting) -> dict[str, Any]:
    """Mixed batches of ten domains in models with more and more of them."""
    loader = setting.loader()
    trunk = new_trunk(setting.run, setting.ranks, loader.indexes[0])
    trunk.freeze()
    batches = some(loader, 5)
    ten = [replace(batch, domain=batch.domain % 10) for batch in batches]
    sides = {}
    for count in (10, 100, 1000):
        method = adapted(trunk, count)
        model = Model(Embedder(trunk.tables, trunk.rows), method, method.domains)
        spread = [replace(b, domain=torch.arange(BATCH) % count) for b in batches]
        apart = torch.arange(10) * (count // 10)
        for name, given, slots in (("10", ten, apart), ("all", spread, torch.arange(count))):
            about = f"of {name} domains in a model of {count}"
            sides[f"score rows {about}"] = over(given, partial(score, model, method, given, slots))
            sides[f"learn rows {about}"] = over(given, partial(learn, model, method, given, slots))
    return compared(
        f"Domains in the model: mixed batches of {BATCH}, adapters alone learn",
        sides,
        [
            Claim(
                f"cost with 1,000 domains against 10, {what} rows of {rows}",
                f"{what} rows of {rows} domains in a model of 1000",
                f"{what} rows of 10 domains in a model of 10",
                1.2 if rows == "10" else None,
                at_least=False,
            )
            for rows in ("10", "all")
            for what in ("score", "learn")
        ],
        setting.rounds,
    )


def world(setting: Setting, batch: int, least: float | None) -> dict[str, Any]:
    """Two ranks against one with the same global batches, a thread each, in fresh processes."""
    run = replace(setting.run, reading=replace(setting.run.reading, global_batch=batch))
    loader = replace(setting, run=run).loader()
    rows = STREAMED * loader.total_rows // loader.steps()
    with group_of(1, run) as one, group_of(2, run) as two:
        sides = {
            name: Side(partial(ask, "step"), STREAMED, rows, partial(ask, "profile"))
            for name, ask in (("one rank", one), ("two ranks", two))
        }
        return compared(
            f"Two ranks against one: MovieLens from shards, global batch {batch:,}, a thread each",
            sides,
            [Claim("times the speed of one rank", "one rank", "two ranks", least)],
            setting.rounds,
        )


PARTS: dict[str, tuple[Callable[[Setting], dict[str, Any]], ...]] = {
    "throughput": (movielens, million),
    "table-rows": (table_rows,),
    "phases": (phases,),
    "domains": (domains,),
    "ranks": (partial(world, batch=BATCH, least=1.6), partial(world, batch=4 * BATCH, least=1.6)),
}


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shards", required=True, help="MovieLens shard set, by occupation")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = [f"data.shards={args.shards}", f"reading.global_batch={BATCH}"]
    setting = Setting(run_files.load(RUN_FILE, overrides), groups.start(), args.rounds)
    measured = []
    for part in args.part or PARTS:
        for measure in PARTS[part]:
            measured.append(measure(setting))
            print(table(measured[-1]), flush=True)
    groups.stop()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {
        "date": date,
        "machine": machine(),
        "threads": args.threads,
        "batch": BATCH,
        "parts": measured,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
