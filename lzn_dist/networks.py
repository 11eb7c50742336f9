"""The trainable networks of a run, built from its configuration: one module for all engines."""

from __future__ import annotations

from typing import Any

from torch import nn

from lzn_dist.config import Config, NetworkConfig
from lzn_dist.models import ImageDecoder, ImageEncoder, LabelAnchors, ResNetEncoder


class Networks(nn.Module):
    """encoder: images → anchors; decoder, or None: rectified flow's velocity; label_anchors, or None: [classes, D]."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, label_anchors: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.label_anchors = label_anchors


def build_networks(config: Config) -> Networks:
    """Fresh networks; the initial weights come from torch's global generator, which the caller seeds.

    Raises ValueError, naming the argument, for sizes that do not fit together.
    """
    data, encoder = config.data, config.encoder
    if encoder.kind == "resnet":
        image_encoder: nn.Module = ResNetEncoder(
            image_channels=data.image_channels, latent_dim=config.latent.dim, channels=encoder.channels,
            blocks=encoder.blocks, stem=encoder.stem,
        )  # fmt: skip
    else:
        image_encoder = ImageEncoder(
            **_shared(config), latent_dim=config.latent.dim, **_sizes(encoder),
            feature_resolutions=encoder.feature_resolutions,
        )  # fmt: skip
    decoder: nn.Module | None = None
    if config.task != "representation":
        decoder = ImageDecoder(
            **_shared(config), latent_dim=config.latent.dim, **_sizes(config.decoder),
            num_classes=data.num_classes if config.task == "joint" else 0, embedding=config.decoder.embedding,
            scale_by_sigma=config.decoder.scale_by_sigma,
        )  # fmt: skip
    labels = LabelAnchors(data.num_classes, config.latent.dim) if config.task == "joint" else None
    return Networks(image_encoder, decoder, labels)


def _shared(config: Config) -> dict[str, Any]:
    return {"image_size": config.data.image_size, "image_channels": config.data.image_channels}


def _sizes(network: NetworkConfig) -> dict[str, Any]:
    return {name: getattr(network, name) for name in NetworkConfig.model_fields}
