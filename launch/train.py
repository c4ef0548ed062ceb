"""Pretrain the shared part, then adapt every domain; continues a run that was cut off.

Example: torchrun --nproc-per-node 2 -m launch train launch/runs/movielens_mlora.toml
"""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer import config as run_files
    from trainer.schedule import train

    config = run_files.load(args.run_file, args.overrides)
    with joined(config.faults) as ranks:
        train(config, ranks)
