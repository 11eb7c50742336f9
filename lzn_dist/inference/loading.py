"""From a run, a checkpoint or an exported folder to a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from lzn_dist.exchange import is_export, read_export
from lzn_dist.inference.model import LZN, model_of
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
        return model_of(found)
    from lzn_dist.training.checkpoint import load_networks  # an export is loaded without what training needs

    return model_of(load_networks(folder), ALL if anchors == "all" else anchors or 0)
