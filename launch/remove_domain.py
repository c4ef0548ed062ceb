"""Take one domain's adapter out of a run; every other file stays as it is.

Example: python -m launch remove-domain runs/movielens_mlora programmer
"""

import argparse
from pathlib import Path

from launch.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("domain")


def run(args: argparse.Namespace) -> None:
    from trainer.run_folder import RunFolder

    config = RunFolder.config(args.run_folder)
    RunFolder(args.run_folder).adapters.remove(config.method.name, args.domain)
    say(f"{args.run_folder}: adapter of {args.domain} removed")
