"""What a run needs of so many ranks, without any: tables' places, bytes, traffic, speed, and fit.

Sizes of tables come from the shards, where they are written; --rows stands for those that are not.
The speed is what device and network allow at best. Where it does not fit, the first that would help
is named: a higher ZeRO stage, tables cut by rows, an optimizer with less state, more ranks.

Example: python -m launch plan launch/runs/movielens_mlora.toml --ranks 8 --memory 80 \
--rows user=6041 --rows movie=3884 --rows genres=20
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards import Index, UserError

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.footprint import Dense, Footprint

RESERVE = 0.1
"""Of a rank's memory, for the libraries and for what lies between tensors."""
MOST_RANKS = 4096
GIB = 1 << 30


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True, help="of a rank, in GiB")
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--domains", type=int, help="how many, where the shards do not say it")
    parser.add_argument(
        "--rows", action="append", default=[], metavar="FIELD=N", help="of a table, such as 1e9"
    )
    parser.add_argument("--brief", action="store_true", help="one line")


def run(args: argparse.Namespace) -> None:
    from trainer import config as run_files
    from trainer.footprint import dense_part, require_rows

    if args.ranks < 1 or args.per_node < 1 or args.memory <= 0:
        raise UserError("plan: --ranks, --per-node and --memory are more than 0")
    config = run_files.load(args.run_file, args.overrides)
    rows, domains = _sizes(config, args)
    require_rows(config, rows)
    dense = dense_part(config, domains, args.device)
    found = _footprint(config, rows, dense, args, args.ranks)
    room = int(args.memory * GIB * (1 - RESERVE))
    if args.brief:
        print(_line(found, args.ranks, room))
        return
    print(_told(config, found, dense, rows, args))
    if found.total > room:
        print(f"does not fit: {_gib(found.total)} of {_gib(room)}; {_largest(found)}")
        print(_way_out(config, rows, dense, args, room))


def _sizes(config: "RunConfig", args: argparse.Namespace) -> tuple[dict[str, int], int]:
    """Rows of each table, and how many domains there are."""
    rows, domains = {}, args.domains or 1
    try:
        index = Index.load(config.data.shards)
        rows, domains = dict(index.vocabulary.sizes), args.domains or len(index.domains)
    except UserError:  # not written yet
        for field in config.data.schema.ids:
            if field.buckets:
                rows[field.name] = field.buckets + 1
    known = [field.name for field in config.data.schema.ids]
    for given in args.rows:
        name, _, count = given.partition("=")
        try:
            rows[name] = int(float(count))
        except ValueError:
            raise UserError(f"--rows {given}: write it as FIELD=NUMBER, such as user=1e9") from None
        if name not in known:
            raise UserError(f"--rows {given}: there is no id field {name!r}, but {known}")
    return rows, domains


def _footprint(
    config: "RunConfig", rows: dict[str, int], dense: "Dense", args: Any, ranks: int
) -> "Footprint":
    from embeddings import Place
    from trainer.footprint import footprint

    place = Place(args.device, ranks, min(args.per_node, ranks))
    return footprint(config, rows, dense, place)


def _told(
    config: "RunConfig",
    found: "Footprint",
    dense: "Dense",
    rows: dict[str, int],
    args: argparse.Namespace,
) -> str:
    lines = [
        f"{config.name} on {args.ranks} ranks of {args.memory:g} GiB, {args.per_node} a node",
        "",
        *_tables(found, rows),
        "",
        f"dense: {dense.trained:,} trained parameters, {dense.frozen:,} frozen",
        "bytes of the fullest rank",
        *(f"  {name:<18} {_gib(size):>12}" for name, size in found.memory.items()),
        f"  {'in all':<18} {_gib(found.total):>12}",
        "bytes that a rank sends in a step",
        *(f"  {name:<28} {size:>16,}" for name, size in found.wire.items()),
        "seconds of a step, at full rates",
        *(f"  {name:<18} {seconds:>12.6f}" for name, seconds in found.seconds.items()),
        f"at most {found.rows_a_second:,.0f} rows/s",
    ]
    return "\n".join(lines)


