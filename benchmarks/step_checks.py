"""What it costs to look at every step before it moves a weight.

    torchrun --nproc-per-node 2 -m benchmarks.step_checks --shards data/shards/movielens-occupation

The same steps (MovieLens, MLP, global batches of 4,096), in turns with and without the sums over
loss and gradients and the all-reduce in which ranks agree; the ratio is the median over turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from torch import Tensor

from benchmarks.sides import BATCH, Setting, endless, phase_1
from data_shards import Cursor
from trainer import config as run_files
from trainer import fit
from trainer import ranks as groups
from trainer.engine import Engine
from trainer.ranks import Ranks
from trainer.trunk import new_trunk

RUN_FILE = Path(__file__).parents[1] / "launch" / "runs" / "movielens_mlora.toml"
STEPS = 20


@contextmanager
def unchecked() -> Iterator[None]:
    """Steps that are taken without a look."""
    finite, engine_finite, agree = fit.finite, Engine.finite, Ranks.any
    try:
        fit.finite = _sound
        Engine.finite = lambda self: True
        Ranks.any = lambda self, *flags: flags
        yield
    finally:
        fit.finite, Engine.finite, Ranks.any = finite, engine_finite, agree


def _sound(tensors: Sequence[Tensor]) -> bool:
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    changes = [f"data.shards={args.shards}", f"reading.global_batch={BATCH}"]
    setting = Setting(run_files.load(RUN_FILE, changes), groups.start(), 1)
    loader = setting.loader()
    training = phase_1(new_trunk(setting.run, setting.ranks, loader.indexes[0]))
    slots = training.model.slots(loader)
    batches = endless(lambda epoch: loader.batches(Cursor(epoch)))

    def timed() -> float:
        start = time.perf_counter()
        training.steps(islice(batches, STEPS), slots)
        return (time.perf_counter() - start) / STEPS

    timed()
    pairs = []
    for _ in range(args.turns):
        with unchecked():
            without = timed()
        pairs.append((timed(), without))
    ratio = statistics.median(one / other for one, other in pairs)
    seconds = statistics.median(one for one, _ in pairs)
    if setting.ranks.first:
        found = {"ranks": setting.ranks.world, "rows_per_second": round(BATCH / seconds)}
        print(json.dumps({**found, "time_of_a_step_beside_unchecked": round(ratio, 4)}))
    groups.stop()


if __name__ == "__main__":
    main()
