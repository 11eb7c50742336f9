"""Overrides of a configuration, in fewer words."""

from __future__ import annotations

import json
from typing import Any


def encoder_with(**arguments: Any) -> list[str]:
    """Arguments of the images' encoder."""
    return _network("encoder", arguments)


def decoder_with(**arguments: Any) -> list[str]:
    """Arguments of the images' decoder."""
    return _network("decoder", arguments)


def both_with(**arguments: Any) -> list[str]:
    return encoder_with(**arguments) + decoder_with(**arguments)


def _network(role: str, arguments: dict[str, Any]) -> list[str]:
    return [f"modalities.image.{role}.arguments.{name}={json.dumps(value)}" for name, value in arguments.items()]


RESNET = "modalities.image.encoder.target=resnet"  # drops the arguments of the configuration's own class
OWN = [f"modalities.image.{role}.target=tests.helpers.own_networks:{role.title()}" for role in ("encoder", "decoder")]
BOTH_DIRECTIONS = (
    "alignment.pairs=[{latents: image.1, anchors: image.2, weight: 0.5}, "
    "{latents: image.2, anchors: image.1, weight: 0.5}]"
)