def _tables(found: "Footprint", rows: dict[str, int]) -> Iterator[str]:
    for table in dict.fromkeys(part.table for part in found.parts):
        parts = [part for part in found.parts if part.table == table]
        ranks = sorted({part.rank for part in parts})
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks from {ranks[0]}"
        largest = max(parts, key=lambda part: part.rows * part.cols)
        size = f"{largest.rows:,} x {largest.cols}"
        yield f"table {table}: {rows[table]:,} rows on {where}, {size} each"


def _line(found: "Footprint", ranks: int, room: int) -> str:
    """For a table over numbers of ranks."""
    cells = [f"{ranks}", _gib(found.memory["tables"] + found.memory["tables' optimizer"])]
    dense = sum(size for name, size in found.memory.items() if name.startswith("dense"))
    cells += [_gib(dense), _gib(found.memory["activations"]), _gib(found.total)]
    cells += [f"{sum(found.wire.values()) / 1e6:,.1f} MB", f"{found.rows_a_second:,.0f}"]
    return "| " + " | ".join([*cells, "yes" if found.total <= room else "no"]) + " |"


def _largest(found: "Footprint") -> str:
    name = max(found.memory, key=lambda one: found.memory[one])
    return f"most of it is {name}, {_gib(found.memory[name])}"


def _way_out(
    config: "RunConfig", rows: dict[str, int], dense: "Dense", args: argparse.Namespace, room: int
) -> str:
    """The first change that makes it fit, else several together, else more ranks."""

    def total(changed: "RunConfig", ranks: int = args.ranks) -> int:
        return _footprint(changed, rows, dense, args, ranks).total

    together, named = config, list[str]()
    for what, change in _changes(config):
        if total(change(config)) <= room:
            return f"would fit with {what}"
        if total(change(together)) < total(together):
            together, named = change(together), [*named, what]
        if total(together) <= room:
            return f"would fit with {', '.join(named)}"
    for changed, changes in ((config, []), (together, named)):
        ranks = args.ranks
        while (ranks := 2 * ranks) <= MOST_RANKS and _divides(config, ranks):
            if total(changed, ranks) <= room:
                return f"would fit with {', '.join([f'--ranks {ranks}', *changes])}"
    tried = ", ".join(named) or "any change here"
    return (
        f"would not fit with {tried}, nor on more ranks that divide the batch; take ranks with "
        "more memory, narrower tables, or a batch that more ranks divide"
    )


def _divides(config: "RunConfig", ranks: int) -> bool:
    return not (config.reading.global_batch % ranks or config.reading.lanes % ranks)


def _changes(
    config: "RunConfig",
) -> Iterator[tuple[str, Callable[["RunConfig"], "RunConfig"]]]:
    """Ways to need less that this run has not taken yet."""

    def engine(stage: int) -> Callable[["RunConfig"], "RunConfig"]:
        return lambda run: replace(run, engine=replace(run.engine, zero_stage=stage))

    def tables(**changes: Any) -> Callable[["RunConfig"], "RunConfig"]:
        return lambda run: replace(run, tables=replace(run.tables, **changes))

    for stage in (1, 2, 3):
        if stage > config.engine.zero_stage and not (stage == 3 and config.encoder.cache_gb):
            yield f"engine.zero_stage={stage}", engine(stage)
    if config.tables.sharding != "row_wise":
        yield 'tables.sharding="row_wise"', tables(sharding="row_wise", pinned={})
    if config.tables.optimizer == "adam" and not config.tables.weight_decay:
        less = tables(optimizer="rowwise_adagrad", sharding="row_wise", pinned={})
        yield 'tables.optimizer="rowwise_adagrad", sharded row_wise', less


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
