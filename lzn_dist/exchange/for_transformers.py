"""An encoder as a folder that transformers loads by itself, with the source of its network beside the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn

from lzn_dist import __version__
from lzn_dist.exchange.folder import Loaded, save_tensors
from lzn_dist.modalities import modality
from lzn_dist.models import ImageEncoder, ResNetEncoder, TextEncoder
from lzn_dist.networks import constructed_with
from lzn_dist.objectives import given_for

# the files that each class needs, beside modeling_lzn.py
SOURCES: dict[type[nn.Module], tuple[str, ...]] = {
    ImageEncoder: ("models/ncsnpp", "models/layers", "keyed_random"),
    ResNetEncoder: ("models/resnet", "models/layers", "keyed_random"),
    TextEncoder: ("models/text", "models/layers", "keyed_random"),
}
_IMPORT = re.compile(r"^from lzn_dist\.(?:models\.)?(\w+) import", re.MULTILINE)


def can_be_written(network: nn.Module | None) -> bool:
    """Whether an encoder is one of ours, whose source can stand by itself."""
    return type(network) in SOURCES


def write_encoder(folder: Path, model: Loaded, name: str) -> None:
    """Write the encoder of a data type into a folder that is there. Raises OSError."""
    network = model.networks.find(name, "encoder")
    assert network is not None
    kind, here = type(network), Path(__file__).parents[1]
    for source in ("exchange/modeling_lzn", *SOURCES[kind]):
        text = (here / f"{source}.py").read_text(encoding="utf-8")
        module = SOURCES[kind][0].rpartition("/")[2]
        text = text.replace(
            "from lzn_dist.models.ncsnpp import ImageEncoder as Network",
            f"from .{module} import {kind.__name__} as Network",
        )
        text = _IMPORT.sub(r"from .\1 import", text)
        origin = f"# From lzn_dist {__version__} (MIT license), by `lzn_dist export`.\n"
        (folder / f"{source.rpartition('/')[2]}.py").write_text(origin + text, encoding="utf-8")
    of_type = modality(name, model.config)
    centre = model.centres.get(name)
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors["centre"] = torch.zeros(model.config.latent.dim) if centre is None else centre
    save_tensors(tensors, folder / "model.safetensors")
    lzn, arguments = model.config.objective == "lzn", model.config.network(name, "encoder").arguments
    values = {
        "model_type": "lzn_encoder", "architectures": ["LZNEncoder"],
        "auto_map": {"AutoConfig": "modeling_lzn.LZNEncoderConfig", "AutoModel": "modeling_lzn.LZNEncoder"},
        "arguments": constructed_with(kind, given_for(model.config, name, "encoder"), arguments),
        "latent_dim": model.config.latent.dim,
        "centred": bool(lzn and of_type.centred), "norm": of_type.norm if lzn else None, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def torchvision_weights(network: nn.Module) -> dict[str, torch.Tensor] | None:
    """A ResNet's weights under torchvision's and timm's names (resnet50(norm_layer=GroupNorm of 32 groups) there,
    resnet50_gn here; the head is not of theirs and is left out); None where the layers are not theirs.

    These networks see (image + 1) / 2, which is what both get without a normalisation by mean and deviation.
    """
    if not isinstance(network, ResNetEncoder):
        return None
    norms = [module for module in network.net.modules() if isinstance(module, nn.GroupNorm)]
    first = network.net[0]
    if not isinstance(first[-1], nn.MaxPool2d) or any(norm.num_groups != 32 for norm in norms):  # type: ignore[index]
        return None
    found = {}
    for name, value in network.net.state_dict().items():
        stage, _, rest = name.partition(".")
        if stage == "0":
            rest = {"0.weight": "conv1.weight", "1.0.weight": "bn1.weight", "1.0.bias": "bn1.bias"}[rest]
            found[rest] = value
            continue
        block, inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", rest).groups()  # type: ignore[union-attr]
        for ours, theirs in (
            ("projection.shortcut.", "downsample.0."), ("projection.bn.0.", "downsample.1."),
            ("net.0.", "conv1."), ("net.1.0.", "bn1."), ("net.2.", "conv2."), ("net.3.0.", "bn2."),
            ("net.4.", "conv3."), ("net.5.0.", "bn3."),
        ):  # fmt: skip
            if inner.startswith(ours):
                found[f"layer{stage}.{block}.{theirs}{inner.removeprefix(ours)}"] = value
                break
        else:
            return None
    return found
