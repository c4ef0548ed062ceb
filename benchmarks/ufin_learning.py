"""UFIN's tables on MovieLens-1M and four Amazon domains, over seeds, beside EulerNet (the paper's
Tables III and IV at the size that fits here, with MiniLM in the place of FLAN-T5).

    python -m benchmarks.ufin_learning

UFIN_t is the shared part, which reads texts and the user's id; UFIN_t+f has a feature adaptor
beside it. Of Amazon, `office` is held out: scored by the shared part, then added. What is in the
results is not measured again, so that a run which was cut off can go on.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measured import Measured
from data_shards import Index, open_source, write_shards
from models import MLoRAConfig
from trainer import config as run_files
from trainer import ranks as groups
from trainer.adding import add_domain
from trainer.config import RunConfig
from trainer.evaluate import evaluate, zero_shot
from trainer.log import RunLog
from trainer.metrics import Scores
from trainer.model import trunk_alone
from trainer.pretrain import pretrain
from trainer.ranks import Ranks
from trainer.report import grid
from trainer.run_folder import RunFolder
from trainer.schedule import train
from trainer.text_build import build
from trainer.trunk import new_trunk

ROOT = Path(__file__).parents[1]
RUN_FILES = ROOT / "launch" / "runs"
RESULTS = ROOT / "benchmarks" / "results" / "ufin_learning.json"
NEW = "office"
NO_TEACHER = ["method.distill=0"]
COMMON = [
    "teacher.patience=2",
    "pretrain.patience=2",
    "adapt.patience=2",
    "tracking.wandb=disabled",
    "tracking.pictures=false",
    "keep_checkpoints=1",
]


class Study:
    """Runs of one seed, all on the same shards."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, seed: int) -> None:
        self.args, self.ranks, self.seed = args, ranks, seed
        self.amazon, self.new = args.out / "shards-amazon", args.out / "shards-office"
        self.movies, self.own = args.out / "shards-movielens", args.out / "shards-office-alone"

    def run(self, file: str, shards: Path, name: str, *overrides: str) -> RunConfig:
        own = [
            f'name="{name}-{self.seed}"',
            f'output="{self.args.out}"',
            f'data.shards="{shards}"',
            f"seed={self.seed}",
            f"reading.seed={self.seed}",
        ]
        return run_files.load(RUN_FILES / file, [*COMMON, *own, *overrides])

    def on_movies(self, name: str, *overrides: str) -> RunConfig:
        return self.run("movielens_ufin.toml", self.movies, name, *overrides)

    def on_amazon(self, name: str, *overrides: str) -> RunConfig:
        return self.run("amazon_ufin.toml", self.amazon, name, *overrides)

    def measure(self, results: Measured) -> None:
        """Seed by seed, the cheap ones first."""
        once = partial(self._once, results)
        amazon, movies = self.on_amazon("amazon"), self.on_movies("movies")
        once("movies, EulerNet", partial(train, without_text(self.on_movies("euler")), self.ranks))
        for domain in Index.load(self.amazon).domains:
            once(f"amazon, EulerNet of {domain}", partial(self.alone, domain, self.amazon))
        once(f"amazon, EulerNet of {NEW}", partial(self.alone, NEW, self.own))
        mixed = without_text(self.on_amazon("amazon-euler"))
        once("amazon, EulerNet mixed", partial(train, mixed, self.ranks))
        once("amazon, EulerNet mixed: zero-shot", partial(self.zero, mixed))
        once("movies, UFIN", partial(train, movies, self.ranks))
        plain = without_teacher(self.on_movies("movies-plain", *NO_TEACHER))
        once("movies, UFIN without teacher", partial(train, plain, self.ranks))
        once("amazon, UFIN", partial(train, amazon, self.ranks))
        once("amazon, UFIN: zero-shot", partial(self.zero, amazon))
        once("amazon, UFIN: added", partial(self.added, amazon))
        after = self.on_movies("movies-after-amazon", f'start_from="{amazon.folder}"')
        once("movies, UFIN after amazon", partial(train, after, self.ranks))

    def _once(self, results: Measured, key: str, act: Callable[[], dict[str, Any]]) -> None:
        if self.args.only in key:
            results.once(f"{key}, seed {self.seed}", act)

    def alone(self, domain: str, shards: Path) -> dict[str, Any]:
        """An EulerNet on the rows of one domain."""
        slug = f"amazon-euler-{domain}"
        run = without_text(self.run("amazon_ufin.toml", shards, slug))
        trunk = new_trunk(run, self.ranks, Index.load(shards))
        log = RunLog(self.ranks.first, run.folder, run.tracking, run.name)
        pretrain(trunk, shards, run.folder / "checkpoints", log, domains=(domain,))
        log.close()
        return self.scored(
            evaluate(trunk_alone(trunk), trunk.loader(shards, run.test, (domain,)), self.ranks)
        )

    def zero(self, run: RunConfig) -> dict[str, Any]:
        folder = RunFolder(run.folder)
        return self.scored(zero_shot(run, folder, str(self.new), run.test, NEW, self.ranks))

    def added(self, run: RunConfig) -> dict[str, Any]:
        """With rows for its own ids, as the verb has it: here no id is any other domain's."""
        own = replace(run, adapt=replace(run.adapt, own_ids=True))
        return add_domain(own, RunFolder(run.folder), NEW, str(self.new), self.ranks)

    def scored(self, scores: Scores) -> dict[str, Any]:
        return {"shared": scores.to_dict(), "adapted": None}

    def write(self) -> None:
        """Shards and text vectors, unless they are there."""
        movies, amazon = self.on_movies("rows"), self.on_amazon("rows")
        if self.ranks.first:
            _write(movies, self.movies, hold_out=())
            _write(amazon, self.amazon, hold_out=amazon.data.hold_out)
            _write(amazon, self.own, only_domains=(NEW,))
            base = Index.load(self.amazon).load_vocabulary(self.amazon)
            _write(amazon, self.new, only_domains=(NEW,), base=base)
        self.ranks.broadcast(None)
        for run, shards in ((movies, self.movies), (amazon, self.amazon), (amazon, self.new)):
            build(run, shards, self.ranks, print)


