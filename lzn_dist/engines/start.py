"""What happens before the first step: the world that the environment describes, and meeting the others. Nothing of it
waits in silence."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from lzn_dist.config import ConfigError
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import all_gather_object

SILENCE = 30.0  # seconds after which a wait says what it waits for, and again
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_world(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes that the environment describes, as accelerate launch, torchrun and the cluster's tasks
    set it. Raises ConfigError where it describes half a world, such as another launch has left behind."""
    found: dict[str, str] = {name: environment[name] for name in _WORLD if name in environment}
    mpi = {name: environment[name] for name in _MPI if environment.get(name, "1") != "1"}
    named: dict[str, str] = {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in found}
    if not named:
        if mpi:
            raise _leftover(mpi, "processes of mpirun are not supported")
        return 1
    missing = [name for name in _WORLD if name not in found]
    if missing:
        raise _leftover(named, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not")
    try:
        rank, world, local, port = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    except ValueError as error:
        raise _leftover(found, "not all of these are numbers") from error
    if not 0 <= rank < world or not 0 <= local <= rank or not 0 < port < 65536:
        raise _leftover(found, "these do not fit together")
    try:
        socket.getaddrinfo(found["MASTER_ADDR"], port)
    except OSError as error:
        raise _leftover(found, f"there is no host {found['MASTER_ADDR']} ({error.strerror})") from error
    return world


def _leftover(found: Mapping[str, str], what: str) -> ConfigError:
    said = " ".join(f"{name}={value}" for name, value in found.items())
    return ConfigError(
        f"{said} in the environment, but {what}: left by another launch? Start one process with "
        f"`env {' '.join(f'-u {name}' for name in found)} python -m lzn_dist.train …`, several with "
        "`accelerate launch --config_file launch/ddp.yaml lzn_dist/train.py …`"
    )


@contextmanager
def spoken(what: Callable[[], str], seconds: float | None = None) -> Iterator[None]:
    """While this context takes longer than `SILENCE` seconds, say what it does, again and again."""
    ended, began = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(SILENCE if seconds is None else seconds):
            print(f"{time.monotonic() - began:.0f} s: {what()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=speak, name="spoken", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def meeting() -> Iterator[None]:
    """Around what joins the processes of a world: who is not there yet is told, by each that waits."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{host}:{port} (MASTER_ADDR and MASTER_PORT)"
    ended, stores = threading.Event(), list[dist.TCPStore]()

    def arrive() -> None:  # beside the main thread, which waits at the same store
        while not stores and not ended.wait(1.0):
            with suppress(RuntimeError, ValueError):
                store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
                store.set(f"lzn_dist/arrived/{rank}", "1")
                stores.append(store)

    def waiting() -> str:
        own = f"rank {rank} of {world} waits"
        if not stores:
            return f"{own} for rank 0 at {place}: nobody answers there. Are these left by another launch (env -u …)?"
        with suppress(RuntimeError, ValueError):
            absent = [str(r) for r in range(world) if not stores[0].check([f"lzn_dist/arrived/{r}"])]
            if absent:
                return (
                    f"{own} at {place} for rank {', '.join(absent[:8])}{' …' if len(absent) > 8 else ''}: not started?"
                )
        return f"{own}; all have arrived at {place}"

    thread = threading.Thread(target=arrive, name="arrive", daemon=True)
    thread.start()
    # the main thread waits in C++, where Python's handler of Ctrl-C is not heard
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with spoken(waiting):
            yield
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
        ended.set()
        thread.join()


def join_world() -> None:
    """Meet the other processes of a command that does not train, where there are any. Raises ConfigError."""
    if check_world() > 1:
        with meeting():
            PartialState(cpu=not torch.cuda.is_available())


def leave_world() -> None:
    """Wait for them, and part."""
    if Topology.current().world_size > 1:
        all_gather_object(None)
        PartialState().destroy_process_group()
