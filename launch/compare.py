"""Models x settings x seeds of a suite file, as a table of means, deviations and paired tests.

Each cell is a run of `train` in a folder of its own; equal ones are run once. Started again it goes
on where it was; started several times at once, on one file system, the processes share the cells
(--jobs N starts N here, a thread each). What is finished lies in results.json and results.csv.

Example: python -m launch compare launch/suites/mlora_table2.toml --only mlp --seeds 1 2
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_shards import UserError
from launch.progress import say

LOOK = 2.0  # seconds between looks at what the jobs have finished


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the suite's, instead of all")
    parser.add_argument("--only", default="", help="cells whose 'model, setting' contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes of this machine")


def run(args: argparse.Namespace) -> None:
    from launch.comparison import Asked, Comparison
    from launch.group import joined
    from launch.suite import Plan
    from trainer.ranks import FaultsConfig

    if args.jobs < 1 or (args.jobs > 1 and "RANK" in os.environ):
        raise UserError(f"--jobs {args.jobs}: 1 or more, and not under torchrun, which starts them")
    plan = Plan.load(args.suite, args.overrides)
    asked = Asked.of(plan.suite, args.seeds, args.only)
    if os.environ.get("RANK", "0") == "0":
        say(plan.head())
    if args.jobs > 1:
        _jobs(args, plan.suite.folder / "jobs", Comparison(plan, asked).progress)
    # one process may wait for a run of another one
    with joined(FaultsConfig(7 * 86400)) as ranks:
        comparison = Comparison(plan, asked, ranks)
        comparison.run()
        if ranks.first:
            print(comparison.printed())
    comparison.require_all()


def _jobs(args: argparse.Namespace, folder: Path, progress: Callable[[], str]) -> None:
    """This command so many times, each with a thread; what one leaves behind, another goes on with.
    At SIGTERM they save."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["compare", str(args.suite), "--only", args.only]
    words += [word for one in args.overrides for word in ("--set", one)]
    words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    jobs = []
    try:
        for number in range(args.jobs):
            with (folder / f"{number}.log").open("a", encoding="utf-8") as log:
                command = [sys.executable, "-m", "launch", *words]
                jobs.append(subprocess.Popen(command, env=environment, stderr=log, stdout=log))
        say(f"{args.jobs} jobs, which write to {folder}")
        shown = ""
        while any(job.poll() is None for job in jobs):
            if (now := progress()) != shown:
                say(now)
                shown = now
            time.sleep(LOOK)
    finally:
        for job in jobs:
            job.terminate()
        for job in jobs:
            job.wait()
        signal.signal(signal.SIGTERM, before)
