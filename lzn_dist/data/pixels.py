"""From the bytes of an image file to pixels, and from there to the size that a network wants.

JPEG goes through libjpeg-turbo (simplejpeg), other formats through OpenCV; what those refuse, Pillow decides: it reads
odd files (CMYK, a PNG that is named .jpg) and raises for truncated ones. tests/benchmarks/data.py has the figures
behind the choice. Resizing is torch's antialiased bilinear for 8-bit images: the filter of Pillow and torchvision.

A `Reading` says how a sample is read: `Exact`, `CentreCrop` (evaluation, generation), `RandomResizedCrops` (SimCLR's
views). All leave uint8; colours are changed later, on the device (augment.py).
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from lzn_dist.keyed_random import fold, make_key, uniform

Pixels = NDArray[np.uint8]  # [h, w, c]
Box = tuple[int, int, int, int]  # top, left, height, width

cv2.setNumThreads(0)  # the loader's processes are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # who reads a file tells what is wrong
_GREY = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
_COLOUR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PIXELS = 178_956_970  # of an image, as Pillow has it: a header that says more is damaged, or a bomb
# all that Pillow raises for files that are damaged or of no format that it knows
_UNREADABLE = (
    OSError, SyntaxError, ValueError, OverflowError, NotImplementedError, struct.error, Image.DecompressionBombError
)  # fmt: skip


def decode(content: bytes, channels: int, smallest: tuple[int, int] | None = None) -> Pixels:
    """An image file's pixels: uint8 [h, w, channels], 1 for grey or 3 for RGB. ValueError where it is no image.

    Upright: as its EXIF orientation says. smallest: height and width; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
    size as long as it is no smaller.
    """
    if content.startswith(_TIFF):  # OpenCV and Pillow do not agree on who turns it
        return _decode_with_pillow(content, channels)
    orientation = exif_orientation(content)
    if simplejpeg.is_jpeg(content):
        height, width = smallest or (0, 0)
        if orientation in LYING:
            height, width = width, height
        try:
            _check_size(*simplejpeg.decode_jpeg_header(content)[:2])
            found: Pixels = simplejpeg.decode_jpeg(
                content, "GRAY" if channels == 1 else "RGB", min_height=height, min_width=width
            )
            return _upright(found, orientation)
        except ValueError:
            return _decode_with_pillow(content, channels)
    try:
        _check_size(*_size(content))
        array = cv2.imdecode(np.frombuffer(content, np.uint8), _GREY if channels == 1 else _COLOUR)
    except (*_UNREADABLE, cv2.error):
        array = None
    if array is None:
        return _decode_with_pillow(content, channels)
    return _upright(np.asarray(array, dtype=np.uint8).reshape(*array.shape[:2], channels), orientation)


# ── EXIF's orientation (tag 0x0112): where the first row and column of the file are in the picture ──────────────────

LYING = (5, 6, 7, 8)  # height and width change places
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# without one of these there is none: a search of the bytes is far cheaper than Pillow's reading of the header
_MARKS = (b"Exif", b"EXIF", b"tiff:Orientation")
_PNG_MARKS = (b"eXIf", b"tiff:Orientation", b"Raw profile type exif")


def exif_orientation(content: bytes) -> int:
    """1 (as it lies in the file) to 8. What is damaged, or means nothing, counts as 1."""
    header, marks = content, _PNG_MARKS if content.startswith(_PNG) else _MARKS
    if content.startswith(b"\xff\xd8"):
        header = content[: _start_of_scan(content)]
    if not any(mark in header for mark in marks):
        return 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _orientation_of(image)
    except _UNREADABLE:
        return 1


def _start_of_scan(content: bytes) -> int:
    """Where a JPEG's segments end and its pixels begin; the end of what is damaged."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + max(2, int.from_bytes(content[place + 2 : place + 4]))
    return place


