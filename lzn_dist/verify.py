"""Verify a launch configuration, here ZeRO-2's:

    accelerate launch --config_file launch/zero2.yaml lzn_dist/verify.py CONFIG [key=value ...]

Takes three optimiser steps of this very launch (engine, ranks, gradient caching, activation checkpointing, ring) and
of one process on the same global batches, and compares losses, gradients and weights. Run it before a long training
on a new cluster: a wrong factor in a collective does not crash, it trains badly. Exit status 0 where everything agrees,
1 where something does not, 2 for a configuration that cannot be run.

Losses and gradients are compared at the same weights: after each step's comparison the single process's optimiser is
given the launch's gradients. (Adam divides by a gradient's size; one that is nearly nothing would make of rounding a
difference as large as the step.) The weights' change then shows clipping, optimiser and schedule.

Networks compute in float64 where the engine can (one process, DDP, FSDP2), else in float32. Nothing is written. The
single process sees the whole global batch: set data.global_batch lower where it does not fit (or --micro-batch).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import lzn_dist  # noqa: F401  # isort: skip  (before torch: how threads wait)
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tabulate import tabulate
from torch import Tensor

from lzn_dist.config import Config, ConfigError, load_config
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import broadcast_object
from lzn_dist.distributed.pieces import gather_pieces
from lzn_dist.engines.flags import obey
from lzn_dist.engines.launch import Launch, build_accelerator
from lzn_dist.networks import Networks, trust
from lzn_dist.terminal import TRUST, command
from lzn_dist.training.batches import make_embedded_data, open_stream, prepare_samples
from lzn_dist.training.checkpoint import CheckpointError
from lzn_dist.training.resolve import resolve
from lzn_dist.training.setup import build_state, describe, fresh_networks, single_state
from lzn_dist.training.step import TrainState, apply_gradients, compute_gradients

STEPS = 3
# Relative differences that rounding explains: of losses, gradients, and the weights' change over all steps.
TOLERANCES = {"float64": (1e-9, 1e-8, 1e-9), "float32": (1e-5, 1e-3, 1e-3)}
FLOOR = 1e-3  # of the global norm: a group whose own norm is less is measured by this


@dataclass
class Trace:
    """What a launch computed: losses and whole gradients of each step, whole weights after the last (main process)."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


@dataclass
class Row:
    """One line of the table: worst relative difference over the steps."""

    what: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def run_steps(
    state: TrainState, accelerator: Accelerator, topology: Topology, given: list[dict[str, Tensor]] | None = None
) -> Trace:
    """Take the steps; collective over the topology's ranks. given: gradients to step by instead of the own ones."""
    stream, trace = open_stream(state.config, topology), Trace([], [], {})
    for number in range(STEPS):
        samples = prepare_samples(stream.batch(number), number, state.objective, accelerator.device, topology)
        loss, _ = compute_gradients(state, samples)
        loss = loss.double()
        if topology.world_size > 1:
            dist.all_reduce(loss)
        trace.losses.append(float(loss) / topology.world_size)
        gradients = state.engine.gradients()
        if topology.is_main:
            trace.gradients.append({name: value.double().cpu() for name, value in gradients.items()})
        if given is not None:
            for name, p in state.engine.parameters.items():
                p.grad = given[number][name].to(p, copy=True)  # clipping works in place
        apply_gradients(state)
    weights = state.engine.weights()
    if topology.world_size > 1:
        trace.weights = gather_pieces(weights) or {}
    else:
        trace.weights = {name: piece.data.cpu().view(piece.shape) for name, piece in weights.items()}
    return trace


def group_of(networks: Networks) -> dict[str, str]:
    """A group's name for each parameter: its network and the type of its layer."""
    owners = dict(networks.named_modules())
    return {
        name: f"{'.'.join(name.split('.')[:2])} {type(owners[name.rpartition('.')[0]]).__name__}"
        for name, _ in networks.named_parameters()
    }


