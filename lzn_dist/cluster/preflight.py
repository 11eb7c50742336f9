"""Before a long run: python -m lzn_dist.cluster.preflight CONFIG, on every rank of the job.

Each node's GPUs, versions and free disk, the bandwidth of an all-reduce over all ranks, and that between pairs of
nodes, with nodes that are slow named. Nodes that differ in GPUs or versions, or have no disk left, end the job with
exit status 2; a slow node is a warning. Results: preflight.json beside the configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lzn_dist import __version__
from lzn_dist.config import Config, ConfigError, load_config
from lzn_dist.data.shards import PREFETCH
from lzn_dist.machine import cores
from lzn_dist.paths import path_argument
from lzn_dist.terminal import command

MEGABYTES = 32  # of a message between nodes
ROUNDS = 8  # pairs that each node is measured in, at most
SLOW = 0.5  # of the median node's bandwidth
LEAST_DISK = 1e9  # bytes


def facts(config_cache: str) -> dict[str, Any]:
    """What a node has."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "gpus": f"{len(gpus)} x {gpus[0]}" if gpus else "none",
        "cpus": cores(),
        "versions": f"lzn_dist {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}",
        "free_disk_gb": round(shutil.disk_usage(config_cache or tempfile.gettempdir()).free / 1e9, 1),
        # where loader processes hand their batches over
        "free_shm_gb": round(shutil.disk_usage("/dev/shm").free / 1e9, 1) if os.path.isdir("/dev/shm") else None,
    }


def pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds in which all nodes are paired at once (the circle method); each pair comes once."""
    places = list(range(nodes + nodes % 2))
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(a, b) for a, b in met if a < nodes and b < nodes])
        places.insert(1, places.pop())
    return rounds


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call that all ranks make."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def all_reduce_bandwidth(message: Tensor) -> float:
    """Bus bandwidth in GB/s: 2 (n - 1) / n of the message over the time, as NCCL's tests define it."""
    n = dist.get_world_size()
    timed(lambda: dist.all_reduce(message) and None, message.device)  # warms up
    seconds = min(timed(lambda: dist.all_reduce(message) and None, message.device) for _ in range(3))
    return 2 * (n - 1) / n * message.numel() * message.element_size() / seconds / 1e9


def pair_bandwidths(message: Tensor, ranks_per_node: int) -> list[tuple[int, int, float]]:
    """(node, node, GB/s) of round trips between nodes' first ranks, in rounds of pairs."""
    nodes = dist.get_world_size() // ranks_per_node
    rank = dist.get_rank()
    found: list[tuple[int, int, float]] = []
    for met in pairs(nodes)[:ROUNDS]:
        mine = next(((a, b) for a, b in met if rank in (a * ranks_per_node, b * ranks_per_node)), None)

        def trip(mine: tuple[int, int] | None = mine) -> None:
            if mine is None:
                return
            first, second = (node * ranks_per_node for node in mine)
            if rank == first:
                dist.send(message, second)
                dist.recv(message, second)
            else:
                dist.recv(message, first)
                dist.send(message, first)

        timed(trip, message.device)
        seconds = min(timed(trip, message.device) for _ in range(2))
        if mine is not None and rank == mine[0] * ranks_per_node:
            found.append((*mine, 2 * message.numel() * message.element_size() / seconds / 1e9))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return [pair for part in everywhere for pair in part]


def slow_nodes(measured: list[tuple[int, int, float]], nodes: int) -> dict[int, float]:
    """Each node's best pair in GB/s, for those whose best is below SLOW of the median: a node that is slow with every
    other one, not its partner."""
    best = {node: max(speed for a, b, speed in measured if node in (a, b)) for node in range(nodes)}
    if nodes < 3:
        return {}  # of two nodes nobody can say which is the slow one
    middle = statistics.median(best.values())
    return {node: speed for node, speed in best.items() if speed < SLOW * middle}


def problems(nodes: list[dict[str, Any]]) -> list[str]:
    """What keeps a job from running well on these nodes, a line each."""
    found = []
    for key in ("gpus", "versions"):
        kinds = {node[key]: node["host"] for node in nodes}
        if len(kinds) > 1:
            found.append(f"nodes differ in {key}: " + "; ".join(f"{host} has {kind}" for kind, host in kinds.items()))
    for node in nodes:
        if node["free_disk_gb"] * 1e9 < LEAST_DISK:
            found.append(f"{node['host']} has {node['free_disk_gb']} GB of disk left for copies of shards")
    return found


def tight(nodes: list[dict[str, Any]], config: Config, ranks_per_node: int) -> list[str]:
    """What the loader processes may find too little of on these nodes, a line each."""
    data, found = config.data, []
    side = max(data.resize, data.image_size)
    batch = data.global_batch // (len(nodes) * ranks_per_node) * data.image_channels * side * side
    needed = ranks_per_node * data.workers * PREFETCH * batch / 1e9
    for node in nodes:
        if node["cpus"] <= data.workers:
            found.append(
                f"{node['host']}: a rank has {node['cpus']} CPUs for {data.workers} loader processes and itself: set "
                "cpus_per_rank in the cluster's profile, or data.workers"
            )
        if node["free_shm_gb"] is not None and node["free_shm_gb"] < needed:
            found.append(
                f"{node['host']}: /dev/shm has {node['free_shm_gb']} GB left, and batches on their way may take "
                f"{needed:.1f} GB: take fewer data.workers, or a larger /dev/shm (a container's --shm-size)"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=path_argument)
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, facts(config.data.cache))
    nodes = told[::ranks_per_node]
    message = torch.ones(MEGABYTES * 250_000, device=device)
    overall = all_reduce_bandwidth(message) if dist.get_world_size() > 1 else 0.0
    measured = pair_bandwidths(message, ranks_per_node) if len(nodes) > 1 else []
    slow = slow_nodes(measured, len(nodes)) if measured else {}
    wrong = problems(nodes)
    if dist.get_rank() == 0:
        for line in tight(nodes, config, ranks_per_node):
            print(f"warning: {line}", file=sys.stderr)
        report(nodes, overall, measured, slow, wrong, given.config.parent / "preflight.json")
    dist.barrier()
    dist.destroy_process_group()
    return 2 if wrong else 0


def report(
    nodes: list[dict[str, Any]], overall: float, measured: list[tuple[int, int, float]], slow: dict[int, float],
    wrong: list[str], path: Path,
) -> None:  # fmt: skip
    """Print and write what was found."""
    best = {node: max((s for a, b, s in measured if node in (a, b)), default=0.0) for node in range(len(nodes))}
    for number, node in enumerate(nodes):
        speed = f", {best[number]:.2f} GB/s to its best partner" if measured else ""
        print(f"{node['host']}: GPUs {node['gpus']}, {node['cpus']} CPUs, {node['free_disk_gb']} GB disk{speed}")
    print(f"all nodes: {nodes[0]['versions']}; all-reduce of {MEGABYTES} MB: {overall:.2f} GB/s bus bandwidth")
    for number, most in slow.items():
        print(f"warning: {nodes[number]['host']} is slow: {most:.2f} GB/s with its best partner", file=sys.stderr)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    names = {number: node["host"] for number, node in enumerate(nodes)}
    result = {
        "nodes": nodes, "all_reduce_gb_s": overall, "slow": [names[number] for number in slow], "problems": wrong,
        "pairs_gb_s": [[names[a], names[b], speed] for a, b, speed in measured],
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(command(main))
