"""AUC and log loss per domain, of the shared part alone and with adapters.

With --zero-shot DOMAIN: of the shared part on a domain that it has never seen.

Example: torchrun --nproc-per-node 2 -m launch evaluate runs/movielens_mlora --splits valid
"""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--shards", help="a folder or a URL, instead of the run's own")
    parser.add_argument("--splits", nargs="+", help="instead of the run's test splits")
    parser.add_argument("--domains", nargs="+", help="instead of all")
    parser.add_argument("--zero-shot", metavar="DOMAIN", help="a domain that was held out")


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer.evaluate import evaluate_run, zero_shot
    from trainer.report import scores_table, shared_table
    from trainer.run_folder import RunFolder

    config = RunFolder.config(args.run_folder)
    shards = args.shards or config.data.shards
    splits = tuple(args.splits or config.test)
    domains = tuple(args.domains) if args.domains else None
    with joined(config.faults) as ranks:
        folder = RunFolder(args.run_folder)
        if args.zero_shot:
            scores = zero_shot(config, folder, shards, splits, args.zero_shot, ranks)
            if ranks.first:
                print(shared_table(scores.to_dict()))
            return
        shared, adapted = evaluate_run(config, folder, shards, splits, domains, ranks)
        if ranks.first:
            print(scores_table(shared.to_dict(), adapted.to_dict()))
