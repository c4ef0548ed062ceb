"""Say what a shard set, a run's folder or an adapter holds; --verify reads every block.

Example: python -m launch inspect data/shards/movielens-occupation --verify
"""

import argparse
import json
from pathlib import Path

from data_shards import Index, ShardReader, UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)
    parser.add_argument("--verify", action="store_true", help="check every block's SHA-256")


def run(args: argparse.Namespace) -> None:
    for name, show in KINDS.items():
        if (args.path / name).exists():
            show(args.path, args.verify)
            return
    raise UserError(
        f"{args.path}: neither a shard set, a run's folder, a checkpoint nor an adapter "
        f"(none of {', '.join(KINDS)} is in it)"
    )


def _shard_set(path: Path, verify: bool) -> None:
    index = Index.load(path)
    counts = index.counts()
    print(
        f"shard set {path}: {index.rows:,} rows, {len(index.blocks):,} blocks, "
        f"{len(index.shards)} shards, fingerprint {index.fingerprint[:12]}"
    )
    for field in index.schema.fields:
        rows = index.vocabulary.sizes.get(field.name)
        size = f", {rows:,} table rows" if rows else ""
        print(f"  {field.name}: {field.kind} ({field.side}){size}")
    for domain in index.domains:
        print(f"  {domain}: " + ", ".join(f"{s} {counts[domain, s]:,}" for s in index.splits))
    for reason, dropped in index.dropped.items():
        print(f"  dropped: {dropped:,} {reason}")
    if verify:
        reader = ShardReader(path, index)
        for block in index.blocks:
            reader.read(block)
        print(f"  {len(index.blocks):,} blocks verified")


def _run_folder(path: Path, verify: bool) -> None:
    from trainer.run_folder import RunFolder

    config = RunFolder.config(path)
    folder = RunFolder(path)
    print(f"run {config.name}: {config.method.name} on {config.backbone.name}, seed {config.seed}")
    values = folder.trunk_values()
    print(f"  trunk: domains {', '.join(values['domains'])}")
    for domain in folder.adapters.domains(config.method.name):
        digest = folder.adapters.digest(config.method.name, domain)
        print(f"  adapter {domain}: {digest[:12]}")


def _json(name: str):  # noqa: ANN202
    def show(path: Path, verify: bool) -> None:
        print(json.dumps(json.loads((path / name).read_text(encoding="utf-8")), indent=1))

    return show


KINDS = {
    "index.json": _shard_set,
    "run.toml": _run_folder,
    "adapter.json": _json("adapter.json"),
    "manifest.json": _json("state.json"),
}
