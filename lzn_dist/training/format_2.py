"""Checkpoints of format 2, which had an image encoder, an image decoder and label anchors, and a task for each: under
which names they keep tensors, and what their configuration says in today's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lzn_dist.config import Config, ConfigError, config_from
from lzn_dist.yaml_core import read_yaml

_NAMES = {"encoder.": "image.encoder.", "decoder.": "image.decoder.", "label_anchors.": "label.encoder."}
_RESNET = ("channels", "blocks", "stem")


def new_name(name: str) -> str:
    """Of a parameter: as it is called today."""
    return next((new + name.removeprefix(old) for old, new in _NAMES.items() if name.startswith(old)), name)


def old_key(key: str) -> str:
    """Of a stored tensor (weights.NAME and the like): as it was called."""
    kind, _, name = key.partition(".")
    return next((f"{kind}.{old}{name.removeprefix(new)}" for old, new in _NAMES.items() if name.startswith(new)), key)


def load_config(path: Path) -> Config:
    """Raises ConfigError."""
    try:
        found = read_yaml(path)
        return config_from(_converted(found), str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path} cannot be read: {error!r}") from error


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    task, encoder, decoder = values.pop("task"), dict(values.pop("encoder")), dict(values.pop("decoder"))
    optimizer, alignment = dict(values.pop("optimizer")), dict(values.pop("alignment"))
    rates = {name: optimizer.pop(f"{name}_lr") for name in ("encoder", "decoder", "label")}
    stops = {name: optimizer.pop(f"{name}_stop") for name in ("encoder", "decoder", "label")}
    kind, conditional = encoder.pop("kind"), decoder.pop("class_conditional") or task == "joint"
    own = ("blocks", "stem") if kind == "ncsnpp" else [name for name in encoder if name not in _RESNET]
    encoder = {name: value for name, value in encoder.items() if name not in own}

    def network(target: str, arguments: dict[str, Any], name: str) -> dict[str, Any]:
        return {"target": target, "arguments": arguments, "lr": rates[name], "stop": stops[name]}

    both, weight = alignment.pop("both_directions"), alignment.pop("weight")
    pairs: list[dict[str, Any]] = []
    if task == "joint":
        pairs = [{"latents": "image", "anchors": "label", "weight": weight}]
    elif task == "representation":
        share = 0.5 if both else 1.0
        pairs = [{"latents": "image.1", "anchors": "image.2", "weight": share}]
        pairs += [{"latents": "image.2", "anchors": "image.1", "weight": share}] if both else []
    decodes = task != "representation"
    return {
        **values,
        "optimizer": optimizer,
        "alignment": {**alignment, "pairs": pairs},
        "decode": [{"what": "image", "latents": "image", "class_conditional": conditional}] if decodes else [],
        "modalities": {
            "image": {
                "encoder": network(kind, encoder, "encoder"),
                "decoder": network("ncsnpp", decoder, "decoder"),
            },
            "label": {"encoder": network("label_anchors", {}, "label")},
        },
    }
