"""Train on all devices of this machine, or of several: torchrun's agent and its ranks in one word.

The libraries are imported once and the ranks are forked, so a start, or a restart after a lost
rank, takes as long for eight ranks as for one. What would stop a rank is looked for before any is
started. Nodes: as many as --nodes says, each started by a line of its own; a range such as 2:4 lets
them come and go. Kubeflow's and torchrun's PET_* variables stand for the options.

Example: python -m launch run launch/runs/movielens_mlora.toml --ranks 2
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from data_shards import UserError
from data_shards.errors import LostError
from launch.nodes import Nodes, apart, require_rendezvous, waiting
from launch.progress import say
from launch.tie import leave_with
from trainer.preemption import SAVED, STATUS, tell

PORT = 29400
# As in the rules of the job's failure: 2 is a mistake that another start would only repeat.
MISTAKE, FAILED = 2, 1


def arguments(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--ranks",
        default=given("PET_NPROC_PER_NODE", "auto"),
        help="of this node; auto: one a GPU, or as many as its cores and the batch allow",
    )
    parser.add_argument("--nodes", default=given("PET_NNODES", "1"), metavar="N or MIN:MAX")
    parser.add_argument("--node-rank", type=int, default=int(given("PET_NODE_RANK", "0")))
    parser.add_argument("--host", default=given("PET_MASTER_ADDR", ""), help="the first node")
    parser.add_argument("--port", type=int, default=int(given("PET_MASTER_PORT", str(PORT))))
    parser.add_argument(
        "--max-restarts", type=int, default=int(given("PET_MAX_RESTARTS", "0")), metavar="N"
    )
    parser.add_argument(
        "--patience", type=float, default=300.0, metavar="SECONDS", help="for the other nodes"
    )


def run(args: argparse.Namespace) -> None:
    _set_environment()
    nodes = Nodes.parse(args.nodes)
    if nodes.most > 1:  # before seconds of imports
        require_rendezvous(args, nodes)
    from trainer import config as run_files

    config = run_files.load(args.run_file, args.overrides)
    ranks = _ranks(args.ranks, nodes, config.reading)
    _require_writable(config.folder)
    import trainer.schedule  # noqa: F401  (once, and not in every rank)

    overrides = [word for one in args.overrides for word in ("--set", one)]
    _launch(args, nodes, ranks, config.name, ["train", str(args.run_file), *overrides])


def _set_environment() -> None:
    """What ranks of ours need, unless somebody has decided otherwise."""
    # Without it a restart may hang on keys that the ranks before left in torchrun's store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # To count GPUs without opening them: a forked rank could not use an opened one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are of names and retries


def _ranks(asked: str, nodes: Nodes, reading: Any) -> int:
    """Ranks of this node; those of all nodes must divide the batch."""
    import torch

    from data_shards.loader import require_divisible

    gpus, shared = torch.cuda.device_count(), math.gcd(reading.global_batch, reading.lanes)
    if asked.isdecimal() and int(asked) > 0:
        ranks = int(asked)
    elif asked != "auto":
        raise UserError(f"--ranks {asked}: give a number of 1 or more, or auto")
    else:
        ranks = gpus or max(
            count
            for count in range(1, len(os.sched_getaffinity(0)) + 1)
            if count == 1 or all(shared % (count * n) == 0 for n in nodes.counts)
        )
    if 0 < gpus < ranks:
        raise UserError(f"--ranks {ranks}: this node has {gpus} GPUs, and each rank needs its own")
    for count in nodes.counts:
        require_divisible(reading, count * ranks)
    return ranks


def _require_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(
            f"{folder}: {there} cannot be written here, and a run keeps its checkpoints there; "
            "mount it writable, mend its rights, or set another output"
        )


def _launch(args: argparse.Namespace, nodes: Nodes, ranks: int, name: str, verb: list[str]) -> None:
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        SignalException,
        Std,
    )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    # a restart needs a store of its own, which nodes of fixed ranks do not get
    fixed = nodes.most > 1 and not nodes.elastic and not args.max_restarts
    with tempfile.TemporaryDirectory(prefix="banyan-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=nodes.least,
            max_nodes=nodes.most,
            nproc_per_node=ranks,
            run_id=name,
            rdzv_backend="static" if fixed else "c10d",
            rdzv_endpoint=f"{args.host}:{args.port}" if nodes.most > 1 else "127.0.0.1:0",
            rdzv_configs=waiting(args.patience, args.node_rank if fixed else None),
            max_restarts=args.max_restarts,
            start_method="fork",
            log_line_prefix_template=" ",  # none at all would be torch's own
            logs_specs=DefaultLogsSpecs(log_dir=logs, tee=Std.ALL),
        )
        try:
            elastic_launch(config, _rank)(os.getpid(), Path(logs), verb)
        except ChildFailedError as error:
            status = _tell(error.get_first_failure(), Path(logs))
        except SignalException as error:
            status = _agreed(Path(logs), ranks, 128 + error.sigval)
        except (RendezvousError, dist.DistError) as error:
            had_met = any(Path(logs).glob("*/attempt_*"))
            raise LostError(
                f"{args.host}:{args.port}: {apart(error, nodes, args.patience, had_met)}"
            ) from None
        else:
            return
    sys.exit(status)


def _quiet() -> None:
    """What the agent says of a lost rank is said in fewer words by `_tell`."""
    import logging

    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _rank(agent: int, logs: Path, verb: list[str]) -> None:
    """One rank: this process, forked."""
    from launch.__main__ import main

    leave_with(agent)
    signal.signal(signal.SIGTERM, _leave)  # torch's own, which is inherited, raises
    told = logs / f"status-{os.environ['LOCAL_RANK']}"
    told.unlink(missing_ok=True)  # of a start before this one
    os.environ[STATUS] = str(told)
    try:
        status = main(verb)
    except BaseException:
        traceback.print_exc()
        status = FAILED
    tell(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # nothing is left to wait for, least of all the others
        os._exit(status)


def _leave(*unused: object) -> None:
    """Until `preemption.listening`: there is nothing to save yet."""
    tell(SAVED)
    os._exit(SAVED)


def _tell(failure: tuple[int, Any], logs: Path) -> int:
    """The last words of the rank that failed first, then the others'; returns the exit status."""
    rank, first = failure
    how = f"killed by signal {-first.exitcode}" if first.exitcode < 0 else ""
    say(f"rank {rank} stopped the run ({how or f'exit status {first.exitcode}'})")
    found = sorted(logs.glob("*/attempt_*/*/stderr.log"), key=lambda path: path.stat().st_mtime)
    places = {int(path.parent.name): path for path in found}
    for place in sorted(places, key=lambda place: (place != first.local_rank, place)):
        lines = places[place].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        say(f"  rank {rank - first.local_rank + place}: {_message(lines)}")
    return first.exitcode if first.exitcode in (MISTAKE, SAVED) else FAILED


def _agreed(logs: Path, ranks: int, otherwise: int) -> int:
    """The exit status of all ranks of this node, if it is the same: 75 where each has saved."""
    told = [path.read_text(encoding="utf-8") for path in logs.glob("status-*")]
    return int(told[0]) if len(told) == ranks and len(set(told)) == 1 else otherwise


def _message(lines: list[str]) -> str:
    """The last of a rank's lines, which may be JSON (launch/json_lines.py)."""
    if not lines:
        return "not a word"
    return json.loads(lines[-1])["message"] if lines[-1].startswith("{") else lines[-1]
