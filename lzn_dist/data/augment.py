"""Augmentations of whole batches, each sample's randomness from its own key.

A policy is a function (images [b, c, h, w], keys int64 [b]) -> images [b, c, h', w']: row i depends on images[i] and
keys[i] alone, hence not on rank, micro-batch or worker. ``two_views`` makes the keys; a further policy (SimCLR's,
say) is one more class with the same call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.keyed_random import fold, make_key, uniform


class Policy(Protocol):
    """Augments images [b, c, h, w] with values in [-1, 1] under keys int64 [b]; values stay in [-1, 1]."""

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DigitsPolicy:
    """Small affine maps and changes of intensity. No flips: a mirrored 2 or 5 is no digit.

    Angles in degrees, translation in pixels, each uniform in ± its value; zoom and contrast are factors, uniform in
    1 ± their value; brightness is added, uniform in ±. What comes from outside the image has the value ``fill``.
    """

    rotation: float = 15.0
    zoom: float = 0.15
    translation: float = 1.0
    shear: float = 10.0
    contrast: float = 0.4
    brightness: float = 0.2
    fill: float = -1.0

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        moved = affine(images, self.sample_affine(fold(keys, 0)), self.fill)
        contrast, brightness = (2.0 * uniform(fold(keys, 1), (2,)) - 1.0).unbind(-1)
        return adjust_intensity(moved, 1.0 + self.contrast * contrast, self.brightness * brightness)

    def sample_affine(self, keys: Tensor) -> Tensor:
        """Matrices float32 [b, 2, 3] from keys int64 [b], in pixels from the image's centre, output to input."""
        rotation, shear, zoom, dx, dy = (2.0 * uniform(keys, (5,)) - 1.0).unbind(-1)
        angle = rotation * math.radians(self.rotation)
        slant = torch.tan(shear * math.radians(self.shear))
        scale = 1.0 / (1.0 + self.zoom * zoom)
        cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
        # rotation · shear [[1, slant], [0, 1]], then the translation
        rows = (cos, cos * slant - sin, dx * self.translation, sin, sin * slant + cos, dy * self.translation)
        return torch.stack(rows, dim=-1).reshape(-1, 2, 3)


def affine(images: Tensor, matrices: Tensor, fill: float) -> Tensor:
    """Resample images [b, c, h, w] bilinearly: the output at pixel p from the centre is the input at A p + t.

    matrices [b, 2, 3] hold [A | t] in pixels, p = (x, y) with y downwards; outside the input is ``fill``.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, dtype=images.dtype, device=images.device) - (height - 1) / 2).unsqueeze(-1)
    # written out where affine_grid would multiply matrices, which on GPUs may round the coordinates to TF32
    a = matrices.to(images.dtype)[..., None, None]
    grid_x = (a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2]) * (2.0 / width)
    grid_y = (a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2]) * (2.0 / height)
    grid = torch.stack((grid_x, grid_y), dim=-1)
    # grid_sample pads with 0, hence the shift
    return F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def adjust_intensity(images: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """contrast [b] about each image's mean, brightness [b] added, clipped to [-1, 1]: [b, c, h, w] in and out."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    scaled = (images - mean) * contrast.view(-1, 1, 1, 1) + mean + brightness.view(-1, 1, 1, 1)
    return scaled.clamp(-1.0, 1.0)


def two_views(images: Tensor, index: Tensor, epoch: int, seed: int, policy: Policy) -> tuple[Tensor, Tensor]:
    """Two augmentations of each image, view v of sample i under the key (seed, "augment", i, epoch, v).

    images [b, c, h, w] in [-1, 1], index int64 [b] the samples' place in the data set; returns two [b, c, h', w'].
    """
    index = index.to(images.device)
    view1, view2 = (policy(images, make_key(seed, "augment", index, epoch, view)) for view in range(2))
    return view1, view2


def random_flip(images: Tensor, index: Tensor, epoch: int, seed: int) -> Tensor:
    """Mirror each of images [b, c, h, w] left to right with probability 1/2, keyed by (seed, index [b], epoch)."""
    chance = uniform(make_key(seed, "flip", index.to(images.device), epoch))
    return torch.where((chance < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
