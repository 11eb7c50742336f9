"""Checkpoints: everything a run needs to go on, in one format for all engines.

A checkpoint is a folder ``checkpoints/step_00000100`` that appears under its name only when it is complete (written
beside, synced, renamed); ``checkpoints/latest`` names the newest complete one. Inside, written by
torch.distributed.checkpoint: ``weights.NAME``, ``ema.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of every
parameter, flattened, each rank writing its pieces; ``objective.NAME``: what an objective remembers; ``run.json``:
counters, shapes, versions; ``config.yaml``; ``SHA256SUMS`` of these and of ``.metadata``; tensors carry a CRC-32 each,
and all are checked when they are read. Nothing in it depends on how many ranks or which engine wrote it.

The weights are copied to the host and written by a thread while training goes on; one checkpoint is on its way at a
time. A rank that dies meanwhile leaves a folder that is never taken for a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lzn_dist import __version__
from lzn_dist.config import Config, load_config, save_config
from lzn_dist.data.captions import TOKENIZER
from lzn_dist.distributed.pieces import Piece, PieceLoader, PieceSaver, share, whole
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.base import MOMENTS, Engine
from lzn_dist.exchange import Loaded
from lzn_dist.json_files import read_json
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks
from lzn_dist.objectives import build_networks
from lzn_dist.paths import expand_path
from lzn_dist.training import format_2
from lzn_dist.training.checkpoint_reader import SUMS, CheckedReader, check_sums, write_sums
from lzn_dist.training.step import Counters, TrainState

FORMAT = 3
_READING = 60.0  # seconds that somebody may read a checkpoint that is to be written anew
_REPLACING = 0.2  # seconds after which it has its name again
# a run of one process is meant as one: no need to say so at every checkpoint
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model; the message says what to do."""


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_NAME = re.compile(r"step_(\d{8,})")


def is_complete(path: Path) -> bool:
    """Whether a folder is a checkpoint: its parts are renamed into place together, so these two speak for all."""
    return (path / "run.json").is_file() and (path / ".metadata").is_file()


def _why_not_counted(path: Path) -> str:
    """Why something in a run's ``checkpoints`` is none that the run wrote there; "" where it is one."""
    name = _NAME.fullmatch(path.name)
    if name is None or path.name != _name(int(name[1])):
        return "its name is none that a run gives"
    if path.is_symlink():
        return "it is a link"
    if not is_complete(path):
        return "it is not complete"
    with suppress(CheckpointError, OSError, ValueError):  # damage counts: resuming must hear of it
        step = RunRecord.read(path).counters.step
        if step != int(name[1]):
            check_sums(path)
            return f"it is a copy of step {step}"
    return ""


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints that a run wrote to its ``checkpoints``, oldest first; not what a person put there."""
    return sorted((path for path in folder.glob("step_*") if not _why_not_counted(path)), key=_step)


def not_counted(folder: Path) -> list[str]:
    """What looks like a checkpoint in a run's ``checkpoints`` and is none of its own, each with the reason."""
    reasons = ((path.name, _why_not_counted(path)) for path in sorted(folder.glob("step_*")))
    return [f"{name} ({why})" for name, why in reasons if why]


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint itself, whatever its name, or a run folder's newest complete one. Raises CheckpointError."""
    try:
        path = Path(expand_path(str(run_or_checkpoint)))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if is_complete(path):
        return path
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not found and list(path.glob("checkpoints/.step_*.before.tmp")):  # the only one is just being written anew
        time.sleep(_REPLACING)
        found = complete_checkpoints(path / "checkpoints")
    if not found:
        others = not_counted(path / "checkpoints")
        aside = f" (not counted: {', '.join(others)}; such a one can be named itself)" if others else ""
        raise CheckpointError(
            f"no complete checkpoint in {path}{aside}: train a run there first, or name another folder"
        )
    return found[-1]


@contextmanager
def held_checkpoint(run_or_checkpoint: str | Path) -> Iterator[Path]:
    """As `find_checkpoint`, of a checkpoint that its run does not remove within this context.

    A shared lock on its run.json says so to the run, which may be writing newer ones meanwhile; where one goes before
    it is locked, the next is taken. File systems without locks are read without.
    """
    while True:
        path = find_checkpoint(run_or_checkpoint)
        try:
            record = (path / "run.json").open()
        except OSError as error:
            if path.exists():
                raise CheckpointError(f"{path}/run.json cannot be read ({error.strerror})") from error
            continue  # removed since: the run has a newer one, or the next look says that there is none
        with record:
            with suppress(OSError):
                fcntl.flock(record, fcntl.LOCK_SH)
            if _is_still(path, record):
                yield path
                return


