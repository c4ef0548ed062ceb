"""`python -m launch VERB`, installed as `banyan`; under torchrun for the verbs that train."""

import argparse
import errno
import logging
import os
import sys
import warnings

from data_shards.errors import LostError, UserError
from launch import (
    add_domain,
    cache_text,
    compare,
    demo,
    drill,
    evaluate,
    export,
    fetch,
    inspect,
    json_lines,
    plan,
    predict,
    remove_domain,
    report,
    run,
    train,
    tune,
    write_shards,
)
from trainer.preemption import SAVED, PreemptedError

VERBS = {
    "fetch": fetch,
    "write-shards": write_shards,
    "cache-text": cache_text,
    "run": run,
    "train": train,
    "add-domain": add_domain,
    "remove-domain": remove_domain,
    "evaluate": evaluate,
    "compare": compare,
    "predict": predict,
    "export": export,
    "inspect": inspect,
    "tune": tune,
    "report": report,
    "plan": plan,
    "demo": demo,
    "drill": drill,
}
LOST = 1  # unlike a mistake (2), which another start would only repeat
# What a disk answers that takes no more, or not from us.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; a user's mistake is one line on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    _quiet()
    try:
        VERBS[args.verb].run(args)
    except LostError as error:
        _mistake(str(error))
        return LOST
    except UserError as error:
        return _mistake(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _mistake(
            f"{where}could not be written ({error.strerror}); give it room or rights and start "
            "the same command again: what was saved before is whole"
        )
    except PreemptedError as stopped:
        print(f"stopped by SIGTERM: {stopped}", file=sys.stderr, flush=True)
        return SAVED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _mistake(text: str) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"error{where}: {text}", file=sys.stderr, flush=True)
    return 2


def _quiet() -> None:
    """Libraries' notes on their own set-up and next versions are not for our user."""
    warnings.filterwarnings("ignore")
    for name in ("torchrec", "torch.fx", "torch.distributed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="banyan", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        text, example = (module.__doc__ or "").split("Example:")
        verb = verbs.add_parser(
            name,
            help=text.strip().splitlines()[0],
            description=text.strip(),
            epilog=f"example: {example.strip()}",
        )
        module.arguments(verb)
    return parser


if __name__ == "__main__":
    if os.environ.get(json_lines.ASKED) == "json":
        sys.stderr = json_lines.JsonLines(sys.stderr)
    status = main()
    sys.stdout.flush()
    # after a mistake in a group of ranks nothing is left to wait for, least of all the others
    os._exit(status) if status and (status == 130 or "RANK" in os.environ) else sys.exit(status)
