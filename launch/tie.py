"""A rank ends with the agent that started it. Nothing is imported here that takes time."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def leave_with(parent: int) -> None:
    """End as soon as this parent is gone. A rank that outlives its agent would go on writing to the
    folder of the run that is started in its place."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it went before it could be asked for
            os.kill(os.getpid(), signal.SIGKILL)
