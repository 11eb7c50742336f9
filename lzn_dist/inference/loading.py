"""From a run, a checkpoint or an exported folder to a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from lzn_dist.exchange import is_export, read_export
from lzn_dist.inference.model import LZN, model_of
from lzn_dist.machine import keep_freed_memory
from lzn_dist.networks import trust as trust_packages
from lzn_dist.paths import expand_path

ALL = 2**62


def load(path: str | Path, trust: Iterable[str] = (), *, anchors: int | Literal["all"] | None = None) -> LZN:
    """The model of a run's newest checkpoint, of one checkpoint, or of an exported folder, with averaged (EMA) weights.

    trust: packages whose classes its configuration may name as networks, beside our own: importing them runs their
    code, and the file may come from others. anchors: of how many training samples the anchors are, among which a sample
    is seen (more is more exact, see `LZN`); default: those that an export brings, `evaluation.batch` of a run's.
    Raises CheckpointError or ExportError for a folder that holds no model, ConfigError for a class of another package,
    ValueError for more anchors than an export has.
    """
    trust_packages(trust)
    size = ALL if anchors == "all" else anchors or 0
    folder = Path(expand_path(str(path)))
    if anchors != "all" and anchors is not None and (not isinstance(anchors, int) or anchors < 1):
        raise ValueError(f"anchors must be a whole number from 1 on, or 'all', not {anchors!r}")
    if is_export(folder):
        found = read_export(folder)
        if isinstance(anchors, int):
            for name, own in found.reference.items():
                if anchors > len(own):
                    raise ValueError(f"{folder} has {len(own)} anchors of {name}: give anchors={len(own)} at most")
                found.reference[name] = own[:anchors]
        return model_of(found, size)
    from lzn_dist.training.checkpoint import load_networks  # an export is loaded without what training needs

    return model_of(load_networks(folder), size)


def load_everywhere(
    path: str | Path, trust: Iterable[str] = (), *, checkpoint: str | Path | None = None,
    anchors: int | Literal["all"] | None = None,
) -> LZN:  # fmt: skip
    """As `load`, in a command: every process of a launch has the same checkpoint, on its own GPU where there is one,
    while the run may be writing newer ones. checkpoint: instead of a run's newest. Collective.

    Raises what `load` raises, and FileNotFoundError for a folder that is not there.
    """
    from lzn_dist.distributed.collectives import all_gather_object
    from lzn_dist.distributed.topology import Topology
    from lzn_dist.training.setup import shared_checkpoint

    folder = Path(expand_path(str(path)))
    if not folder.is_dir():
        raise FileNotFoundError(f"no run in {folder}: give the output_dir of a training run, or an exported folder")
    with ExitStack() as held:
        named: Path | None = folder
        if checkpoint is not None or not is_export(folder):
            named = shared_checkpoint(checkpoint or folder, held if Topology.current().is_main else None)
        assert named is not None
        model = load(named, trust, anchors=anchors)
        all_gather_object(None)  # until all have read it
    if torch.cuda.is_available():
        return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        # threads that wait for each other spin: with as many as cores, one busy core makes small layers 20 × slower
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return model
