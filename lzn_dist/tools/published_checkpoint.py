"""Checkpoints as the paper's authors published them, one file a case study.

    python -m lzn_dist.tools.import_published FILE --case case_study_3 --out RUN_DIR

turns one into a run's folder that `python -m lzn_dist.evaluate`, `lzn_dist.load` and training accept.

A file is a dictionary written by torch.save: `encoder`, `decoder` and (case 3) `label_anchor` hold state dicts whose
names carry the prefix ``model.module.``; `encoder_ema` and so on hold `shadow_params`, the averages of the trainable
parameters as a plain list in the network's order; `iteration` counts the steps. The networks here have
the published names and order, so that both go in as they are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lzn_dist.models.label_anchors import LabelAnchors
from lzn_dist.models.ncsnpp import ImageDecoder, ImageEncoder
from lzn_dist.models.resnet import ResNetEncoder

PREFIX = "model.module."
_AT_256: dict[str, Any] = {
    "image_size": 256,
    "channel_multipliers": (1, 1, 2, 2, 2, 2, 2),
    "residual_blocks": 2,
    "dropout": 0.0,
    "fir": True,
    "progressive": True,
}
CASES = (
    "case_study_1_cifar10",
    "case_study_1_afhqcat",
    "case_study_1_celebahq",
    "case_study_1_lsunbedroom",
    "case_study_2",
    "case_study_3",
)


@dataclass(frozen=True)
class ReferenceNetworks:
    """A case study's networks in evaluation mode; decoder and label_anchors are None where the case has none.

    step: the training steps that the file counts; 0 where it does not say.
    """

    encoder: nn.Module
    decoder: nn.Module | None
    label_anchors: nn.Module | None
    step: int

    def parts(self) -> dict[str, nn.Module]:
        """The networks that there are, by the names that the authors' files give them."""
        found = {"encoder": self.encoder, "decoder": self.decoder, "label_anchor": self.label_anchors}
        return {name: network for name, network in found.items() if network is not None}


def build_case(case: str, step: int = 0) -> ReferenceNetworks:
    """Fresh networks of a case study's sizes. Raises ValueError for an unknown case."""
    _check_case(case)
    if case == "case_study_2":
        return ReferenceNetworks(ResNetEncoder().eval(), None, None, step)
    encoder: nn.Module
    if case in ("case_study_1_cifar10", "case_study_3"):
        classes = 10 if case == "case_study_3" else 0
        encoder, decoder = ImageEncoder(), ImageDecoder(num_classes=classes)
        labels = LabelAnchors(10, 200).eval() if classes else None
        return ReferenceNetworks(encoder.eval(), decoder.eval(), labels, step)
    encoder = ImageEncoder(**_AT_256, feature_resolutions=(64, 32, 16, 8, 4))
    decoder = ImageDecoder(**_AT_256, embedding="fourier", scale_by_sigma=True)
    return ReferenceNetworks(encoder.eval(), decoder.eval(), None, step)


def _check_case(case: str) -> None:
    if case not in CASES:
        raise ValueError(f"case: one of {', '.join(CASES)} is needed, not {case!r}")


def load_reference_checkpoint(path: str | Path, case: str, ema: bool = True) -> ReferenceNetworks:
    """Read a published file. ema: the averaged weights, else those that were trained.

    Raises ValueError for a file that is none of these, or of another case, naming the first difference.
    """
    _check_case(case)
    try:
        with zipfile.ZipFile(path) as saved:  # torch.load does not look at the checksums that torch.save writes
            if (damaged := saved.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} differs")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of the zip, of the pickle, of what it builds: a file from others can hold anything
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is no checkpoint of the authors', or damaged: {why}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is no checkpoint of the authors': it holds a {type(content).__name__}")
    step = content.get("iteration", 0)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path} is no checkpoint of the authors': its iteration is {step!r:.100}")
    found = build_case(case, step)
    parts = found.parts()
    for name in ("encoder", "decoder", "label_anchor"):
        if (name in content) != (name in parts):
            raise ValueError(f"{path} is not of {case}: it has {'a' if name in content else 'no'} {name}")
    for name, network in parts.items():
        _fill(network, content[name], f"{path}, {name}: not of {case}")
        if ema:
            _fill_averages(network, content.get(f"{name}_ema"), f"{path}, {name}_ema")
    return found


def _fill(network: nn.Module, state: Any, what: str) -> None:
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{what}: it holds no tensors by name")
    given = {name.removeprefix(PREFIX): value for name, value in state.items()}
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in given.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{what}: {name} is {theirs.get(name, 'missing')} there, {ours.get(name, 'missing')} here")
    network.load_state_dict(given)


@torch.no_grad()
def _fill_averages(network: nn.Module, state: Any, what: str) -> None:
    if not isinstance(state, Mapping) or not isinstance(averages := state.get("shadow_params"), list):
        raise ValueError(f"{what}: no averaged weights; load with ema=False")
    trainable = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if len(averages) != len(trainable):
        raise ValueError(f"{what}: {len(averages)} averages for {len(trainable)} trainable parameters")
    for (name, parameter), average in zip(trainable, averages, strict=True):
        if not isinstance(average, torch.Tensor):
            raise ValueError(f"{what}: the average of {name} is a {type(average).__name__}")
        if parameter.shape != average.shape:
            raise ValueError(f"{what}: the average of {name} is {tuple(average.shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(average)