def _orientation_of(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if isinstance(found, int) and found in _TURNED else 1
    except Exception:  # Pillow meets damaged EXIF with errors of many kinds
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    if orientation in LYING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _size(content: bytes) -> tuple[int, int]:
    """Height and width from the header of an image file, a PNG's without Pillow: that takes as long as a tiny one."""
    if content.startswith(_PNG):
        width, height = struct.unpack_from(">II", content, 16)
    else:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    return height, width


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"its header says {height}x{width} pixels, more than {MAX_PIXELS:,} are not read")


def load_with_pillow(content: bytes) -> Image.Image:
    """An image file, read to its end and upright. ValueError where it is no image."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        _check_size(image.height, image.width)
        image.load()
    except _UNREADABLE as error:
        # Pillow names what it was given: a buffer's address, of which nobody knows what file it is
        why = re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"not a whole image: {why}") from error
    orientation = _orientation_of(image)
    return image if orientation == 1 else image.transpose(_TURNED[orientation])


def convert(image: Image.Image, grey: bool) -> Image.Image:
    """To 8 bits, grey or RGB. Of 16-bit grey the high byte counts, as for OpenCV; Pillow alone would clip it."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if grey else "RGB")


def _decode_with_pillow(content: bytes, channels: int) -> Pixels:
    array = np.array(convert(load_with_pillow(content), channels == 1))  # a copy: PIL's own is read-only
    return array.reshape(*array.shape[:2], channels)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width, upright, from the header of a JPEG; None for anything else."""
    if not simplejpeg.is_jpeg(content):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    size = int(height), int(width)
    return size[::-1] if exif_orientation(content) in LYING else size


def resize(pixels: Pixels, size: tuple[int, int], box: Box | None = None) -> Tensor:
    """Cut out a box and bring it to height and width `size`, antialiased bilinear: uint8 [c, *size]."""
    if box is not None:
        top, left, height, width = box
        pixels = pixels[top : top + height, left : left + width]
    # channels last in memory, as decoded: torch's 8-bit kernel is fast for that
    image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    if tuple(image.shape[-2:]) == size:
        return image[0]
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)[0]


def centre_crop(pixels: Pixels, size: int, shorter: int) -> Tensor:
    """The shorter side brought to `shorter` pixels, then the central square: uint8 [c, size, size]. ValueError for a
    shape so long that this would be more pixels than are read."""
    height, width = pixels.shape[:2]
    # as torchvision: the longer side is rounded down
    scaled = tuple(int(shorter * side / min(height, width)) for side in (height, width))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ValueError(f"of {height}x{width} pixels: too long a shape to be resized")
    image = resize(pixels, (scaled[0], scaled[1]))
    top, left = (round((side - size) / 2) for side in scaled)
    return image[:, top : top + size, left : left + size]


class Reading(Protocol):
    """How the bytes of a batch's images become pixels. keyed: whether it differs from epoch to epoch."""

    @property
    def size(self) -> int: ...

    @property
    def views(self) -> int: ...

    @property
    def keyed(self) -> bool: ...

    def __call__(self, contents: Sequence[bytes], channels: int, rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        """For each image uint8 [views, c, size, size], or why it cannot be had. rows: int64 [b], their numbers."""


@dataclass(frozen=True)
class Exact:
    """Images that have the right size already; another size is an error."""

    size: int
    views: int = 1
    keyed: bool = False

    def __call__(self, contents: Sequence[bytes], channels: int, rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        return [self._one(content, channels) for content in contents]

    def _one(self, content: bytes, channels: int) -> Tensor | ValueError:
        try:
            pixels = decode(content, channels)
        except ValueError as error:
            return error
        height, width = pixels.shape[:2]
        if (height, width) != (self.size, self.size):
            raise WrongSizeError(height, width, self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


class WrongSizeError(ValueError):
    """An image has another size than the configuration says: not damage, a setting to mend."""

    def __init__(self, height: int, width: int, size: int) -> None:
        super().__init__(
            f"is {height}x{width} pixels, data.image_size is {size}: set data.resize to have images brought to size, "
            "or write the shards at that size"
        )


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side to `shorter` pixels, then the central size x size (ImageNet's evaluation: 256 and 224)."""

    size: int
    shorter: int
    scaled_decoding: bool = False
    views: int = 1
    keyed: bool = False

    def __call__(self, contents: Sequence[bytes], channels: int, rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        return [self._one(content, channels) for content in contents]

    def _one(self, content: bytes, channels: int) -> Tensor | ValueError:
        try:
            pixels = decode(content, channels, (self.shorter, self.shorter) if self.scaled_decoding else None)
            return centre_crop(pixels, self.size, self.shorter).unsqueeze(0)
        except ValueError as error:
            return error


def whole_images(size: int, shorter: int = 0, scaled_decoding: bool = False) -> Reading:
    """Images as they are, or with `shorter` brought to it and cropped at their centre."""
    return CentreCrop(size, shorter, scaled_decoding) if shorter else Exact(size)


@dataclass(frozen=True)
class RandomResizedCrops:
    """Views of random area and shape, brought to size x size (Szegedy et al. 2015; SimCLR, appendix A).

    View v of sample i in an epoch has the key (seed, "augment", i, epoch, v), folded with 0.
    """

    size: int
    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    scaled_decoding: bool = False
    views: int = 2
    keyed: bool = True

    def __call__(self, contents: Sequence[bytes], channels: int, rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        numbers = self._numbers(rows, epoch)
        return [self._one(content, channels, numbers[i]) for i, content in enumerate(contents)]

    def views_of(self, pixels: Pixels, row: Tensor, epoch: int) -> Tensor:
        """The views of one decoded image: uint8 [views, c, size, size]. row: int64 [1]."""
        return self._cut(pixels, pixels.shape[:2], self._numbers(row, epoch)[0])

    def _numbers(self, rows: Tensor, epoch: int) -> NDArray[np.float64]:
        """What the boxes are made of: uniform [b, views, TRIES, 4]."""
        keys = torch.stack([make_key(self.seed, "augment", rows, epoch, view) for view in range(self.views)], dim=1)
        return np.asarray(uniform(fold(keys, 0), (TRIES, 4), torch.float64).numpy())

    def _one(self, content: bytes, channels: int, numbers: NDArray[np.float64]) -> Tensor | ValueError:
        try:
            size = jpeg_size(content) if self.scaled_decoding else None
            boxes = None if size is None else [crop_box(*size, view, self.scale, self.ratio) for view in numbers]
            smallest = None
            if size is not None and boxes is not None:  # no view may have to be enlarged that was not before
                factor = min(1.0, self.size / min(min(box[2:]) for box in boxes))
                smallest = (math.ceil(size[0] * factor), math.ceil(size[1] * factor))
            pixels = decode(content, channels, smallest)
        except ValueError as error:
            return error
        return self._cut(pixels, size or pixels.shape[:2], numbers)

    def _cut(self, pixels: Pixels, size: tuple[int, ...], numbers: NDArray[np.float64]) -> Tensor:
        """The views of an image of height and width `size`, which may have been decoded at a fraction of it."""
        boxes = [crop_box(size[0], size[1], view, self.scale, self.ratio) for view in numbers]
        if size != pixels.shape[:2]:
            factors = [pixels.shape[i % 2] / size[i % 2] for i in range(4)]
            scaled = [[round(side * factor) for side, factor in zip(box, factors, strict=True)] for box in boxes]
            boxes = [(top, left, height, width) for top, left, height, width in scaled]
        return torch.stack([resize(pixels, (self.size, self.size), box) for box in boxes])


TRIES = 10


def crop_box(
    height: int, width: int, numbers: NDArray[np.float64], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """RandomResizedCrop's box: the first of ten random areas and shapes that fits, else the largest central one.

    Area uniform in `scale` of the image's, log-uniform aspect ratio (width/height) in `ratio`, position uniform, as in
    torchvision's RandomResizedCrop.get_params. numbers: uniform in [0, 1), [10, 4].
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, shape, y, x in numbers.tolist():
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w
