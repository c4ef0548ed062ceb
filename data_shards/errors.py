"""The one error that a user is meant to read."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

# What a disk or a network answers for a while: no mistake of the run's.
PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ENOTEMPTY,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class UserError(ValueError):
    """A mistake a user can mend: says what, where, what was expected, and the way out."""


class LostError(UserError):
    """Another rank or node is gone, or a disk does not answer: the same command, started again,
    goes on."""


class InterruptedWriteError(UserError):
    """A stop that is nobody's mistake in the input: what is done so far is worth keeping."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among `known`: names the nearest and lists them all."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return UserError(f"unknown {what} {name!r}{hint}; there are: {', '.join(names) or 'none'}")
