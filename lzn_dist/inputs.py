"""What people give a model, as the tensors that it takes; what could be meant in two ways is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SLACK = 0.01  # beyond [−1, 1], as resampling leaves it


def as_images(images: Any, channels: int, size: int) -> Tensor:
    """Floating [b, channels, size, size] in [−1, 1] of a tensor or array [b, c, h, w] (or [c, h, w]), or a list of
    these or of PIL images.

    uint8 counts from 0 to 255 and becomes float32; floating values must be in [−1, 1]. PIL images are converted to grey
    or RGB, as those of shards are. Raises TypeError and ValueError, saying what was given and what to give.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence):
        images = _stacked([_as_tensor(image, channels) for image in images], channels, size)
    images = _as_tensor(images, channels)
    if images.dtype == torch.uint8:
        images = images.to(torch.float32).div_(127.5).sub_(1.0)
    elif not images.is_floating_point():
        raise TypeError(f"images must be uint8 from 0 to 255 or floating from -1 to 1, not {_kind(images)}")
    if images.dim() == 3:
        images = images.unsqueeze(0)
    if images.shape[1:] != (channels, size, size):
        given = list(images.shape)
        hint = ""
        if images.dim() == 4 and given[1:] == [size, size, channels]:
            hint = ": channels stand last, images.permute(0, 3, 1, 2) brings them to the front"
        elif images.dim() == 4 and given[1] != channels and given[1] in (1, 3):
            hint = f": this model takes {'grey' if channels == 1 else 'RGB'} images"
        elif images.dim() == 4:
            hint = f": bring them to {size}x{size} first"
        raise ValueError(f"images must be [b, {channels}, {size}, {size}], got {given}{hint}")
    if images.numel():
        low, high = (float(value) for value in images.detach().aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("images hold NaN or infinity")
        if low < -1 - SLACK or high > 1 + SLACK:
            raise ValueError(
                f"images must be from -1 to 1, these are from {low:.3g} to {high:.3g}: give pixels from 0 to 255 as "
                "uint8, or images / 127.5 - 1"
            )
    return images


def _as_tensor(image: Any, channels: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        from lzn_dist.data.pixels import convert  # decoders, which a model does not need

        pixels = np.array(convert(image, channels == 1))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
    if isinstance(image, np.ndarray) and image.dtype.kind in "uifb":
        return torch.from_numpy(np.array(image))
    raise TypeError(f"images must be tensors, arrays or PIL images, not {_kind(image)}")


def _stacked(images: list[Tensor], channels: int, size: int) -> Tensor:
    if not images:
        return torch.zeros(0, channels, size, size)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or len({image.dtype for image in images}) > 1:
        raise ValueError(f"images of different sizes or types in one list ({sorted(shapes)[:3]}): make them alike")
    return torch.stack(images)


def as_labels(labels: Any, n: int) -> Tensor:
    """int64 [n] of one label for all, or of n labels: a number, a list, an array or a tensor of whole numbers."""
    try:
        found = labels if isinstance(labels, Tensor) else torch.from_numpy(np.atleast_1d(np.asarray(labels)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"labels must be whole numbers, not {_kind(labels)}") from error
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"labels must be whole numbers, not {_kind(found)}")
    single = found.dim() == 0 or (not isinstance(labels, Tensor) and np.ndim(labels) == 0)
    if single:
        return found.reshape(1).to(torch.int64).expand(n)
    if found.shape != (n,):
        raise ValueError(f"labels must be one label or int64 [{n}], got {[*found.shape]}")
    return found.to(torch.int64)


def as_texts(texts: Any) -> list[str]:
    """A text or several. Raises TypeError."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence | np.ndarray) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a str or a list of them, not {_kind(texts)}")
    return [str(text) for text in texts]


def as_count(n: Any) -> int:
    """A number of samples, 0 at least."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
        raise ValueError(f"n must be a whole number, 0 or more, not {n!r}")
    return int(n)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return type(value).__name__ + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")