def _write(run: RunConfig, shards: Path, **chosen: Any) -> None:
    """`chosen`: the rows, as `write_shards` takes them."""
    data = run.data
    if not shards.exists():
        source = open_source(data.source, data.raw.fields)
        write_shards(source, data.schema, data.split, shards, **chosen)


def without_text(run: RunConfig) -> RunConfig:
    """EulerNet over the same fields, trained as a teacher is."""
    assert run.teacher is not None
    return replace(
        run,
        method=MLoRAConfig(),
        backbone=run.teacher.backbone,
        text=None,
        teacher=None,
        phases=("pretrain",),
    )


def without_teacher(run: RunConfig) -> RunConfig:
    return replace(run, teacher=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", default="", help="what a measurement's name contains")
    parser.add_argument("--out", type=Path, default=Path("runs/ufin_learning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks = groups.start()
    results = Measured(args.results, ranks, {"ranks": ranks.world})
    for seed in args.seeds:
        study = Study(args, ranks, seed)
        study.write()
        study.measure(results)
    groups.stop()
    if ranks.first:
        print(table(results.found))


def table(found: dict[str, Any]) -> str:
    """Test AUC and log loss by domain: mean over seeds, and their number."""
    cells: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for key, one in found.items():
        name, _, _ = key.rpartition(", seed ")
        for part in ("shared", "adapted"):
            for scores in one[part]["domains"] if one[part] else ():
                cell = cells.setdefault((f"{name}, {part}", scores["domain"]), [])
                cell.append((scores["auc"], scores["log_loss"]))
    body = []
    for (name, domain), values in cells.items():
        aucs, losses = zip(*values, strict=True)
        spread = f"{statistics.stdev(aucs):.4f}" if len(aucs) > 1 else "-"
        mean = f"{statistics.mean(aucs):.4f}"
        body.append([name, domain, mean, spread, f"{statistics.mean(losses):.4f}", str(len(aucs))])
    return grid(["model, part", "domain", "AUC", "sd", "log loss", "seeds"], body)


if __name__ == "__main__":
    main()
