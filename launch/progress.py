"""Lines on the console of verbs that run in one process."""

import sys


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
