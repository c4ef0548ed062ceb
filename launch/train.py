"""Pretrain the shared part, then adapt every domain; continues a run that was cut off.

Example: torchrun --nproc-per-node 2 -m launch train launch/runs/movielens_mlora.toml
"""

import argparse
from pathlib import Path

from launch.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer import config as run_files
    from trainer.log import require_login
    from trainer.schedule import train

    config = run_files.load(args.run_file, args.overrides)
    require_login(config.tracking)
    with joined(config.faults) as ranks:
        train(config, ranks)
        if ranks.first and config.tracking.pictures:
            _report(config.folder)


def _report(folder: Path) -> None:
    """A page beside the pictures. What fails is told, and raises nothing: the run is done."""
    from launch import report

    try:
        say(f"report: {report.write(report.page_of(folder), folder)}")
    except Exception as error:  # a finished run must not be lost for a page
        say(f"report: not written: {error}; python -m launch report {folder} tries again")
