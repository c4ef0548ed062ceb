"""Uni-CTR with MiniLM on some users of the four Amazon domains, beside models over ids alone.

All variants learn from the same rows: whole users, as many of each domain. `office` is held out:
it is scored by what the other domains share, and then added. What is in the results is not
measured again, so that a run which was cut off can go on.

    torchrun --nproc-per-node 2 -m benchmarks.amazon_unictr
"""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.amazon_rows import NEW, sizes, title_cosines, write_rows
from benchmarks.measured import Measured
from trainer import config as run_files
from trainer import ranks as groups
from trainer.adding import add_domain
from trainer.config import RunConfig
from trainer.evaluate import zero_shot
from trainer.report import grid
from trainer.run_folder import RunFolder
from trainer.schedule import train

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "amazon_unictr.toml"
RESULTS = ROOT / "benchmarks" / "results" / "amazon_unictr.json"
COMMON = [
    # ids of which so few rows teach nothing would only make prompts longer
    'data.prompt.without=["user", "item"]',
    "data.prompt.words={history=3, title=12}",
    "data.split.parts={pretrain=0.5, adapt=0.15, valid=0.1, test=0.25}",
    "encoder.cache_gb=1.5",
    "encoder.chunks=2",
    "reading.global_batch=16",
    "adapt.max_epochs=5",
    "tracking.wandb=disabled",
]
IDS = ["pretrain.lr=1e-3", "pretrain.patience=3"]
VARIANTS = {
    "Uni-CTR": [],
    "Uni-CTR, no ladder": ["method.ladder=none"],
    "MLP over ids": [*IDS, "method.name=mlora", "backbone.name=mlp", 'phases=["pretrain"]'],
    "SharedBottom over ids": [*IDS, "method.name=shared_bottom"],
}
UNTRAINED = "cosine of titles, untrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=110, help="of each domain")
    parser.add_argument("--epochs", type=int, default=1, help="of phase 1 of Uni-CTR, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/amazon_unictr"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks = groups.start()
    about = {"users": args.users, "epochs": args.epochs, "ranks": ranks.world}
    results = Measured(args.results, ranks, about)
    measure(args, ranks, results)
    groups.stop()
    if ranks.first:
        print(tables(results.found))


def measure(args: argparse.Namespace, ranks: groups.Ranks, results: Measured) -> None:
    runs, new = {name: run_of(args, name) for name in VARIANTS}, args.out / "shards-new"
    first = runs["Uni-CTR"]
    if ranks.first:
        write_rows(first, new, args.users)
    ranks.broadcast(None)
    results.once("sizes", lambda: sizes(first, new))
    results.once(UNTRAINED, lambda: title_cosines(first, new, args.users))
    for name, run in runs.items():
        results.once(f"{name}: trained", lambda run=run: train(run, ranks))
        results.once(f"{name}: zero-shot", lambda run=run: zero(run, new, ranks))
    for name, run in runs.items():
        if "adapt" in run.phases:
            results.once(f"{name}: added", lambda run=run: added(run, new, ranks))


def run_of(args: argparse.Namespace, name: str) -> RunConfig:
    slug = name.lower().replace(",", "").replace(" ", "_")
    places = [f'output="{args.out}"', f"name={slug}", f'data.shards="{args.out / "shards"}"']
    epochs = [] if "ids" in name else [f"pretrain.max_epochs={args.epochs}"]
    return run_files.load(RUN_FILE, [*COMMON, *places, *epochs, *VARIANTS[name]])


def zero(run: RunConfig, new: Path, ranks: groups.Ranks) -> dict[str, Any]:
    return zero_shot(run, RunFolder(run.folder), str(new), run.test, NEW, ranks).to_dict()


def added(run: RunConfig, new: Path, ranks: groups.Ranks) -> dict[str, Any]:
    return add_domain(run, RunFolder(run.folder), NEW, str(new), ranks)


def tables(measured: dict[str, Any]) -> str:
    """Sizes, and the AUC of the test rows by domain."""
    rows = measured["sizes"]["rows and positives"]
    domains = sorted(rows["test"])
    lines = [
        [split, *(f"{count[0]:,} ({count[1]:,})" for count in map(rows[split].get, domains))]
        for split in rows
    ]
    scores = {UNTRAINED: _by_domain(measured[UNTRAINED])}
    for name in VARIANTS:
        found = measured[f"{name}: trained"]
        shared = _by_domain(found["shared"]) | _by_domain(measured[f"{name}: zero-shot"])
        scores[f"{name}, shared part"] = shared
        if found["adapted"]:
            own = _by_domain(measured[f"{name}: added"]["adapted"])
            scores[f"{name}, with adapters"] = _by_domain(found["adapted"]) | own
    chance = {domain: _deviation(*rows["test"][domain]) for domain in domains}
    body = [[name, *(f"{found[d]:.4f}" for d in domains)] for name, found in scores.items()]
    body.append(["standard error at chance", *(f"{chance[d]:.4f}" for d in domains)])
    return f"{grid(['rows (positives)', *domains], lines)}\n\n{grid(['AUC', *domains], body)}"


def _by_domain(scores: dict[str, Any]) -> dict[str, float]:
    return {one["domain"]: one["auc"] for one in scores["domains"]}


def _deviation(rows: int, positives: int) -> float:
    """Of the AUC of a score that knows nothing (Mann and Whitney, 1947)."""
    return math.sqrt((rows + 1) / (12 * positives * (rows - positives)))


if __name__ == "__main__":
    main()
