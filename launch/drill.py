"""Kill ranks and agents of a run at random, and compare what it ends with.

First the run is left alone, then it is run again in rounds: in each, ranks die at random moments
and places (in a step between tables and dense part, at the n-th file operation of a save, reading
shards, evaluating) and torchrun itself is killed and started again; some get SIGTERM, which leaves
them time to save. In the end a round must have the trunk, the adapters and the scores of the run
that was left alone, to the bit, and have seen each row as often. A seed gives the same kinds and
places again.

Example: python -m launch drill launch/runs/movielens_mlora.toml --rounds 3 --seed 1 --ranks 2
"""

import argparse
import random
import statistics
from pathlib import Path

from data_shards import UserError
from launch.drilled import Death
from launch.progress import say

KINDS = ("time", "step", "save", "read", "evaluation")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--deaths", type=int, default=3, help="at most, in a round")
    parser.add_argument("--out", type=Path, help="an empty folder; default: OUTPUT/NAME-drill")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run(args: argparse.Namespace) -> None:
    from launch.drill_round import Round, compared
    from trainer import config as run_files

    if min(args.rounds, args.ranks, args.deaths) < 1:
        raise UserError("--rounds, --ranks and --deaths are 1 or more")
    config = run_files.load(args.run_file, args.overrides)
    out = args.out or Path(config.output) / f"{config.name}-drill"
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds a drill already; set another --out, or delete the folder")
    changes = [*args.overrides, "tracking.wandb=disabled", "tracking.pictures=false"]
    say("the run left alone")
    whole = Round(args.run_file, changes, out / "whole", args.ranks, [])
    whole.play()
    table = []
    for number in range(args.rounds):
        chance = random.Random(f"{args.seed}/{number}")
        deaths = drawn(chance, args.deaths, whole.counts(), whole.seconds)
        one = Round(args.run_file, changes, out / f"round-{number}", args.ranks, deaths)
        one.play()
        table.append(compared(whole, one))
        say(f"round {number + 1} of {args.rounds}: {table[-1]}")
    say(summary([round.to_dict() for round in table]))
    if not all(round.survived for round in table):
        raise UserError(f"a round did not end as the run left alone; see {out}")
    if not any(round.deaths for round in table):
        raise UserError(f"{out}: nobody died; give more --rounds, or another --seed")


def drawn(
    chance: random.Random, most: int, counts: list[dict[str, int]], seconds: float
) -> list[Death]:
    """One to `most` deaths, one for each start. `counts` of what each rank does if it is left
    alone, and how long that takes."""
    deaths = []
    for start in range(chance.randint(1, most)):
        rank = chance.randrange(len(counts))
        events = {**counts[rank], "time": round(seconds * 1000)}
        kind = chance.choice([kind for kind in KINDS if events.get(kind)])
        # a later start has less to do
        number = chance.randint(1, max(events[kind] // (start + 1), 1))
        agent, told = chance.random() < 0.25, chance.random() < 0.25
        deaths.append(Death(kind, number, rank, agent, told))
    return deaths


def summary(rounds: list[dict]) -> str:
    """The last lines of a drill. A round in which nobody died counts for nothing."""
    rounds = [one for one in rounds if one["deaths"]]
    waits = sorted(wait for one in rounds for wait in one["seconds"])
    survived = sum(one["survived"] for one in rounds)
    shown = f"{statistics.median(waits):.1f} median, {waits[-1]:.1f} worst" if waits else "none"
    return "\n".join(
        (
            f"rounds survived        {survived} of {len(rounds)}",
            f"deaths                 {sum(one['deaths'] for one in rounds)}",
            f"rows lost or repeated  {sum(one['lost'] + one['repeated'] for one in rounds)}",
            f"seconds from a death to the first new step: {shown}",
        )
    )
