"""Exit statuses of a training run, by which whatever started it decides what to do next."""

FINISHED = 0
REFUSED = 2  # only a person can mend it: a wrong configuration, damaged data, another run in the folder
UNREADABLE = 74  # EX_IOERR: the data is away, and may come back
PREEMPTED = 75  # EX_TEMPFAIL: told to end and checkpointed; nothing is wrong, run it again