def _is_still(path: Path, record: IO[str]) -> bool:
    """Whether an open run.json is (still) that of this path."""
    try:
        return os.path.samestat((path / "run.json").stat(), os.fstat(record.fileno()))
    except OSError:
        return False


def _remove(path: Path, incarnation: int) -> None:
    """Remove a checkpoint, unless somebody reads it: then a later call will."""
    with (path / "run.json").open() as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # no locks here
            pass
        # out of sight first: half a folder must not look like a checkpoint
        doomed = path.with_name(f".{path.name}.{incarnation}.tmp")
        path.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _without_readers(path: Path, seconds: float) -> Iterator[None]:
    """Within, nobody begins to read a checkpoint; begun when those who do are done, or have had so many seconds."""
    with (path / "run.json").open() as record:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
            except OSError:  # no locks here
                break
        yield


def set_aside(folder: Path, resumed: Path | None, incarnation: int) -> Path | None:
    """Move the checkpoints that are not in a run's past out of the way, to ``superseded/INCARNATION``.

    A run that starts anew, or goes back to an earlier step, leaves the course that wrote the later ones: the newest
    must always be the run's own. folder: the run's ``checkpoints``; resumed: what it goes on from, which may be of
    another run. Returns where they are now, None where there was nothing to move.
    """
    past = -1
    if resumed is not None and resumed.parent.resolve() == folder.resolve():
        past = RunRecord.read(resumed).counters.step
    moved = [path for path in complete_checkpoints(folder) if _step(path) > past]
    if not moved:
        return None
    aside = folder / "superseded" / str(incarnation)
    aside.mkdir(parents=True, exist_ok=True)
    for path in moved:
        path.rename(aside / path.name)
    if left := complete_checkpoints(folder):
        _write_text(folder / "latest", left[-1].name)
    else:
        (folder / "latest").unlink(missing_ok=True)
    return aside


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class RunRecord:
    """run.json: counters, EMA's number of updates, shapes of all tensors by name, and what wrote it."""

    counters: Counters
    ema_updates: int
    shapes: dict[str, list[int]]
    written_by: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @staticmethod
    def read(path: Path) -> RunRecord:
        try:
            found = read_json(path / "run.json", RunRecord)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}/run.json cannot be read ({error}); name an older checkpoint") from error
        if found.format not in (2, FORMAT):
            raise CheckpointError(f"{path} has format {found.format}, this version of lzn_dist reads 2 and {FORMAT}")
        if found.format == 2:
            found.shapes = {format_2.new_name(name): shape for name, shape in found.shapes.items()}
        return found

    @staticmethod
    def checked(path: Path) -> RunRecord:
        """The same, and the checkpoint's other small files are what was written. Before these are used."""
        record = RunRecord.read(path)
        try:
            check_sums(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        return record


def config_of(path: Path) -> Config:
    """A checkpoint's configuration. Raises ConfigError."""
    if RunRecord.read(path).format == 2:
        return format_2.load_config(path / "config.yaml")
    return load_config(path / "config.yaml")


def _read_into(pieces: Mapping[str, Piece], path: Path, record: RunRecord) -> None:
    """Fill the pieces from a checkpoint; every rank reads by itself what it needs."""
    reader = CheckedReader(path)
    if record.format == 2:
        pieces = {format_2.old_key(name): piece for name, piece in pieces.items()}
    try:
        known = reader.read_metadata().state_dict_metadata
        for name, piece in pieces.items():
            entry = known.get(name)
            if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != (piece.numel,):
                raise CheckpointError(f"{path} holds no {name} of {piece.numel} elements: it is of another model")
        # without a process group's help: a rank that cannot read says so instead of leaving the others waiting
        dcp.load(dict(pieces), storage_reader=reader, planner=PieceLoader(), no_dist=True)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch
        raise CheckpointError(_unreadable(path, unwrapped(error))) from error


def unwrapped(error: BaseException) -> BaseException:
    """What is behind the many lines in which torch wraps the errors of ranks that write or read."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _unreadable(path: Path, error: BaseException) -> str:
    """One line: which file, why, and which checkpoints there are beside it."""
    if isinstance(error, FileNotFoundError) and error.filename:
        why = f"{Path(error.filename).name} is missing"
    else:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    others = [str(other) for other in complete_checkpoints(path.parent) if other != path and _whole(other)]
    advice = f"resume=PATH or load(PATH) takes another: {', '.join(others[-3:])}" if others else "there is no other"
    return f"{path} is damaged ({why}); {advice}"


def _whole(path: Path) -> bool:
    """As far as small files tell."""
    try:
        check_sums(path)
    except (OSError, ValueError):
        return False
    return True


def check_model(shapes: Mapping[str, list[int]], record: RunRecord, path: Path) -> None:
    """CheckpointError, naming the first difference, unless the checkpoint is of a model with these shapes."""
    for name in [*shapes, *record.shapes]:
        ours, theirs = shapes.get(name), record.shapes.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"{path} is of another model than the configuration describes: {name} is {theirs or 'missing'} there, "
                f"{ours or 'missing'} here; set output_dir or resume to a run of this model"
            )


def _shapes(networks: Networks) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in networks.state_dict().items()}


@torch.no_grad()
def load_weights(networks: Networks, path: Path, *, averaged: bool = False) -> RunRecord:
    """Fill whole networks with a checkpoint's weights (averaged: the EMA's). Raises CheckpointError."""
    record = RunRecord.checked(path)
    check_model(_shapes(networks), record, path)
    _fill(networks, path, averaged, record)
    return record


def _fill(networks: Networks, path: Path, averaged: bool, record: RunRecord) -> None:
    """Of a checkpoint that has been checked, and is of these networks."""
    trained = {name for name, p in networks.named_parameters() if p.requires_grad}
    staged = {name: value.detach().cpu().contiguous() for name, value in networks.state_dict().items()}
    if averaged:  # averages are kept in float32 at least
        staged = {
            name: value.to(torch.promote_types(value.dtype, torch.float32)) if name in trained else value
            for name, value in staged.items()
        }
    prefix = {name: "ema" if averaged and name in trained else "weights" for name in staged}
    _read_into({f"{prefix[name]}.{name}": whole(value) for name, value in staged.items()}, path, record)
    for name, value in networks.state_dict().items():
        value.copy_(staged[name])


def resume_state(state: TrainState, path: Path) -> None:
    """Moments, averages and counters of the checkpoint that the engine was built with. Raises CheckpointError."""
    record = RunRecord.checked(path)
    moments = {
        key: {name: piece.cpu() for name, piece in pieces.items()}
        for key, pieces in state.engine.moments(restore=True).items()
    }
    averages = {name: piece.cpu() for name, piece in average_pieces(state.ema, state.engine).items()}
    remembered = {name: value.cpu().contiguous() for name, value in state.objective.state().items()}
    _read_into(
        {f"{key}.{name}": piece for key, pieces in moments.items() for name, piece in pieces.items()}, path, record
    )
    _read_into({f"ema.{name}": piece for name, piece in averages.items()}, path, record)
    _read_into({f"objective.{name}": whole(value) for name, value in remembered.items()}, path, record)
    for name, value in state.objective.state().items():
        value.copy_(remembered[name])
    state.engine.set_moments(moments, record.counters.step - record.counters.without_moments)
    state.ema.load_state_dict(
        {
            "decay": state.config.optimizer.ema_decay,
            "num_updates": record.ema_updates,
            "shadow": {name: piece.data for name, piece in averages.items()},
        }
    )
    state.counters = record.counters


def average_pieces(ema: EMA, engine: Engine) -> dict[str, Piece]:
    """The averaged weights as pieces: the ranges of the engine's weights."""
    return {name: Piece(ema.shadow[name], piece.start, piece.shape) for name, piece in engine.weights().items()}


