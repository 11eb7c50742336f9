"""ResNet with bottleneck blocks and GroupNorm as image encoder (He et al. 2016; arXiv 2509.15591, section 4.2).

As published: ResNet-50, GroupNorm(32), the last normalisation of a block starting at 0, and a head of two dense
layers without bias. State dicts have the names and the order of the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.models.layers import GroupNorm

_EXPANSION = 4  # a bottleneck block's output channels over its inner ones


class _Norms:
    """Makes GroupNorms with at most ``groups`` groups.

    A group never holds a single number (it would be normalised to 0): at least 2 channels of a map and 8 numbers
    of the head's vectors. The published sizes have ``groups`` groups everywhere.
    """

    def __init__(self, groups: int) -> None:
        if groups < 1:
            raise ValueError(f"groups: a positive number is needed, not {groups}")
        self.groups = groups

    def __call__(self, argument: str, channels: int, least: int = 2) -> GroupNorm:
        groups = max(1, min(self.groups, channels // least))
        if channels % groups or channels < least:
            raise ValueError(f"{argument}: {channels} channels cannot be normalised in {groups} equal groups")
        return GroupNorm(groups, channels)


class _Projection(nn.Module):
    """The shortcut of a block that changes resolution or channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norms: _Norms) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn = nn.Sequential(norms("channels", outputs))

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.bn(self.shortcut(x))
        return projected


class BottleneckBlock(nn.Module):
    """relu(shortcut(x) + f(x)), f: 1×1, 3×3 (with the stride), 1×1 convolutions, [b, c, h, w] → [b, 4 inner, …]."""

    def __init__(self, inputs: int, inner: int, stride: int, project: bool, norms: _Norms) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.projection = _Projection(inputs, outputs, stride, norms) if project else None
        last = norms("channels", outputs)
        nn.init.zeros_(last.weight)  # the block starts as its shortcut
        self.net = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.Sequential(norms("channels", inner), nn.ReLU()),
            nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False),
            nn.Sequential(norms("channels", inner), nn.ReLU()),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.Sequential(last),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        return F.relu(shortcut + self.net(x))


class _Stage(nn.Module):
    """Blocks of one resolution; the first one has the stride and a projection."""

    def __init__(self, inputs: int, inner: int, stride: int, blocks: int, norms: _Norms) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                BottleneckBlock(
                    inputs if first else _EXPANSION * inner, inner, stride if first else 1, project=first, norms=norms
                )
                for first in (block == 0 for block in range(blocks))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(x)
        return h


class _Head(nn.Module):
    def __init__(self, inputs: int, outputs: int, norms: _Norms) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, inputs, bias=False),
            norms("channels", inputs, least=8),
            nn.ReLU(),
            nn.Linear(inputs, outputs, bias=False),
            norms("latent_dim", outputs, least=8),
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h


class ResNetEncoder(nn.Module):
    """Images → anchors. The defaults are the published ResNet-50."""

    batch_independent: bool = True  # GroupNorm alone: a sample's output does not depend on the others of its batch

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_dim: int = 256,
        channels: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        stem: Literal["imagenet", "small"] = "imagenet",
        groups: int = 32,
        head: Literal["projection", "linear"] = "projection",
    ) -> None:
        """channels: of the stem and inside the first stage's blocks; each stage doubles them and halves the
        resolution. blocks: of each stage. stem: 7×7 with stride 2 and pooling, or 3×3 for small images.
        groups: of GroupNorm, at most (see _Norms). head: the published one, or one dense layer, whose output are a
        classifier's logits. Raises ValueError, naming the argument.
        """
        super().__init__()
        for name, number in (("image_channels", image_channels), ("latent_dim", latent_dim), ("channels", channels)):
            if number < 1:
                raise ValueError(f"{name}: a positive number is needed, not {number}")
        if not blocks or min(blocks) < 1:
            raise ValueError(f"blocks: a positive number for each stage is needed, not {list(blocks)}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem: 'imagenet' or 'small' is needed, not {stem!r}")
        norms = _Norms(groups)
        self.image_channels = image_channels
        normalised = nn.Sequential(norms("channels", channels), nn.ReLU())
        if stem == "imagenet":
            first = nn.Sequential(
                nn.Conv2d(image_channels, channels, 7, stride=2, padding=3, bias=False),
                normalised,
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        else:
            first = nn.Sequential(nn.Conv2d(image_channels, channels, 3, padding=1, bias=False), normalised)
        stages: list[nn.Module] = []
        inputs = channels
        for number, count in enumerate(blocks):
            inner = channels * 2**number
            stages.append(_Stage(inputs, inner, stride=1 if number == 0 else 2, blocks=count, norms=norms))
            inputs = _EXPANSION * inner
        self.net = nn.Sequential(first, *stages)
        self.head = nn.Linear(inputs, latent_dim) if head == "linear" else _Head(inputs, latent_dim, norms)
        self.feature_dim = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """images [b, c, h, w] in [−1, 1] → the mean over the last map's pixels, [b, feature_dim] (2048).

        key is not used: there is no dropout. Raises ValueError for images of another shape.
        """
        return self.feature_map(images, key).mean(dim=(2, 3))

    def feature_map(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """The last map [b, feature_dim, h', w']."""
        if images.dim() != 4 or images.shape[1] != self.image_channels:
            raise ValueError(f"images: shape [b, {self.image_channels}, h, w] is needed, not {list(images.shape)}")
        h: Tensor = self.net((images + 1.0) / 2.0)  # as published, the network sees [0, 1]
        return h

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """images [b, c, h, w] in [−1, 1] → anchors [b, latent_dim]; key as in features."""
        anchors: Tensor = self.head(self.features(images, key))
        return anchors

    def blocks(self) -> list[nn.Module]:
        """The units of sharding and recomputation: bottleneck blocks."""
        return [module for module in self.modules() if isinstance(module, BottleneckBlock)]
