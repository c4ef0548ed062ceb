"""What a training step needs beside weights and optimizers, beside what `launch plan` says.

    python -m benchmarks.activations RUN_FILE --shards DIR --set encoder.checkpointing=true

One rank, CPU: the most that a step after the first ones has allocated at once, as torch's profiler
counts it. It has gradients and the working memory of backward in it, the plan's figure what
backward needs of forward.
"""

import argparse
import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.pair import free_port
from benchmarks.sides import Training, some
from data_shards import Loader, Rows
from embeddings import Place
from models import Method
from trainer import config as run_files
from trainer import ranks as groups
from trainer.footprint import UNBOUNDED, dense_part, footprint
from trainer.trunk import new_trunk


def measured(run_file: Path, shards: Path, changes: list[str]) -> tuple[int, int]:
    """(bytes that a step takes at most, bytes of the plan's activations and dense gradients)."""
    run = run_files.load(run_file, changes)
    loader = Loader(shards, Rows(run.pretrain.rows), run.reading, 0, 1)
    batches = some(loader, 2)
    trunk = new_trunk(run, groups.start(run.faults), loader.indexes[0])
    training = Training(trunk, loader.domains, _trained)
    slots = training.model.slots(loader)
    training.steps(batches * 2, slots)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        training.steps(batches[:1], slots)
    place = Place("cpu", 1, 1, UNBOUNDED)
    memory = footprint(run, trunk.rows, dense_part(run, len(loader.domains)), place).memory
    return _peak(seen), memory["activations"] + memory["dense gradients"]


def _trained(method: Method) -> list:
    adapters = method.adapter_parameters() if method.adapters_in_pretrain else []
    return [*method.shared_parameters(), *adapters]


def _peak(seen: profile) -> int:
    """Of all that was allocated and freed since the beginning."""
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    args = parser.parse_args()
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ.update(one, MASTER_PORT=str(free_port()))
    took, plan = measured(args.run_file, args.shards, args.changes)
    print(f"{took / 1e6:,.1f} MB taken, {plan / 1e6:,.1f} MB planned: {took / plan:.2f} times")
