"""Exit statuses of a training run, by which whatever started it decides what to do next."""

from __future__ import annotations

import errno

FINISHED = 0
REFUSED = 2  # only a person can mend it: a wrong configuration, damaged data, another run in the folder
UNREADABLE = 74  # EX_IOERR: the data is away, and may come back
PREEMPTED = 75  # EX_TEMPFAIL: told to end and checkpointed; nothing is wrong, run it again


def disk_is_full(error: OSError) -> bool:
    """Whether a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def told(error: OSError, folder: object) -> str:
    """An error as a line that names a file: writing tells of none, where it was said where to write."""
    if error.filename is not None or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {folder}"


def status_of(error: Exception | None) -> int:
    """A server or a disk may come back by itself; a full disk and damaged data do not mend themselves."""
    return UNREADABLE if isinstance(error, OSError) and not disk_is_full(error) else REFUSED
