"""Encode the texts of a shard set once, as the run file's [text] and [encoder] sections say.

Under torchrun all ranks share the work. Started again after it was stopped, it goes on. Texts of
another shard set whose vectors lie beside, made the same way, are taken from there.

Example: torchrun --nproc-per-node 2 -m launch cache-text launch/runs/movielens_ufin.toml
"""

import argparse
from pathlib import Path

from launch.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run file, or a run's folder")
    parser.add_argument("--shards", help="a folder or a URL, instead of the run's own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer import config as run_files
    from trainer import heartbeat
    from trainer.ranks import FaultsConfig
    from trainer.run_folder import RUN_FILE
    from trainer.text_build import build

    path = args.run / RUN_FILE if args.run.is_dir() else args.run
    config = run_files.load(path, args.overrides)
    # the first rank alone puts all rows into words, and that may take days
    with joined(FaultsConfig(7 * 86400, config.faults.grace_seconds)) as ranks:
        heartbeat.at("text cache")
        tell = say if ranks.first else lambda text: None
        built = build(config, args.shards or config.data.shards, ranks, tell)
        texts = ", ".join(f"{name} {count:,}" for name, count in built.texts.items())
        tell(
            f"{built.folder}: {built.rows:,} rows, distinct texts: {texts}; {built.encoded:,} "
            f"encoded now, {built.cut:,} of them cut at {config.encoder.max_tokens} tokens; "
            f"{built.taken:,} taken from other shard sets' folders; "
            f"{built.bytes / 1e6:,.1f} MB, {built.seconds:.1f} s"
        )
