"""The share of its time that a trainer waits for its next batch.

    python -m benchmarks.data_wait --shards data/shards/movielens-occupation

One process trains an epoch of MovieLens from shards (MLP, batches of 4,096), as `train` does; the
time inside the loader's `next` is what it waits. The first epoch is not counted.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.sides import BATCH, Setting, phase_1
from data_shards import Batch, Cursor
from trainer import config as run_files
from trainer import ranks as groups
from trainer.trunk import new_trunk

RUN_FILE = Path(__file__).parents[1] / "launch" / "runs" / "movielens_mlora.toml"


class Waited:
    """The same batches, and the seconds that they kept the trainer waiting."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.seconds, self.first = iter(batches), 0.0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(self.batches, None)
            self.seconds += time.perf_counter() - start
            self.first = self.first or self.seconds
            if batch is None:
                return
            yield batch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="MovieLens shard set, by occupation")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = [f"data.shards={args.shards}", f"reading.global_batch={BATCH}"]
    setting = Setting(run_files.load(RUN_FILE, overrides), groups.start(), 1)
    loader = setting.loader()
    training = phase_1(new_trunk(setting.run, setting.ranks, loader.indexes[0]))
    slots = training.model.slots(loader)
    for epoch in range(args.epochs + 1):
        waited, start = Waited(loader.batches(Cursor(epoch))), time.perf_counter()
        training.steps(waited, slots)
        seconds = time.perf_counter() - start
        if epoch:
            rate, later = loader.total_rows / seconds, waited.seconds - waited.first
            print(
                f"epoch {epoch}: {rate:,.0f} rows/s; waiting for data {later / seconds:.1%} of it, "
                f"and {waited.first / seconds:.1%} for the epoch's first batch"
            )
    groups.stop()


if __name__ == "__main__":
    main()
