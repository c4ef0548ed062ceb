"""AUC and log loss per domain, of the shared part alone and with adapters.

Example: torchrun --nproc-per-node 2 -m launch evaluate runs/movielens_mlora --splits valid
"""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--shards", help="a folder or a URL, instead of the run's own")
    parser.add_argument("--splits", nargs="+", help="instead of the run's test splits")
    parser.add_argument("--domains", nargs="+", help="instead of all")


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer.report import scores_table
    from trainer.run_folder import RunFolder
    from trainer.schedule import evaluate_run

    config = RunFolder.config(args.run_folder)
    shards = args.shards or config.data.shards
    splits = tuple(args.splits or config.test)
    domains = tuple(args.domains) if args.domains else None
    with joined() as ranks:
        folder = RunFolder(args.run_folder)
        shared, adapted = evaluate_run(config, folder, shards, splits, domains, ranks)
        if ranks.first:
            print(scores_table(shared.to_dict(), adapted.to_dict()))
