"""Train the adapter of one more domain on a finished run, and prove that no other domain moved.

Example: torchrun --nproc-per-node 2 -m launch add-domain runs/movielens_mlora programmer \
--shards data/shards/movielens-programmer
"""

import argparse
from dataclasses import replace
from pathlib import Path

from data_shards import Index, UserError
from data_shards.errors import unknown


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("domain")
    parser.add_argument("--shards", required=True, help="its rows (write-shards --base)")
    parser.add_argument(
        "--no-own-ids",
        action="store_true",
        help="no rows of its own for ids that the trunk has never seen",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FOLDER",
        help="for metrics and summary, where the run's folder can only be read",
    )


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer.adding import add_domain
    from trainer.log import require_login
    from trainer.run_folder import RunFolder

    config = RunFolder.config(args.run_folder)
    config = replace(config, adapt=replace(config.adapt, own_ids=not args.no_own_ids))
    domains = Index.load(args.shards).domains
    if args.domain not in domains:
        raise UserError(
            f"{args.shards}: {unknown('domain', args.domain, domains)}; write its rows: "
            f"write-shards RUN_FILE --base {args.run_folder} --out FOLDER "
            f"--set 'data.only=[\"{args.domain}\"]' --set 'data.hold_out=[]'"
        )
    require_login(config.tracking)
    with joined(config.faults) as ranks:
        add_domain(config, RunFolder(args.run_folder), args.domain, args.shards, ranks, args.log)