def compare(
    ours: Trace, reference: Trace, start: Mapping[str, Tensor], groups: dict[str, str], precision: str
) -> list[Row]:
    """The table: losses, gradients by group of tensors, the weights' change by group."""
    loss_tolerance, gradient_tolerance, weight_tolerance = TOLERANCES[precision]
    losses = zip(ours.losses, reference.losses, strict=True)
    rows = [Row("loss", worst([abs(a - b) / abs(b) for a, b in losses]), loss_tolerance)]
    differences: dict[str, list[float]] = {}
    for a, b in zip(ours.gradients, reference.gradients, strict=True):
        for group, value in _by_group(a, b, groups).items():
            differences.setdefault(group, []).append(value)
    rows += [Row(f"gradient of {group}", worst(v), gradient_tolerance) for group, v in differences.items()]
    change, expected = (
        {name: trace.weights[name].double() - start[name].double() for name in trace.weights}
        for trace in (ours, reference)
    )
    changes = _by_group(change, expected, groups)
    return rows + [Row(f"change of {group}", value, weight_tolerance) for group, value in changes.items()]


def worst(values: list[float]) -> float:
    """The largest; NaN if there is one, which max would hide."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _by_group(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], groups: dict[str, str]) -> dict[str, float]:
    """‖difference‖/‖reference‖ of each group, the norm being FLOOR times that over all groups at least."""
    assert ours.keys() == reference.keys()
    names: dict[str, list[str]] = {}
    for name in reference:
        names.setdefault(groups[name], []).append(name)

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    floor = FLOOR * norm(list(reference.values()))
    return {
        group: norm([ours[n] - reference[n] for n in members]) / max(norm([reference[n] for n in members]), floor)
        for group, members in names.items()
    }


def table(rows: list[Row]) -> str:
    """Aligned columns."""
    cells = [
        (row.what, f"{row.difference:.2e}", f"{row.tolerance:.0e}", "pass" if row.passed else "FAIL") for row in rows
    ]
    return tabulate(cells, ["", "‖difference‖/‖value‖", "tolerance", ""], "plain", disable_numparse=True)


def verify(config: Config, launch: Launch, accelerator: Accelerator, reference_micro_batch: int = 0) -> list[Row]:
    """The rows on the main process, an empty list on the others. Collective."""
    topology = Topology.current()
    precision = "float32" if launch.deepspeed is not None else "float64"
    config = config.model_copy(update={"precision": precision})
    make_embedded_data(config, accelerator)
    state = build_state(config, launch, accelerator, checkpoint=None)
    accelerator.print(f"verify: {describe(state)}, {precision}")
    ours = run_steps(state, accelerator, topology)
    rows: list[Row] = []
    if topology.is_main:
        plain = {"micro_batch": reference_micro_batch, "activation_checkpointing": "none", "anchors": "gathered"}
        alone = config.model_copy(update={**plain, "flow_store_every": 1, "compile": False})
        start = {
            name: p.detach().cpu().clone() for name, p in fresh_networks(alone, accelerator.device).named_parameters()
        }
        single = single_state(alone, accelerator.device)
        reference = run_steps(single, accelerator, Topology(), ours.gradients)
        rows = compare(ours, reference, start, group_of(single.engine.networks), precision)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, for example configs/digits_joint.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its keys")
    parser.add_argument("--micro-batch", type=int, default=0, help="gradient caching in the single process as well")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    options = parser.parse_intermixed_args(arguments)
    trust(options.trust)
    try:
        config = load_config(options.config, [*options.overrides, "tracking.wandb=disabled"])
        config = config.model_copy(update={"tf32": False})  # before it is switched on for the process
        launch = Launch.asked()
        config = resolve(obey(config, launch.deepspeed))
        accelerator = build_accelerator(config, launch)
        rows = verify(config, launch, accelerator, options.micro_batch)
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [row for row in rows if not row.passed]
    if rows:
        print(table(rows))
        print(f"verify: {len(failed)} of {len(rows)} comparisons FAILED" if failed else "verify: everything agrees")
    failures = broadcast_object(str(len(failed)))  # the others wait here for the main process's reference
    accelerator.end_training()
    return 0 if failures == "0" else 1


if __name__ == "__main__":
    sys.exit(command(main))