_CENTRE = "objective.centre."


def _centres(path: Path, record: RunRecord, dim: int) -> dict[str, torch.Tensor]:
    if record.format == 2:
        return {}
    try:
        names = [name for name in CheckedReader(path).read_metadata().state_dict_metadata if name.startswith(_CENTRE)]
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(_unreadable(path, error)) from error
    if not names:
        return {}
    found = {name: torch.zeros(dim) for name in names}
    _read_into({name: whole(value) for name, value in found.items()}, path, record)
    return {name.removeprefix(_CENTRE): value for name, value in found.items()}


def load_networks(run_or_checkpoint: str | Path) -> Loaded:
    """What a trained model consists of.

    Raises CheckpointError for a folder without a complete checkpoint or one of another model.
    """
    with held_checkpoint(run_or_checkpoint) as path:
        record = RunRecord.checked(path)
        config = config_of(path)
        with torch.device("meta"):  # a file from others may describe networks that no memory holds
            shapes = _shapes(build_networks(config))
        check_model(shapes, record, path)
        if sum(map(math.prod, shapes.values())) > sum(file.stat().st_size for file in path.glob("*.distcp")):
            raise CheckpointError(f"{path} is damaged: its files are too small for the networks in its config.yaml")
        networks = build_networks(config)
        _fill(networks, path, True, record)
        tokenizer = path / TOKENIZER
        text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
        return Loaded(networks.eval(), config, record.counters.step, _centres(path, record, config.latent.dim), text)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in the background; `save` and `wait` are collective.

    held: entered on the main process while a checkpoint gets its name; raises where another incarnation of the run has
    taken over. incarnation: part of temporary names, so that two incarnations never share one. tokenizer: what is
    written beside as tokenizer.json, so that the model works where its data is not.
    """

    def __init__(
        self, folder: Path, config: Config, incarnation: int, held: Callable[[], AbstractContextManager[None]],
        tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.incarnation, self.held = folder, config, incarnation, held
        self.tokenizer = tokenizer
        self.main = Topology.current().is_main
        self.several = Topology.current().world_size > 1
        # its own group: its collectives run beside the training's
        self.group = dist.new_group(backend="gloo") if self.several else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".step_*.tmp"):  # of incarnations that died while writing
                shutil.rmtree(left, ignore_errors=True)

    def save(self, state: TrainState) -> None:
        """Copy the state and write it while training goes on; waits first for the one before."""
        self.wait()
        pieces = _state_pieces(state)
        step = state.counters.step
        record = RunRecord(
            Counters(**asdict(state.counters)), state.ema.num_updates, _record_shapes(state.engine),
            {"lzn_dist": __version__, "torch": torch.__version__, "engine": state.engine.running(),
             "world_size": Topology.current().world_size, "incarnation": self.incarnation},
        )  # fmt: skip
        self.pending = self.thread.submit(self._write, pieces, record, step)

    def wait(self) -> None:
        """Until the checkpoint under way is complete; raises what went wrong with it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()

    def _write(self, pieces: dict[str, Piece], record: RunRecord, step: int) -> None:
        final = self.folder / _name(step)
        temporary = self.folder / f".{final.name}.{self.incarnation}.tmp"
        # the pieces are on the host; to copy ahead would make each rank's thread a context on the first GPU
        writer = dcp.FileSystemWriter(temporary, sync_files=True, per_thread_copy_ahead=0)
        dcp.save(
            dict(pieces), storage_writer=writer, planner=PieceSaver(), process_group=self.group,
            no_dist=not self.several,
        )  # fmt: skip
        if not self.main:
            return
        save_config(self.config, temporary / "config.yaml")
        _write_text(temporary / "run.json", json.dumps(asdict(record)))
        _sync(temporary / "config.yaml")
        if self.tokenizer is not None:
            _write_text(temporary / TOKENIZER, self.tokenizer)
        write_sums(temporary)
        _sync(temporary / SUMS)
        _sync(temporary)
        with self.held():
            own = os.path.lexists(final) and not _why_not_counted(final)
            with _without_readers(final, _READING) if own else nullcontext():
                before = self._make_room(final)
                temporary.rename(final)
            _sync(self.folder)
            _write_text(self.folder / "latest", final.name)
            if before is not None:
                shutil.rmtree(before)
            self._prune(final)

    def _make_room(self, final: Path) -> Path | None:
        """Move what stands where a checkpoint is to go: the run's own of this step out of sight, to be removed;
        whatever else to another name, for its owner."""
        if not os.path.lexists(final):
            return None
        if _why_not_counted(final):
            free = (final.with_name(f"{final.name}.moved{n}") for n in count())
            aside = next(path for path in free if not os.path.lexists(path))
            final.rename(aside)
            print(f"{final} was no checkpoint of this run: it is {aside.name} now", file=sys.stderr, flush=True)
            return None
        return final.rename(final.with_name(f".{final.name}.{self.incarnation}.before.tmp"))

    def _prune(self, newest: Path) -> None:
        """Of the run's own: never the one just written, which `latest` names, nor one that is being read."""
        every = self.config.keep_every
        for old in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            if old != newest and not (every and _step(old) % every == 0):
                _remove(old, self.incarnation)


def _record_shapes(engine: Engine) -> dict[str, list[int]]:
    trained = {name: list(piece.shape) for name, piece in engine.weights().items()}
    return trained | {name: list(value.shape) for name, value in engine.buffers.items()}


def _state_pieces(state: TrainState) -> dict[str, Piece]:
    """All tensors of a run as this rank's pieces, copied to the host."""
    engine = state.engine
    groups: dict[str, Mapping[str, Piece]] = {
        "weights": engine.weights() | engine.buffer_pieces(),
        "ema": average_pieces(state.ema, engine),
        "objective": {name: share(value, engine.topology) for name, value in state.objective.state().items()},
        **engine.moments(),
    }
    assert set(groups) == {"weights", "ema", "objective", *MOMENTS}
    return {f"{key}.{name}": piece.cpu() for key, pieces in groups.items() for name, piece in pieces.items()}
