"""The exported folder: what a trained model consists of, without the run that it comes from and without its data.

``config.json``: the run's configuration, step, class names, how many anchors the reference has; ``model.safetensors``:
the averaged weights by name, and the anchors' centres; ``anchors.safetensors``: the reference's anchors [N, D] by data
type, among which samples are seen; ``tokenizer.json`` where there is text; ``SHA256SUMS`` of these, as `sha256sum
--check` reads it, checked before anything is used. What a file from others could run is refused: these formats hold
numbers and text alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lzn_dist import __version__
from lzn_dist.config import Config, config_from
from lzn_dist.data.captions import TOKENIZER
from lzn_dist.json_files import read_json
from lzn_dist.networks import Networks
from lzn_dist.objectives import build_networks

FORMAT = 1
CONFIG, WEIGHTS, ANCHORS, SUMS = "config.json", "model.safetensors", "anchors.safetensors", "SHA256SUMS"
LIBRARY = "lzn_dist"
_CENTRE = "centre."


class ExportError(ValueError):
    """An exported folder that is damaged, of another version, or cannot be written; the message says what to do."""


@dataclass
class Loaded:
    """Networks with the averaged (EMA) weights in evaluation mode, their configuration, and the step; centres: by data
    type, of anchors [D]; tokenizer: a tokenizer.json, where there is text; reference: anchors [N, D] by data type;
    classes: their names."""

    networks: Networks
    config: Config
    step: int
    centres: dict[str, Tensor]
    tokenizer: str | None
    reference: dict[str, Tensor] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


@dataclass
class _About:
    """What is read of config.json."""

    config: dict[str, Any]
    step: int
    format: int
    classes: list[str] = field(default_factory=list)
    lzn_dist: str = ""


@dataclass
class _Library:
    library_name: str = ""


def is_export(path: Path) -> bool:
    """Whether a folder says that it is one of ours."""
    try:
        return read_json(path / CONFIG, _Library).library_name == LIBRARY
    except (OSError, ValueError):
        return False


def write_export(folder: Path, model: Loaded) -> None:
    """Write a model's files into a folder that is there. Raises OSError."""
    values = model.config.model_dump(mode="json")
    values["output_dir"] = _name_alone(values["output_dir"])
    for section, key in (("data", "shards"), ("data", "cache"), ("data", "tokenizer"), ("evaluation", "cache")):
        values[section][key] = _name_alone(values[section][key])
    values["resume"], values["init_from"] = "auto", ""
    about = {
        "library_name": LIBRARY, "lzn_dist": __version__, "format": FORMAT, "step": model.step,
        "task": model.config.task, "classes": list(model.classes),
        "reference": {name: list(anchors.shape) for name, anchors in model.reference.items()},
        "config": values,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    tensors = model.networks.state_dict() | {_CENTRE + name: value for name, value in model.centres.items()}
    save_tensors(tensors, folder / WEIGHTS)
    names = [CONFIG, WEIGHTS]
    if model.reference:
        save_tensors(model.reference, folder / ANCHORS)
        names.append(ANCHORS)
    if model.tokenizer is not None:
        (folder / TOKENIZER).write_text(model.tokenizer, encoding="utf-8")
        names.append(TOKENIZER)
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def _name_alone(path: str) -> str:
    """A path of this machine, without what it says about it."""
    return Path(path).name if path.startswith(("/", "~")) else path


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors as safetensors, in a file that others may read as they may read new files here."""
    # copies: tensors that share memory cannot be saved
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(plain, path, metadata={"format": "pt"})  # of its own, it lets the owner alone read
    path.chmod(mode)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_export(folder: Path) -> Loaded:
    """A model from such a folder. Raises ExportError, one line, and ConfigError for networks of packages that nobody
    trusts."""
    try:
        about = read_json(folder / CONFIG, _About)
        if about.format != FORMAT:
            raise ExportError(
                f"{folder} has format {about.format} (written by lzn_dist {about.lzn_dist or 'unknown'}), this version "
                f"reads {FORMAT}: export it anew with the version here"
            )
        checked = _check_sums(folder)
        tensors = load_file(folder / WEIGHTS)
        reference = load_file(folder / ANCHORS) if ANCHORS in checked else {}
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8") if TOKENIZER in checked else None
    except FileNotFoundError as error:
        raise ExportError(f"{folder} is not whole: {Path(str(error.filename)).name} is missing") from error
    except ExportError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} is damaged: {error}") from error
    config = config_from(about.config, str(folder / CONFIG))
    centres = {name.removeprefix(_CENTRE): tensors.pop(name) for name in list(tensors) if name.startswith(_CENTRE)}
    with torch.device("meta"):  # a file from others may describe networks that no memory holds
        shapes = {name: tuple(value.shape) for name, value in build_networks(config).state_dict().items()}
    for name in [*shapes, *tensors]:
        ours = shapes.get(name)
        theirs = tuple(tensors[name].shape) if name in tensors else None
        if ours != theirs:
            raise ExportError(
                f"{folder}: {name} is {theirs or 'missing'} in {WEIGHTS}, {ours or 'missing'} in {CONFIG}'s networks"
            )
    if sum(map(math.prod, shapes.values())) * 2 > (folder / WEIGHTS).stat().st_size:
        raise ExportError(f"{folder} is damaged: {WEIGHTS} is too small for its networks")
    for name, anchors in [*reference.items(), *((name, centre[None]) for name, centre in centres.items())]:
        if anchors.dim() != 2 or anchors.shape[1] != config.latent.dim:
            raise ExportError(f"{folder}: anchors of {name} have shape {tuple(anchors.shape)}, latent.dim is "
                              f"{config.latent.dim}")  # fmt: skip
    networks = build_networks(config)
    networks.load_state_dict(tensors)
    return Loaded(networks.eval(), config, about.step, centres, tokenizer, reference, tuple(about.classes))


def _check_sums(folder: Path) -> set[str]:
    """The names of the files that are what was written: a folder may hold others, of a model that was here before."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not {CONFIG, WEIGHTS} <= set(sums) <= {CONFIG, WEIGHTS, ANCHORS, TOKENIZER}:
        raise ExportError(f"{folder} is damaged: {SUMS} does not name its files")
    for name, digest in sums.items():
        if _digest(folder / name) != digest:
            raise ExportError(f"{folder} is damaged: {name} is not what was written (see {SUMS})")
    return set(sums)
