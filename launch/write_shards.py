"""Write raw rows as shards, as the run file's [data] section says.

With --base the ids of a finished run's trunk are kept, and ids new in these rows become rows that
only the added domains own.

Example: python -m launch write-shards launch/runs/movielens_mlora.toml
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards import Index, Part, Vocabulary, open_source, write_shards
from data_shards.prompted import Prompter
from launch.progress import say

if TYPE_CHECKING:
    from trainer.config import RunConfig

WHOLE = Part()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--base", type=Path, metavar="RUN_FOLDER", help="keep this run's ids")
    parser.add_argument("--out", type=Path, help="instead of data.shards")
    parser.add_argument("--jobs", type=int, default=1, help="processes of this machine")
    parser.add_argument(
        "--part",
        type=_part,
        default=WHOLE,
        metavar="I/N",
        help="this machine's share, of N that write into one folder at the same time (I from 0)",
    )


def _part(text: str) -> Part:
    number, _, of = text.partition("/")
    try:
        return Part(int(number), int(of))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/4 ({error})") from None


def _vocabulary(run: Path, prompter: Prompter | None) -> Vocabulary:
    # torch comes with it: not before the run file is read
    from trainer.prompting import require_same_prompts
    from trainer.run_folder import RunFolder

    require_same_prompts(prompter, RunFolder(run).trunk_values()["prompts"], str(run))
    return RunFolder(run).load_vocabulary()


def run(args: argparse.Namespace) -> None:
    from trainer import config as run_files
    from trainer.prompting import prompter_of

    config = run_files.load(args.run_file, args.overrides)
    out = args.out or Path(config.data.shards)
    base = _vocabulary(args.base, prompter_of(config)) if args.base else None
    start = time.monotonic()
    index = write(config, out, base, args.jobs, args.part)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in index.dropped.items()) or "none"
    say(
        f"{out}: {index.rows:,} rows of {len(index.domains)} domains, dropped: {dropped}; "
        f"{time.monotonic() - start:.1f} s"
    )


def write(
    config: "RunConfig",
    out: Path,
    base: Vocabulary | None = None,
    jobs: int = 1,
    part: Part = WHOLE,
) -> Index:
    """The shard set that a run file's [data] section describes, in the new folder `out`."""
    from trainer.prompting import prompter_of

    data = config.data
    return write_shards(
        open_source(data.source, data.raw.fields),
        data.schema,
        data.split,
        out,
        block_rows=data.block_rows,
        shard_bytes=data.shard_bytes,
        only_domains=data.only,
        hold_out=data.hold_out,
        base=base,
        prompter=prompter_of(config),
        jobs=jobs,
        part=part,
        progress=say,
    )
