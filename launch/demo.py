"""The whole path on MovieLens-1M: fetch, shards, two phases, a domain added, one table.

Each step is a command that is printed before it runs, so that it can be repeated alone.

Example: python -m launch demo --data path/to/ml-1m.zip
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_shards import UserError
from launch.fetch import fetch_movielens
from launch.progress import say

RUN_FILE = "launch/runs/movielens_mlora.toml"
DOMAIN = "programmer"
SHARDS, RUN = Path("data/shards"), Path("runs/movielens_mlora")
RANKS = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a copy of ml-1m.zip to take instead")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    path = f"data.source.path={json.dumps(str(fetch_movielens(Path('data'), args.data)))}"
    _write(SHARDS / "movielens-occupation", path)
    _train("the trunk on 20 domains, then 20 adapters", RUN, path)

    only = [f'data.only=["{DOMAIN}"]', "data.hold_out=[]"]
    _write(SHARDS / f"movielens-{DOMAIN}", path, *only, base=RUN)
    added = {
        "trunk + low-rank": _add("low-rank matrices only", "--no-own-ids"),
        "trunk + low-rank + own ids": _add("and rows for its own ids"),
    }

    alone, retrained = SHARDS / f"movielens-{DOMAIN}-alone", SHARDS / "movielens-all"
    _write(alone, path, *only)
    _write(retrained, path, "data.hold_out=[]")
    phase = 'phases=["pretrain"]'
    others = {
        "trained alone": _train(
            "that domain alone",
            Path(f"runs/{DOMAIN}_alone"),
            path,
            phase,
            f'data.shards="{alone}"',
            *only,
        ),
        "trunk retrained with it": _train(
            "the trunk again, with it",
            Path("runs/retrained"),
            path,
            phase,
            f'data.shards="{retrained}"',
            "data.hold_out=[]",
        ),
    }
    print(f"\n{_summary_of_trunk()}\n\n{_comparison(added, others)}")
    print(f"\nrun folder: {RUN} (resolved run file, checkpoints, adapters, metrics.jsonl, wandb)")
    print(f"whole demo: {time.monotonic() - started:.0f} s")


def _write(out: Path, *overrides: str, base: Path | None = None) -> None:
    if out.exists():
        say(f"{out}: there already")
        return
    extra = ["--base", str(base)] if base else []
    _call(
        [sys.executable, "-m", "launch", "write-shards", RUN_FILE, "--out", str(out), *extra],
        overrides,
    )


def _train(what: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train into `folder` unless it holds a finished run."""
    summary = folder / "summary.json"
    if summary.exists():
        say(f"{folder}: finished already")
    else:
        say(f"\n== {what}")
        _call([*_torchrun(), "train", RUN_FILE], (f"name={folder.name}", *overrides))
    return json.loads(summary.read_text(encoding="utf-8"))


def _add(what: str, *flags: str) -> dict[str, Any]:
    """Add the held-back domain, in place of an earlier try."""
    say(f"\n== {DOMAIN} is added: {what}")
    if (RUN / "adapters" / "mlora" / DOMAIN).exists():
        _call([sys.executable, "-m", "launch", "remove-domain", str(RUN), DOMAIN])
    shards = str(SHARDS / f"movielens-{DOMAIN}")
    _call([*_torchrun(), "add-domain", str(RUN), DOMAIN, "--shards", shards, *flags])
    return json.loads((RUN / "added" / f"{DOMAIN}.json").read_text(encoding="utf-8"))


def _torchrun() -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    return [*run, "-m", "launch"]


def _call(command: list[str], overrides: tuple[str, ...] = ()) -> None:
    full = [*command, *(part for pair in overrides for part in ("--set", pair))]
    say("$ " + shlex.join(["python", *full[1:]]))
    threads = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if subprocess.run(full, env={**os.environ, **threads}, check=False).returncode:
        raise UserError(f"the step above failed: {shlex.join(full[2:])}")


def _summary_of_trunk() -> str:
    from trainer.report import final_table

    return final_table(json.loads((RUN / "summary.json").read_text(encoding="utf-8")))


def _comparison(added: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> str:
    from trainer.report import grid

    def domain_score(scores: dict[str, Any]) -> dict[str, Any]:
        return next(s for s in scores["domains"] if s["domain"] == DOMAIN)

    first = next(iter(added.values()))
    rows = [("trunk alone", domain_score(first["shared"]), 0.0)]
    rows += [(name, domain_score(s["adapted"]), s["seconds"]) for name, s in added.items()]
    rows += [(n, domain_score(s["shared"]), s["pretrain_seconds"]) for n, s in others.items()]
    cells = [
        [name, f"{score['auc']:.4f}", f"{score['log_loss']:.4f}", f"{seconds:.1f}"]
        for name, score, seconds in rows
    ]
    head = [f"{DOMAIN}, {rows[0][1]['rows']:,} test rows", "AUC", "log loss", "seconds"]
    moved = [name for summary in added.values() for name in summary["moved"]]
    proof = f"MOVED: {', '.join(moved)}" if moved else "bit-equal before and after"
    return f"{grid(head, cells)}\ntrunk, other adapters and all their predictions: {proof}"
