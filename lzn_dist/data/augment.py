"""Augmentations of whole batches on the device, each sample's randomness from its own key.

A policy is a function (images [b, c, h, w], keys int64 [b]) -> images [b, c, h', w']: row i depends on images[i] and
keys[i] alone, hence not on rank, micro-batch or worker. ``make_views`` makes the keys. What changes an image's size is
done where it is decoded (pixels.py: SimCLR's crops), under the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        keys = _sent(keys, images)
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


@dataclass(frozen=True)
class SimCLRPolicy:
    """SimCLR's changes after the crop (Chen et al. 2020, appendix A): mirror, colour jitter, grey, blur.

    Jitter: brightness, contrast and saturation by factors uniform in 1 ± their value, hue by a turn uniform in ± its
    value, in random order, all with probability `jitter`. Blur: kernel of `blur_kernel` pixels, sigma in pixels
    uniform in `blur_sigma`; with probability 1 as in LZN, case study 2 (SimCLR: 0.5). RGB alone, square images.
    """

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grey: float = 0.2
    blur: float = 1.0
    blur_kernel: int = 23
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        # on the host, so that rows are chosen without waiting for the device
        chance = uniform(fold(keys.cpu(), 1), (4,))
        amounts = uniform(fold(keys.cpu(), 2), (5,))
        order = torch.argsort(uniform(fold(keys.cpu(), 3), (4,)), dim=-1)
        images = (images + 1.0) / 2.0
        mirrored = chance[:, 0] < self.flip
        images = torch.where(_per_image(mirrored, images), images.flip(-1), images)
        jittered = chance[:, 1] < self.jitter
        factors = 1.0 + (2.0 * amounts - 1.0) * torch.tensor(
            [self.brightness, self.contrast, self.saturation, self.hue, 0.0]
        )
        factors = factors.clamp_min(0.0)
        changes = (
            adjust_brightness,
            adjust_contrast,
            adjust_saturation,
            lambda x, factor: adjust_hue(x, factor - 1.0),
        )
        for place in range(4):
            for number, change in enumerate(changes):
                rows = torch.nonzero(jittered & (order[:, place] == number)).squeeze(-1)
                if len(rows):
                    there, factor = _sent(rows, images), _sent(factors[rows, number], images)
                    images[there] = change(images[there], factor)
        grey = chance[:, 2] < self.grey
        images = torch.where(_per_image(grey, images), luminance(images).expand_as(images), images)
        low, high = self.blur_sigma
        blurred = torch.nonzero(chance[:, 3] < self.blur).squeeze(-1)
        if len(blurred):
            there, sigma = _sent(blurred, images), _sent(low + (high - low) * amounts[blurred, 4], images)
            images[there] = gaussian_blur(images[there], sigma, self.blur_kernel)
        return images.mul_(2.0).sub_(1.0)


def _sent(values: Tensor, images: Tensor) -> Tensor:
    """Values of the host, where the images are; a GPU is not waited for."""
    if values.device == images.device:
        return values
    return values.pin_memory().to(images.device, non_blocking=True)


def _per_image(flags: Tensor, images: Tensor) -> Tensor:
    return _sent(flags, images).view(-1, 1, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma of RGB images [b, 3, h, w]: [b, 1, h, w]."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return (weight * images + (1.0 - weight) * other).clamp_(0.0, 1.0)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images [b, 3, h, w] in [0, 1] blended with black: factor [b] of the image, clipped to [0, 1]."""
    return _blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images [b, 3, h, w] in [0, 1] blended with their mean luminance: factor [b] of the image, clipped to [0, 1]."""
    return _blend(images, luminance(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images [b, 3, h, w] in [0, 1] blended with their luminance: factor [b] of the image, clipped to [0, 1]."""
    return _blend(images, luminance(images), factor)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV by `turn` [b] of a whole turn: [b, 3, h, w] in [0, 1], in and out."""
    red, green, blue = images.unbind(1)
    value, which = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    # hue in sixths of a turn
    hue = torch.where(
        which == 0, (green - blue) / safe, torch.where(which == 1, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    hue = hue + 6.0 * turn.view(-1, 1, 1)
    # each channel by its place on the colour circle (A. R. Smith 1978, in the form without cases)
    channels = []
    for place in (5.0, 3.0, 1.0):
        k = torch.remainder(place + hue, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur images [b, c, h, w], each by its own sigma [b] in pixels, with a kernel of `kernel` (odd) taps and
    reflected borders, as torchvision's gaussian_blur. Rows and columns are products with banded matrices."""
    height, width = images.shape[-2:]
    down, across = (_blur_matrix(sigma, size, kernel) for size in (height, width))
    return down.unsqueeze(1) @ images @ across.unsqueeze(1).transpose(-1, -2)


def _blur_matrix(sigma: Tensor, size: int, kernel: int) -> Tensor:
    """[b, size, size]: row i holds the weights of the pixels that pixel i of a blurred line is made of."""
    if size <= kernel // 2:
        raise ValueError(f"images of {size} pixels are too small for a blur over {kernel} pixels")
    taps = torch.arange(kernel, device=sigma.device) - kernel // 2
    weights = torch.exp(-0.5 * (taps / sigma.unsqueeze(-1)) ** 2)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    source = torch.arange(size, device=sigma.device).unsqueeze(-1) + taps
    source = source.abs()  # reflected without repeating the border
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device, dtype=weights.dtype)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), -1, -1), weights.unsqueeze(1).expand(-1, size, -1).contiguous()
    )


def make_views(images: Sequence[Tensor], index: Tensor, epoch: int, seed: int, policy: Policy) -> tuple[Tensor, Tensor]:
    """Two augmentations of each image, view v of sample i under the key (seed, "augment", i, epoch, v).

    images: one [b, c, h, w] in [-1, 1] for both views, or one for each; index int64 [b] the samples' place in the data
    set. Returns two [b, c, h', w'].
    """
    first, second = images if len(images) == 2 else (images[0], images[0])
    view1, view2 = (
        policy(image, make_key(seed, "augment", index, epoch, view)) for view, image in enumerate((first, second))
    )
    return view1, view2


def random_flip(images: Tensor, index: Tensor, epoch: int, seed: int) -> Tensor:
    """Mirror each of images [b, c, h, w] left to right with probability 1/2, keyed by (seed, index [b], epoch)."""
    chance = uniform(make_key(seed, "flip", index.to(images.device), epoch))
    return torch.where((chance < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
