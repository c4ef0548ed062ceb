"""Say what a shard set, a run's folder or an adapter holds; --verify reads every block.

Example: python -m launch inspect data/shards/movielens-occupation --verify
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_shards import Index, Location, ShardReader, UserError
from data_shards import verify as check_set
from data_shards.sources.planted import Best, best_scores
from launch.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a folder, or the URL of a shard set")
    parser.add_argument("--verify", action="store_true", help="check every block's SHA-256")
    parser.add_argument(
        "--best", metavar="SPLIT", help="of planted rows: the best scores that a model can expect"
    )


def run(args: argparse.Namespace) -> None:
    if "://" in args.path:
        return _shard_set(args.path, args)
    path = Path(args.path)
    for name, show in KINDS.items():
        if (path / name).exists():
            return show(path, args)
    raise UserError(
        f"{path}: neither a shard set, a run's folder, a checkpoint nor an adapter "
        f"(none of {', '.join(KINDS)} is in it)"
    )


def _shard_set(path: Location, args: argparse.Namespace) -> None:
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
    if args.verify:
        report = check_set(path, say)
        report.require_sound()
        print(f"  {report.blocks:,} blocks verified, {report.rows:,} rows")
        for name, (mean, longest) in report.tokens.items():
            print(f"  {name}: {mean:.1f} tokens a row, at most {longest:,}")
    if args.best:
        _best(path, index, args.best)


def _best(path: Location, index: Index, split: str) -> None:
    from trainer.report import grid

    reader, rows = ShardReader(path, index), []
    for domain in index.domains:
        tables = [reader.read(block) for block in index.select((split,), (domain,))]
        if any("probability" not in table.column_names for table in tables):
            raise UserError(f"{path}: its rows carry no true click rate; those of `planted` do")
        rate = np.concatenate([table["probability"].to_numpy() for table in tables or [_NO_RATE]])
        best = best_scores(rate) if len(rate) else Best(float("nan"), None)
        auc = "undefined" if best.auc is None else f"{best.auc:.4f}"
        rows.append([domain, f"{len(rate):,}", auc, f"{best.log_loss:.4f}"])
    print(grid(["domain", f"{split} rows", "best AUC", "best log loss"], rows))


_NO_RATE = pa.table({"probability": pa.array([], pa.float32())})


def _run_folder(path: Path, args: argparse.Namespace) -> None:
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
    def show(path: Path, args: argparse.Namespace) -> None:
        print(json.dumps(json.loads((path / name).read_text(encoding="utf-8")), indent=1))

    return show


KINDS = {
    "index.json": _shard_set,
    "run.toml": _run_folder,
    "adapter.json": _json("adapter.json"),
    "manifest.json": _json("state.json"),
}
