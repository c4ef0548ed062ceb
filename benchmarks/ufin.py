"""UFIN beside encoding its texts in every step, and beside the EulerNet that teaches it.

    python -m launch write-shards launch/runs/movielens_ufin.toml
    python -m launch cache-text launch/runs/movielens_ufin.toml
    python -m benchmarks.ufin

One process trains and scores on batches that lie in memory; the text vectors of a batch are fetched
in each step. Sides are timed in turns; figures are of processor time.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Claim, Side
from benchmarks.sides import some
from benchmarks.text_cache import compared
from data_shards import Batch, Index
from models import MLoRAConfig
from trainer import config as run_files
from trainer import ranks as groups
from trainer.config import RunConfig
from trainer.fit import Trainee, trainee_of
from trainer.machine import machine
from trainer.model import trunk_alone
from trainer.ranks import Ranks
from trainer.text_cache import TextCache
from trainer.trunk import Trunk, empty_trunk

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "movielens_ufin.toml"


class Timed:
    """One model on some batches."""

    def __init__(self, trunk: Trunk, batches: Sequence[Batch]) -> None:
        method = trunk.method()
        phase, trained = trunk.config.pretrain, method.shared_parameters()
        self.trainee: Trainee = trainee_of(trunk, method, trained, phase)
        self.alone, self.text = trunk_alone(trunk), trunk.text
        self.batches = batches
        self.slots = torch.tensor([-1])

    def learn(self) -> None:
        self.trainee.engine.train(True)
        for number, pair in enumerate(self.trainee.ahead(self.batches, self.slots, False)):
            self.trainee.step(*pair, number)

    @torch.no_grad()
    def score(self) -> None:
        for batch in self.batches:
            self.alone.logits(batch, self.slots, False)

    def side(self, run: Callable[[], None]) -> Side:
        return Side(run, len(self.batches), sum(batch.rows for batch in self.batches))


def timed(run: RunConfig, ranks: Ranks, batches: int) -> Timed:
    """A fresh trunk and the first training rows of its shards."""
    index = Index.load(run.data.shards)
    sizes, vocabulary = index.vocabulary.sizes, index.vocabulary.fingerprint
    trunk = empty_trunk(run, ranks, index.schema, sizes, vocabulary)
    return Timed(trunk, some(trunk.loader(run.data.shards, ("train",), shuffle=True), batches))


def without_text(run: RunConfig) -> RunConfig:
    """EulerNet over the same fields, as a teacher is."""
    teacher = run.teacher
    assert teacher is not None
    backbone = teacher.backbone
    return replace(run, method=MLoRAConfig(), backbone=backbone, text=None, teacher=None)


def prompts(cache: TextCache, batch: Batch) -> list[str]:
    """What a step without a cache would encode: a whole sentence a row."""
    parts = []
    for name, [vectors] in cache._sets.items():
        places = vectors.table.lookup(batch.columns[name].numpy())
        parts.append([vectors.table.texts[int(place)].as_py() for place in places])
    return [" ".join(texts) for texts in zip(*parts, strict=True)]


def encoding(timed: Timed, cache: TextCache) -> Side:
    """The same steps by a run without a cache: each encodes its rows' sentences."""
    texts = [prompts(cache, batch) for batch in timed.batches]

    def run() -> None:
        for some_texts in texts:
            cache.encoder.vectors(some_texts)
        timed.learn()

    return timed.side(run)


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ufin.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = measured(run_files.load(RUN_FILE, args.overrides), groups.start(), args)
    groups.stop()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": date, "machine": machine(), "threads": args.threads, "parts": parts}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


def measured(run: RunConfig, ranks: Ranks, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training and scoring, by processor time."""
    groups.keep_freed_memory()
    ufin, euler = timed(run, ranks, args.batches), timed(without_text(run), ranks, args.batches)
    few = timed(run, ranks, 1)
    assert few.text is not None
    ours, net = "UFIN, cached text", "EulerNet alone"
    cached, anew = "vectors from the cache", "sentences encoded in the step"
    learn = {ours: ufin.side(ufin.learn), net: euler.side(euler.learn)}
    score = {ours: ufin.side(ufin.score), net: euler.side(euler.score)}
    text = {cached: few.side(few.learn), anew: encoding(few, few.text)}
    hundred = Claim("times the rows/s of encoding in the step", anew, cached, 100)
    trained = Claim("of EulerNet's time a step", ours, net)
    scored = Claim("of EulerNet's time (the paper: 1.19)", ours, net, 1.19, at_least=False)
    return [
        compared("Training with and without a cache", text, [hundred], 2),
        compared("Training", learn, [trained], args.rounds),
        compared("Scoring", score, [scored], args.rounds),
    ]


if __name__ == "__main__":
    main()
