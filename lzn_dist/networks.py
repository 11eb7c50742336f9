"""The trainable networks of a run, built from its configuration: one module for all engines."""

from __future__ import annotations

from typing import Any

from torch import nn

from lzn_dist.config import Config, EncoderConfig, NetworkConfig
from lzn_dist.models import ImageDecoder, ImageEncoder, LabelAnchors, ResNetEncoder


class Networks(nn.Module):
    """encoder, or None: images → anchors; decoder, or None: rectified flow's velocity; label_anchors: [classes, D]."""

    def __init__(self, encoder: nn.Module | None, decoder: nn.Module | None, label_anchors: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.label_anchors = label_anchors

    def blocks(self) -> list[nn.Module]:
        """The blocks of all networks: what may not be split when they are sharded or recomputed."""
        return [block for network in self.children() for block in blocks_of(network)]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What the network itself names by its method `blocks`, else all of it."""
    named = getattr(network, "blocks", None)
    return list(named()) if callable(named) and not isinstance(named, nn.Module) else [network]


def build_networks(config: Config) -> Networks:
    """Fresh networks; the initial weights come from torch's global generator, which the caller seeds.

    Raises ValueError, naming the argument, for sizes that do not fit together.
    """
    data = config.data
    image_encoder = None if config.objective == "rectified_flow" else _encoder(config)
    decoder: nn.Module | None = None
    if config.task != "representation":
        decoder = ImageDecoder(
            **_shared(config), latent_dim=config.decoder_latent_dim, **_sizes(config.decoder),
            num_classes=data.num_classes if config.labels_decoder else 0, embedding=config.decoder.embedding,
            scale_by_sigma=config.decoder.scale_by_sigma,
        )  # fmt: skip
    labels = LabelAnchors(data.num_classes, config.latent.dim) if config.task == "joint" else None
    return Networks(image_encoder, decoder, labels)


def _encoder(config: Config) -> nn.Module:
    data, encoder = config.data, config.encoder
    supervised = config.objective == "supervised"
    outputs = data.num_classes if supervised else config.latent.dim
    if encoder.kind == "resnet":
        return ResNetEncoder(
            image_channels=data.image_channels, latent_dim=outputs, channels=encoder.channels,
            blocks=encoder.blocks, stem=encoder.stem, head="linear" if supervised else "projection",
        )  # fmt: skip
    return ImageEncoder(
        **_shared(config), latent_dim=outputs, **_sizes(encoder), feature_resolutions=encoder.feature_resolutions
    )


def _shared(config: Config) -> dict[str, Any]:
    return {"image_size": config.data.image_size, "image_channels": config.data.image_channels}


def _sizes(network: NetworkConfig) -> dict[str, Any]:
    return {name: getattr(network, name) for name in NetworkConfig.model_fields}


def level_sizes(image_size: int) -> list[int]:
    """Resolutions of an NCSN++ for images of a size: halved as long as 8 pixels are left and it can be."""
    sizes = [image_size]
    while sizes[-1] % 2 == 0 and sizes[-1] >= 8:
        sizes.append(sizes[-1] // 2)
    return sizes


def fitted(network: NetworkConfig, image_size: int) -> dict[str, Any]:
    """What a network's settings leave open (null), by the image size: levels of 1, 1, 2, 2, … times the channels from
    128 pixels on (as the published 256), 1, 2, 2, … below (as the published 32); attention at 16 pixels or fewer."""
    changes: dict[str, Any] = {}
    multipliers = network.channel_multipliers
    if multipliers is None:
        levels = len(level_sizes(image_size))
        multipliers = tuple([1, 1, *[2] * levels] if image_size >= 128 else [1, *[2] * levels])[:levels]
        changes["channel_multipliers"] = multipliers
        if isinstance(network, EncoderConfig) and network.feature_resolutions is None and image_size >= 128:
            sizes = [image_size >> level for level in range(levels)]
            changes["feature_resolutions"] = tuple(size for size in sizes if size <= 64)
    if network.attention_resolutions is None:
        sizes = [image_size >> level for level in range(len(multipliers))]
        changes["attention_resolutions"] = tuple(size for size in sizes if size <= 16)[:1]
    return changes
