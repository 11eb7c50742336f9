"""How a run ends that cannot go on: each with a checkpoint where one can be had, and one line that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.checkpoint.api import CheckpointException

from lzn_dist.config import ConfigError
from lzn_dist.data.storage import RemoteError
from lzn_dist.distributed.collectives import all_gather_object
from lzn_dist.exit_status import REFUSED, UNREADABLE, disk_is_full, status_of
from lzn_dist.objectives import Samples
from lzn_dist.training.checkpoint import CheckpointError, unwrapped
from lzn_dist.training.run import Run
from lzn_dist.training.run_folder import SupersededError


class NonfiniteError(RuntimeError):
    """Too many steps in a row had gradients that are not finite."""


class NoDataError(RuntimeError):
    """The training data cannot be read any more, or too much of it is damaged. status: the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def no_more_data(run: Run, why: str, status: int) -> NoReturn:
    """All ranks stop here, with a checkpoint to go on from when the data is back. why: as this rank knows it, ""
    where it knows of nothing; status: what that means."""
    failed: list[str] = []
    for write in (run.writer.wait, run.checkpoint):  # a rank whose earlier one failed must not miss this one
        failed = sorted(set(all_gather_object(problem(write))) - {""})
    kept = f"without a new checkpoint, {run.newest()} ({'; '.join(failed)})" if failed else "with a checkpoint"
    told = {(reason, code) for reason, code in all_gather_object((why, status)) if reason}
    reasons = "; ".join(sorted({reason for reason, _ in told}))
    # what only a person can mend outweighs what may come back by itself
    code = REFUSED if any(code == REFUSED for _, code in told) else UNREADABLE
    raise NoDataError(f"stopped at step {run.state.counters.step} {kept}: {reasons}", code)


def too_much_damage(run: Run, damaged: float) -> NoReturn:
    """As `no_more_data`, for damaged samples."""
    limit = run.config.data.max_bad_samples
    no_more_data(
        run,
        f"{damaged:.0f} samples of this epoch are damaged, data.max_bad_samples is {limit}: see bad_samples.jsonl, "
        "mend the shards or raise it",
        REFUSED,
    )


def unreadable_in_evaluation(run: Run, error: Exception) -> NoReturn:
    """Images cannot be read, perhaps on this rank alone, the others being still in the evaluation: nothing here needs
    them."""
    problem(run.writer.wait)  # the checkpoint of this step may be under way
    where = f"stopped in the evaluation at step {run.state.counters.step}, {run.newest()}: rank {run.topology.rank}"
    raise NoDataError(f"{where}: {error}", status_of(error)) from error


def skipped(run: Run, samples: Samples) -> None:
    """A step's gradients were not finite: count it, and stop the run when it has no end. Raises NonfiniteError."""
    count, limit = run.state.counters.nonfinite, run.config.max_nonfinite
    run.accelerator.print(
        f"skipped global batch {samples.batch}: its gradients are not finite ({count} of {limit} in a row)",
        file=sys.stderr,
    )
    if count >= limit:
        folder = Path(run.config.output_dir) / "nonfinite"
        folder.mkdir(exist_ok=True)
        torch.save(vars(samples), folder / f"batch_{samples.batch}_rank_{run.topology.rank}.pt")
        problem(run.writer.wait)  # one may be under way
        raise NonfiniteError(
            f"{count} steps in a row had gradients that are not finite; the last batch is in {folder}, "
            f"{run.newest()}: lower the learning rate or look at the data"
        )


def problem(action: Callable[[], None]) -> str:
    """What went wrong with writing, in a line; "" if nothing did."""
    try:
        action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch
        return repr(_full_disk(error) or unwrapped(error)).splitlines()[0]
    return ""


def _full_disk(error: BaseException | None) -> OSError | None:
    """The full disk (or quota) that is behind an error, if there is one."""
    while error is not None:
        error = unwrapped(error)
        if isinstance(error, OSError):
            return error if disk_is_full(error) else None
        error = error.__cause__ or error.__context__
    return None


def explained(error: BaseException, output_dir: str) -> int | None:
    """Say in one line why a run ends, and return its exit status; None for an error that nobody has foreseen."""
    status: int | None = None
    message = str(error)
    if isinstance(error, NoDataError):
        status = error.status
    elif isinstance(error, ConfigError | CheckpointError | NonfiniteError | SupersededError):
        status = REFUSED
    elif isinstance(error, RemoteError):
        status = UNREADABLE
    elif (full := _full_disk(error)) is not None:
        status = REFUSED
        where = full.filename or output_dir
        message = f"{full.strerror}: {where}; free some and start again from the newest checkpoint"
    if status is not None:
        print(f"error: {message}", file=sys.stderr)
    return status
