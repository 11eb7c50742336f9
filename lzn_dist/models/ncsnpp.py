"""NCSN++ (Song et al. 2021, appendix H) as image decoder, and its down half as image encoder (arXiv 2509.15591).

The decoder is rectified flow's U-Net with the latent (and a one-hot label) beside the time embedding. The encoder
reads all feature maps of the down half, each through a small network of its own, and sums what they say.

State dicts have the names and the order of the published ones, so modules stand in one flat list,
``all_modules``; building and running walk it in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.models.layers import (
    FourierEmbedding,
    KeyedDropout,
    attention,
    convolution,
    dense,
    downsample,
    fan_avg_uniform_,
    group_norm,
    number_dropout_layers,
    positional_embedding,
    upsample,
)

TIME_SCALE = 999.0  # the networks were designed for times 0..999; rectified flow's t is in [0, 1]


class ResidualBlock(nn.Module):
    """BigGAN's residual block: (shortcut(x) + f(x)) / √2, up- or downsampling both ways inside."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding_dim: int | None,
        dropout: float,
        fir: bool,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.fir = fir
        self.resample = resample
        self.GroupNorm_0 = group_norm(inputs)
        self.Conv_0 = convolution(inputs, outputs, 3)
        self.Dense_0 = None if embedding_dim is None else dense(embedding_dim, outputs)
        self.GroupNorm_1 = group_norm(outputs)
        self.Dropout_0 = KeyedDropout(dropout)
        self.Conv_1 = convolution(outputs, outputs, 3, init_scale=0.0)
        changes = inputs != outputs or resample is not None
        self.Conv_2 = convolution(inputs, outputs, 1) if changes else None

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return upsample(x, self.fir) if self.resample == "up" else downsample(x, self.fir)

    def forward(self, x: Tensor, embedding: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """x [b, inputs, h, w], embedding [b, embedding_dim] or None, key int64 [b] → [b, outputs, h', w']."""
        h = self._resampled(F.silu(self.GroupNorm_0(x)))
        h = self.Conv_0(h)
        if self.Dense_0 is not None:
            assert embedding is not None
            h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Dropout_0(F.silu(self.GroupNorm_1(h)), key)
        h = self.Conv_1(h)
        shortcut = self._resampled(x)
        if self.Conv_2 is not None:
            shortcut = self.Conv_2(shortcut)
        total: Tensor = shortcut + h
        return total / math.sqrt(2.0)


class PointwiseDense(nn.Module):
    """A dense layer over the last dimension, [..., n] → [..., n], weights [in, out] ("NIN" in the state dicts)."""

    def __init__(self, channels: int, init_scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(fan_avg_uniform_(torch.empty(channels, channels), init_scale))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.t(), self.b)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, one head: (x + f(x)) / √2, [b, c, h, w] → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = group_norm(channels)
        self.NIN_0 = PointwiseDense(channels, init_scale=0.1)
        self.NIN_1 = PointwiseDense(channels, init_scale=0.1)
        self.NIN_2 = PointwiseDense(channels, init_scale=0.1)
        self.NIN_3 = PointwiseDense(channels, init_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.GroupNorm_0(x).flatten(2).transpose(1, 2)  # [b, h·w, c]
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = self.NIN_3(attention(q, k, v).squeeze(2))
        total: Tensor = x + h.transpose(1, 2).reshape(x.shape)
        return total / math.sqrt(2.0)


class InputSkip(nn.Module):
    """Adds the downsampled image to a feature map through a 1×1 convolution."""

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.Conv_0 = convolution(image_channels, channels, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        skipped: Tensor = self.Conv_0(image)
        return skipped + h


def fitting_multipliers(image_size: int) -> list[int]:
    """Levels of an image size: halved as long as 8 pixels are left and it can be; 1, 1, 2, 2, … times the channels from
    128 pixels on (as the published 256), 1, 2, 2, … below (as the published 32)."""
    levels = 1
    while image_size % 2 == 0 and image_size >= 8:
        image_size //= 2
        levels += 1
    return ([1, 1, *[2] * levels] if image_size << (levels - 1) >= 128 else [1, *[2] * levels])[:levels]


class _DownHalf(nn.Module):
    """What encoder and decoder share: the sizes, and the levels from the image down to the middle blocks."""

    all_modules: nn.ModuleList
    batch_independent: bool = True  # GroupNorm alone: a sample's output does not depend on the others of its batch

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        channels: int,
        channel_multipliers: Sequence[int] | None,
        residual_blocks: int,
        attention_resolutions: Sequence[int] | None,
        dropout: float,
        fir: bool,
        progressive: bool,
        embedding_dim: int | None,
    ) -> None:
        """channel_multipliers, attention_resolutions: None for what fits the image size."""
        super().__init__()
        if channel_multipliers is None:
            channel_multipliers = fitting_multipliers(image_size)
        if attention_resolutions is None:
            attention_resolutions = [
                size for level in range(len(channel_multipliers)) if (size := image_size >> level) <= 16
            ][:1]
        numbers = {
            "image_size": image_size,
            "image_channels": image_channels,
            "channels": channels,
            "residual_blocks": residual_blocks,
            **{f"channel_multipliers[{i}]": m for i, m in enumerate(channel_multipliers)},
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}: a positive number is needed, not {number}")
        levels = len(channel_multipliers)
        if levels == 0:
            raise ValueError("channel_multipliers: at least one level is needed")
        if image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size: {image_size} is not divisible by {2 ** (levels - 1)}, "
                f"which the {levels} levels of channel_multipliers need"
            )
        self.image_size = image_size
        self.image_channels = image_channels
        self.channels = channels
        self.widths = tuple(channels * m for m in channel_multipliers)
        self.resolutions = tuple(image_size >> level for level in range(levels))
        self.residual_blocks = residual_blocks
        self.attention_resolutions = self._known("attention_resolutions", attention_resolutions)
        self.dropout = dropout
        self.fir = fir
        self.progressive = progressive
        self.embedding_dim = embedding_dim

    def _known(self, name: str, resolutions: Sequence[int]) -> tuple[int, ...]:
        unknown = [r for r in resolutions if r not in self.resolutions]
        if unknown:
            raise ValueError(f"{name}: {unknown} are none of the levels' resolutions {list(self.resolutions)}")
        return tuple(resolutions)

    def _check_images(self, name: str, images: Tensor) -> None:
        expected = (self.image_channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"{name}: shape [b, {', '.join(map(str, expected))}] is needed, not {list(images.shape)}")

    def _block(self, inputs: int, outputs: int, resample: Literal["up", "down"] | None = None) -> ResidualBlock:
        return ResidualBlock(
            inputs, outputs, embedding_dim=self.embedding_dim, dropout=self.dropout, fir=self.fir, resample=resample
        )

    def _down_modules(self) -> tuple[list[nn.Module], list[tuple[int, int]]]:
        """The modules of the down half, and (resolution, channels) of the feature maps that it keeps."""
        modules: list[nn.Module] = [convolution(self.image_channels, self.channels, 3)]
        maps = [(self.image_size, self.channels)]
        for resolution, width in zip(self.resolutions, self.widths, strict=True):
            for _ in range(self.residual_blocks):
                modules.append(self._block(maps[-1][1], width))
                if resolution in self.attention_resolutions:
                    modules.append(AttentionBlock(width))
                maps.append((resolution, width))
            if resolution != self.resolutions[-1]:
                modules.append(self._block(width, width, resample="down"))
                if self.progressive:
                    modules.append(InputSkip(self.image_channels, width))
                maps.append((resolution // 2, width))
        width = self.widths[-1]
        modules += [self._block(width, width), AttentionBlock(width), self._block(width, width)]
        return modules, maps

    def _down(
        self, modules: Iterator[nn.Module], image: Tensor, embedding: Tensor | None, key: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Run _down_modules: the feature maps, and the output of the middle blocks at the lowest resolution."""
        maps: list[Tensor] = [next(modules)(image)]
        for resolution in self.resolutions:
            for _ in range(self.residual_blocks):
                h = next(modules)(maps[-1], embedding, key)
                if resolution in self.attention_resolutions:
                    h = next(modules)(h)
                maps.append(h)
            if resolution != self.resolutions[-1]:
                h = next(modules)(maps[-1], embedding, key)
                if self.progressive:
                    image = downsample(image, self.fir)
                    h = next(modules)(image, h)
                maps.append(h)
        h = next(modules)(maps[-1], embedding, key)
        h = next(modules)(h)
        middle: Tensor = next(modules)(h, embedding, key)
        return maps, middle

    def blocks(self) -> list[nn.Module]:
        """The units of sharding and recomputation: residual and attention blocks."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | AttentionBlock)]


class ImageEncoder(_DownHalf):
    """Images → anchors: the sum over feature maps f of dense_D(swish(dense(flatten(swish(conv1×1(f)))))).

    Published settings (section 4.1 and appendix of arXiv 2509.15591): the defaults are CIFAR10's; at 256² channel
    multipliers (1, 1, 2, 2, 2, 2, 2), 2 residual blocks, no dropout, FIR filter, progressive, and the maps of
    resolutions 64, 32, 16, 8 and 4 alone.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        image_channels: int = 3,
        channels: int = 128,
        channel_multipliers: Sequence[int] | None = (1, 2, 2, 2),
        residual_blocks: int = 4,
        attention_resolutions: Sequence[int] | None = (16,),
        dropout: float = 0.15,
        latent_dim: int = 200,
        fir: bool = False,
        progressive: bool = False,
        feature_resolutions: Sequence[int] | None = None,
        feature_channels: int = 20,
        hidden_dim: int = 200,
    ) -> None:
        """progressive: add the downsampled image at each level. feature_resolutions: of the maps that are read;
        None for all, or those of 64 pixels or fewer where channel_multipliers are None too, from 128 pixels on.
        Raises ValueError, naming the argument, for sizes that do not fit together.
        """
        super().__init__(
            image_size=image_size,
            image_channels=image_channels,
            channels=channels,
            channel_multipliers=channel_multipliers,
            residual_blocks=residual_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            fir=fir,
            progressive=progressive,
            embedding_dim=None,
        )
        for name, number in (
            ("latent_dim", latent_dim),
            ("feature_channels", feature_channels),
            ("hidden_dim", hidden_dim),
        ):
            if number < 1:
                raise ValueError(f"{name}: a positive number is needed, not {number}")
        read = self.resolutions if feature_resolutions is None else feature_resolutions
        if feature_resolutions is None and channel_multipliers is None and image_size >= 128:
            read = [size for size in self.resolutions if size <= 64]  # as the published 256
        self.feature_resolutions = self._known("feature_resolutions", read)
        if not self.feature_resolutions:
            raise ValueError("feature_resolutions: at least one resolution must be read")
        modules, maps = self._down_modules()
        maps.append((self.resolutions[-1], self.widths[-1]))  # the middle blocks' output
        # both are keyed by the map's number among all maps, as in the published state dicts
        self.spatial_transformations = nn.ModuleDict()
        self.latent_transformations = nn.ModuleDict()
        for number, (resolution, width) in enumerate(maps):
            if resolution in self.feature_resolutions:
                self.spatial_transformations[str(number)] = nn.Sequential(
                    convolution(width, feature_channels, 1), nn.SiLU(), nn.Flatten()
                )
                self.latent_transformations[str(number)] = nn.Sequential(
                    dense(feature_channels * resolution**2, hidden_dim), nn.SiLU(), dense(hidden_dim, latent_dim)
                )
        self.all_modules = nn.ModuleList(modules)
        self.feature_dim = hidden_dim * len(self.latent_transformations)
        number_dropout_layers(self)

    def _hidden(self, images: Tensor, key: Tensor | None) -> list[Tensor]:
        """Of each feature map that is read, the activations before its last dense layer: [b, hidden_dim] each."""
        self._check_images("images", images)
        maps, middle = self._down(iter(self.all_modules), images, None, key)
        maps.append(middle)
        hidden = []
        for number, spatial in self.spatial_transformations.items():
            head = cast(nn.Sequential, self.latent_transformations[number])
            hidden.append(F.silu(head[0](spatial(maps[int(number)]))))
        return hidden

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """images [b, c, h, w] in [−1, 1], key int64 [b] (dropout, in training mode) → anchors [b, latent_dim].

        Raises ValueError for images of another size, and for a missing key where dropout needs it.
        """
        anchors = images.new_zeros(())
        for head, hidden in zip(self.latent_transformations.values(), self._hidden(images, key), strict=True):
            anchors = anchors + cast(nn.Sequential, head)[2](hidden)
        return anchors

    def features(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """What a probe reads: the activations before every last dense layer, side by side, [b, feature_dim].

        The anchors are a linear function of them.
        """
        return torch.cat(self._hidden(images, key), dim=1)

    def feature_map(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """The middle blocks' output [b, c', h', w'], of the lowest resolution."""
        self._check_images("images", images)
        return self._down(iter(self.all_modules), images, None, key)[1]


class ImageDecoder(_DownHalf):
    """Rectified flow's velocity under a latent: (x_t, t, latent, label) → dx_t/dt.

    The embedding's input is [latent, one-hot label, time embedding]. Published settings: the defaults are
    CIFAR10's; at 256² channel multipliers (1, 1, 2, 2, 2, 2, 2), 2 residual blocks, no dropout, FIR filter,
    Fourier embedding, progressive, and the output scaled by sigma.
    """

    sigmas: Tensor

    def __init__(
        self,
        *,
        image_size: int = 32,
        image_channels: int = 3,
        channels: int = 128,
        channel_multipliers: Sequence[int] | None = (1, 2, 2, 2),
        residual_blocks: int = 4,
        attention_resolutions: Sequence[int] | None = (16,),
        dropout: float = 0.15,
        latent_dim: int = 200,
        num_classes: int = 0,
        fir: bool = False,
        embedding: Literal["positional", "fourier"] = "positional",
        progressive: bool = False,
        scale_by_sigma: bool = False,
    ) -> None:
        """latent_dim: 0 for a rectified flow without latents. num_classes: length of the one-hot label, 0 for none.
        embedding: of 999 t (positional) or log(999 t) (fourier). progressive: add the downsampled image at each level
        on the way down, and sum the levels' outputs, upsampled, on the way up. scale_by_sigma: divide the output by
        999 t.
        Raises ValueError, naming the argument, for sizes that do not fit together.
        """
        super().__init__(
            image_size=image_size,
            image_channels=image_channels,
            channels=channels,
            channel_multipliers=channel_multipliers,
            residual_blocks=residual_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            fir=fir,
            progressive=progressive,
            embedding_dim=4 * channels,
        )
        if embedding not in ("positional", "fourier"):
            raise ValueError(f"embedding: 'positional' or 'fourier' is needed, not {embedding!r}")
        if embedding == "positional" and channels % 2:
            raise ValueError(f"channels: the positional embedding needs an even number, not {channels}")
        if latent_dim < 0:
            raise ValueError(f"latent_dim: 0 or a positive number is needed, not {latent_dim}")
        if num_classes < 0:
            raise ValueError(f"num_classes: 0 or a positive number is needed, not {num_classes}")
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.embedding = embedding
        self.scale_by_sigma = scale_by_sigma
        # score models' noise levels: no output depends on them, but the published state dicts hold as many
        levels = 1000 if embedding == "positional" else 2000
        self.register_buffer("sigmas", torch.linspace(math.log(50.0), math.log(0.01), levels).exp())

        time_dim = channels if embedding == "positional" else 2 * channels
        modules: list[nn.Module] = [FourierEmbedding(channels)] if embedding == "fourier" else []
        modules += [dense(latent_dim + num_classes + time_dim, 4 * channels), dense(4 * channels, 4 * channels)]
        down, maps = self._down_modules()
        self.all_modules = nn.ModuleList([*modules, *down, *self._up_modules([width for _, width in maps])])
        number_dropout_layers(self)

    def _output(self, width: int) -> list[nn.Module]:
        return [group_norm(width), convolution(width, self.image_channels, 3, init_scale=0.0)]

    def _up_modules(self, skips: list[int]) -> list[nn.Module]:
        """The modules of the up half; skips: the channels of the feature maps of the way down."""
        modules: list[nn.Module] = []
        skips = list(skips)
        width = self.widths[-1]
        for resolution, level_width in zip(reversed(self.resolutions), reversed(self.widths), strict=True):
            for _ in range(self.residual_blocks + 1):
                modules.append(self._block(width + skips.pop(), level_width))
                width = level_width
            if resolution in self.attention_resolutions:
                modules.append(AttentionBlock(width))
            if self.progressive:
                modules += self._output(width)
            if resolution != self.image_size:
                modules.append(self._block(width, width, resample="up"))
        return modules if self.progressive else modules + self._output(width)

    def _up(
        self, modules: Iterator[nn.Module], maps: list[Tensor], h: Tensor, embedding: Tensor, key: Tensor | None
    ) -> Tensor:
        """Run _up_modules."""

        def output(h: Tensor) -> Tensor:
            normalised = F.silu(next(modules)(h))
            image: Tensor = next(modules)(normalised)
            return image

        total: Tensor | None = None  # of the levels' outputs so far
        for resolution in reversed(self.resolutions):
            for _ in range(self.residual_blocks + 1):
                h = next(modules)(torch.cat((h, maps.pop()), dim=1), embedding, key)
            if resolution in self.attention_resolutions:
                h = next(modules)(h)
            if self.progressive:
                total = output(h) if total is None else upsample(total, self.fir) + output(h)
            if resolution != self.image_size:
                h = next(modules)(h, embedding, key)
        return output(h) if total is None else total

    def _check(self, x_t: Tensor, t: Tensor, latents: Tensor, labels: Tensor | None) -> None:
        self._check_images("x_t", x_t)
        b = x_t.shape[0]
        if tuple(t.shape) != (b,):
            raise ValueError(f"t: shape [{b}] is needed, not {list(t.shape)}")
        if tuple(latents.shape) != (b, self.latent_dim):
            raise ValueError(f"latents: shape [{b}, {self.latent_dim}] is needed, not {list(latents.shape)}")
        if labels is None and self.num_classes:
            raise ValueError(f"labels: this decoder has num_classes={self.num_classes} and needs int64 labels, [{b}]")
        if labels is not None:
            if not self.num_classes:
                raise ValueError("labels: this decoder has num_classes=0 and takes none")
            if tuple(labels.shape) != (b,) or labels.dtype != torch.int64:
                raise ValueError(f"labels: int64 of shape [{b}] is needed, not {labels.dtype} {list(labels.shape)}")

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        latents: Tensor,
        labels: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Tensor:
        """x_t [b, c, h, w], t [b] in [0, 1], latents [b, latent_dim], labels int64 [b] where num_classes > 0,
        key int64 [b] (dropout, in training mode) → the velocity [b, c, h, w].

        With the Fourier embedding or scale_by_sigma t must be above 0 (the output is not finite at 0).
        Raises ValueError for other shapes, and for missing or superfluous labels or a missing key.
        """
        self._check(x_t, t, latents, labels)
        modules = iter(self.all_modules)
        times = TIME_SCALE * t
        if self.embedding == "fourier":
            time_embedding = next(modules)(times.log())
        else:
            time_embedding = positional_embedding(times, self.channels)
        parts = [latents, time_embedding]
        if labels is not None:
            # no label (negative): all zero
            parts.insert(1, F.one_hot(labels.clamp(min=0), self.num_classes) * (labels >= 0)[:, None])
        first, second = next(modules), next(modules)
        embedding = second(F.silu(first(torch.cat([part.to(x_t.dtype) for part in parts], dim=1))))

        maps, h = self._down(modules, x_t, embedding, key)
        velocity = self._up(modules, maps, h, embedding, key)
        return velocity / times[:, None, None, None].to(velocity.dtype) if self.scale_by_sigma else velocity
