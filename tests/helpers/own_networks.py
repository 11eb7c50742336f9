"""Networks of one's own for lzn_dist: any nn.Module whose constructor takes what it needs of image_size,
image_channels, latent_dim and num_classes, and whatever else the configuration's `arguments` give it.

    modalities:
      image:
        encoder: {target: "tests.helpers.own_networks:Encoder", arguments: {width: 24}}
        decoder: {target: "tests.helpers.own_networks:Decoder"}
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Images [b, c, h, w] → anchors [b, latent_dim]; features are what probes read."""

    def __init__(self, image_size: int, image_channels: int, latent_dim: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(image_channels * image_size**2, width), nn.SiLU())
        self.head = nn.Linear(width, latent_dim)

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        anchors: Tensor = self.head(self.features(images))
        return anchors


class Decoder(nn.Module):
    """Rectified flow's velocity [b, c, h, w] at x_t and time t [b], under latents [b, D] and labels int64 [b]."""

    def __init__(self, image_channels: int, latent_dim: int, num_classes: int = 0, width: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.condition = nn.Linear(latent_dim + num_classes + 1, width)
        self.enter = nn.Conv2d(image_channels, width, 3, padding=1)
        self.middle = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.leave = nn.Conv2d(width, image_channels, 3, padding=1)

    def blocks(self) -> list[nn.Module]:
        """What is gathered (FSDP2) and recomputed (activation_checkpointing=selective) as a whole."""
        return [self.middle]

    def forward(
        self, x_t: Tensor, t: Tensor, latents: Tensor, labels: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        given = [latents, t[:, None].to(latents)]
        if labels is not None:
            given.append(F.one_hot(labels, self.num_classes).to(latents))
        h = self.enter(x_t) + self.condition(torch.cat(given, 1))[:, :, None, None]
        velocity: Tensor = self.leave(F.silu(h + self.middle(h)))
        return velocity
