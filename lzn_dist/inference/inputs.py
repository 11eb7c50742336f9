"""What people give a model, as the tensors that it takes; what could be meant in two ways is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lzn_dist.paths import expand_path

# what methods take for images [b, c, h, w], labels int64 [b] and texts: tensors, or what is made into them here
Images: TypeAlias = Any
Labels: TypeAlias = Any
Texts: TypeAlias = "str | Sequence[str]"

SLACK = 0.01  # beyond [−1, 1], as resampling leaves it


def as_images(images: Any, channels: int, size: int, shorter: int = 0) -> Tensor:
    """Floating [b, channels, size, size] in [−1, 1] of images.

    Tensors and arrays: [b, c, h, w] or [b, h, w, c], a single one without b, grey ones also without c; of the size that
    the model takes. uint8 counts from 0 to 255 and becomes float32; floating values must be in [−1, 1].
    PIL images and paths (str or Path; one, or a list): any size and mode. They are turned upright as their EXIF says,
    converted to grey or RGB, their shorter side is brought to `shorter` pixels (0: size), and the central square
    counts, as in the run's evaluation. Lists may also hold tensors or arrays of one shape.
    Raises TypeError and ValueError, saying what was given and what to give; OSError for a path that is not there,
    ValueError for a file that is no image.
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        images = [images]
    if isinstance(images, Sequence):
        images = _stacked([_as_tensor(image, channels, size, shorter) for image in images], channels, size)
    images = _batch(_as_tensor(images, channels, size, shorter), channels, size)
    if images.dtype == torch.uint8:
        images = images.to(torch.float32).div_(127.5).sub_(1.0)
    elif not images.is_floating_point():
        raise TypeError(f"images must be uint8 from 0 to 255 or floating from -1 to 1, not {_kind(images)}")
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


def _batch(images: Tensor, channels: int, size: int) -> Tensor:
    """[b, channels, size, size] of what can only be meant so."""
    shape = tuple(images.shape)
    first, last = (channels, size, size), (size, size, channels)
    if shape[-3:] == first and len(shape) in (3, 4):
        return images.reshape(-1, *first)
    if shape[-3:] == last and len(shape) in (3, 4):
        return images.reshape(-1, *last).permute(0, 3, 1, 2)
    if channels == 1 and shape[-2:] == (size, size) and len(shape) in (2, 3):
        return images.reshape(-1, *first)
    hint = ""
    if len(shape) in (3, 4):
        own = {shape[-3], shape[-1]} & {1, 3, 4}
        if channels not in own and own and size in shape[-3:]:
            hint = f": this model takes {'grey' if channels == 1 else 'RGB'} images"
        else:
            hint = f": bring them to {size}x{size} first, or give PIL images or paths, which are resized and cropped"
    raise ValueError(f"images must be [b, {channels}, {size}, {size}], got {list(shape)}{hint}")


def _as_tensor(image: Any, channels: int, size: int, shorter: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | os.PathLike):
        return image_from(Path(expand_path(os.fspath(image))), channels, size, shorter)
    if isinstance(image, Image.Image):
        from lzn_dist.data.pixels import centre_crop, convert  # decoders, which tensors do not need

        upright = ImageOps.exif_transpose(image)
        pixels = np.array(convert(upright, channels == 1))
        return centre_crop(pixels.reshape(*pixels.shape[:2], channels), size, shorter or size)
    if isinstance(image, np.ndarray) and image.dtype.kind in "uifb":
        return torch.from_numpy(np.array(image))
    raise TypeError(f"images must be tensors, arrays, PIL images or paths, not {_kind(image)}")


def image_from(path: Path, channels: int, size: int, shorter: int = 0) -> Tensor:
    """uint8 [channels, size, size] of an image file, as `as_images` takes it. Raises OSError and ValueError, naming
    it."""
    from lzn_dist.data.pixels import centre_crop, decode

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        pixels = decode(path.read_bytes(), channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return centre_crop(pixels, size, shorter or size)


MAX_BYTES = 256 << 20  # of an image file


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
