"""Decoding, and the transforms that change an image's size, against their published definitions."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lzn_dist.data import CentreCrop, RandomResizedCrops
from lzn_dist.data.pixels import TRIES, crop_box, decode, exif_orientation, jpeg_size, load_with_pillow, resize


def picture(height: int, width: int, seed: int = 0, coarse: tuple[int, int] = (6, 7)) -> np.ndarray:
    """Smooth colours: what JPEG and resizing are made for."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*coarse, 3)).astype(np.uint8)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind,mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "1"),
    ("WEBP", "RGB"), ("PPM", "RGB"), ("BMP", "RGB"),
])  # fmt: skip
def test_pixels_are_pillows(kind: str, mode: str, channels: int) -> None:
    content = encoded(picture(37, 50), kind, mode)
    found = decode(content, channels)
    image = Image.open(io.BytesIO(content))
    if channels == 1 and kind == "JPEG":
        image.draft("L", image.size)  # the luminance channel as it is stored
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert found.dtype == np.uint8 and found.shape == (37, 50, channels)
    difference = np.abs(found.astype(int) - expected.reshape(found.shape))
    # decoders of lossy formats may round differently
    assert difference.max() <= (0 if kind in ("PNG", "PPM", "BMP") and channels == 3 else 3)


def lying(kind: str, orientation: object, mode: str = "RGB", height: int = 40, width: int = 64) -> bytes:
    """A picture that says how it lies, as phones write it."""
    image = Image.fromarray(picture(height, width)).convert(mode)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind,mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB"), ("TIFF", "RGB"),
])  # fmt: skip
def test_pictures_are_upright_once(kind: str, mode: str, orientation: int) -> None:
    """As Pillow shows them; also decoded at a fraction of their size, and cut into views."""
    content = lying(kind, orientation, mode)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")).astype(int)
    assert expected.shape == ((64, 40, 3) if orientation > 4 else (40, 64, 3))
    found = decode(content, 3).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= (3 if kind == "JPEG" else 0)
    assert exif_orientation(content) in (orientation, 1 if kind == "TIFF" else orientation)
    loaded = load_with_pillow(content)
    assert np.abs(np.asarray(loaded.convert("RGB")).astype(int) - expected).max() <= 3
    buffer = io.BytesIO()
    loaded.convert("RGB").save(buffer, "PNG")  # what preparation writes has nothing left to turn
    assert decode(buffer.getvalue(), 3).shape == expected.shape
    if kind == "JPEG":
        assert jpeg_size(content) == expected.shape[:2]
        half = decode(content, 3, (expected.shape[0] // 2, expected.shape[1] // 2)).astype(int)
        assert half.shape == (expected.shape[0] // 2, expected.shape[1] // 2, 3)
        smaller = np.asarray(Image.fromarray(expected.astype(np.uint8)).reduce(2)).astype(int)
        assert np.abs(half - smaller).mean() < 4
    rows, upright = torch.tensor([3]), encoded(expected.astype(np.uint8), "PNG")
    for scaled in (False, True):
        views = RandomResizedCrops(16, 0, scaled_decoding=scaled)
        ours, theirs = (views([c], 3, rows, 0)[0] for c in (content, upright))
        # lossy, and decoded at a fraction: some 4 of 255; lying otherwise, some 60
        assert (ours.int() - theirs.int()).abs().float().mean() < (8 if kind == "JPEG" else 0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_means_nothing_is_none(kind: str, orientation: int) -> None:
    assert decode(lying(kind, orientation), 3).shape == (40, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_damage_the_picture(kind: str) -> None:
    content = lying(kind, 6)
    place = max(content.find(mark) for mark in (b"II*\0", b"MM\0*"))
    for cut in (4, 8, 10, 14, 18):
        broken = bytearray(content)
        broken[place + cut - 4 : place + cut] = b"\xff\xfe\xff\xfe"
        with contextlib.suppress(ValueError):  # a PNG's checksum may make it unreadable as a whole
            assert decode(bytes(broken), 3).shape[:2] in ((40, 64), (64, 40))


def test_what_cannot_be_read_is_not_called_a_buffer() -> None:
    for content in (b"no picture", lying("JPEG", 1)[:300], b""):
        with pytest.raises(ValueError) as refused:
            decode(content, 3)
        assert "BytesIO" not in str(refused.value) and "0x" not in str(refused.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_damaged_is_refused(kind: str) -> None:
    content = encoded(picture(64, 64), kind)
    assert decode(content, 3).shape == (64, 64, 3)
    for broken in (b"", b"?" * 200, content[: len(content) // 2], content[:20]):
        with pytest.raises(ValueError, match="not a whole image"):
            decode(broken, 3)


def huge_png(height: int, width: int) -> bytes:
    """A header that promises many pixels, with its right check sum."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT" + bytes(100)


@pytest.mark.parametrize("content", [
    b"P6 2000000 2000000 255\n" + bytes(100), b"P6 14000 14000 255\n" + bytes(100),
    huge_png(100_000, 100_000), huge_png(14_000, 14_000), huge_png(2**31 - 1, 2**31 - 1),
    encoded(picture(8, 8)).replace(b"\x00\x08\x00\x08", b"\xff\xff\xff\xff"),
], ids=["ppm", "ppm 588 MB", "png", "png 588 MB", "png exabytes", "jpeg"])  # fmt: skip
def test_more_pixels_than_anybody_has_are_refused_unread(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("memory was taken"))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)  # whatever others set
    for channels in (1, 3):
        with pytest.raises(ValueError, match=r"not a whole image: its header says .* are not read"):
            decode(content, channels)


def test_any_flipped_bit_of_a_header_is_a_damaged_image_or_another_one() -> None:
    content = encoded(picture(20, 30), "BMP")
    for place in range(54 * 8):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        with contextlib.suppress(ValueError):
            decode(bytes(flipped), 3)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_of_16_bits_the_high_byte_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    for _ in range(2):
        np.testing.assert_array_equal(decode(buffer.getvalue(), 1)[..., 0], pixels >> 8)
        np.testing.assert_array_equal(decode(buffer.getvalue(), 3), np.stack([pixels >> 8] * 3, axis=-1))
        monkeypatch.setattr("cv2.imdecode", lambda *_: None)  # then with Pillow


def test_a_jpeg_named_png_and_the_other_way_round() -> None:
    """Members keep their published names; only the content counts (ImageNet has a PNG that is called .JPEG)."""
    assert jpeg_size(encoded(picture(40, 30))) == (40, 30)
    assert jpeg_size(encoded(picture(40, 30), "PNG")) is None and jpeg_size(b"\xff\xd8\xff") is None


@pytest.mark.parametrize("size,box", [
    ((24, 24), None), ((24, 24), (3, 10, 40, 52)), ((80, 90), (5, 6, 30, 20)), ((20, 30), (0, 0, 60, 90)),
])  # fmt: skip
def test_resize_is_antialiased_bilinear_of_the_cropped_image(size: tuple[int, int], box: tuple | None) -> None:  # type: ignore[type-arg]
    """Pillow's filter after a crop, as torchvision does it; enlarging, too."""
    image = picture(60, 90)
    found = resize(image, size, box)
    top, left, height, width = box or (0, 0, 60, 90)
    cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = np.asarray(cropped.resize(size[::-1], Image.Resampling.BILINEAR))
    assert found.dtype == torch.uint8 and found.shape == (3, *size)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("height,width", [(375, 500), (500, 375), (300, 300), (256, 1000)])
def test_evaluation_takes_the_centre(height: int, width: int) -> None:
    """Resize(256), CenterCrop(224), with the sizes that torchvision rounds to."""
    content = encoded(picture(height, width), "PNG")
    (found,) = CentreCrop(224, 256)([content], 3, torch.zeros(1, dtype=torch.int64), 0)
    assert isinstance(found, torch.Tensor) and found.shape == (1, 3, 224, 224)
    short = min(height, width)
    h, w = int(256 * height / short), int(256 * width / short)
    resized = Image.open(io.BytesIO(content)).resize((w, h), Image.Resampling.BILINEAR)
    top, left = round((h - 224) / 2), round((w - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_random_boxes_follow_the_published_distribution() -> None:
    """RandomResizedCrop: area uniform in 0.08 to 1, log-uniform aspect ratio in 3/4 to 4/3, position uniform."""
    numbers = np.random.default_rng(0).random((20_000, TRIES, 4))
    boxes = np.array([crop_box(4000, 4000, one, (0.08, 0.4), (3 / 4, 4 / 3)) for one in numbers])
    top, left, height, width = boxes.T
    area, ratio = height * width / 4000**2, np.log(width / height)
    assert area.min() == pytest.approx(0.08, abs=0.001) and area.max() == pytest.approx(0.4, abs=0.001)
    assert area.mean() == pytest.approx(0.24, abs=0.003)
    assert abs(ratio).max() == pytest.approx(math.log(4 / 3), abs=0.001) and ratio.mean() == pytest.approx(0, abs=0.004)
    assert ratio.std() == pytest.approx(math.log(4 / 3) / math.sqrt(3), abs=0.003)
    for start, length in ((top, height), (left, width)):
        place = start / (4000 - length)
        assert place.min() < 0.001 and place.max() > 0.999 and place.mean() == pytest.approx(0.5, abs=0.01)
    assert (top + height).max() <= 4000 and (left + width).max() <= 4000
    # the last row and column are reached
    tight = crop_box(10, 10, np.full((TRIES, 4), [0.2, 0.5, 0.9999, 0.9999]), (0.08, 1), (1, 1))
    assert tight[0] + tight[2] == 10 and tight[1] + tight[3] == 10


def test_where_nothing_fits_it_is_the_largest_central_box() -> None:
    never = np.full((TRIES, 4), [0.999, 0.5, 0.5, 0.5])
    assert crop_box(100, 1000, never, (0.08, 1.0), (3 / 4, 4 / 3)) == (0, 433, 100, 133)
    assert crop_box(1000, 100, never, (0.08, 1.0), (3 / 4, 4 / 3)) == (433, 0, 133, 100)
    later = never.copy()
    later[TRIES - 1] = [0.0, 0.5, 0.0, 0.0]  # the last try counts
    assert crop_box(100, 1000, later, (0.08, 1.0), (3 / 4, 4 / 3)) == (0, 0, 89, 89)


@pytest.mark.parametrize("scaled", [False, True])
def test_views_are_the_keyed_boxes_of_the_image(scaled: bool) -> None:
    """And with scaled decoding nearly so: boxes are then whole pixels of an image at 1/4 or 1/8 of its size."""
    contents = [encoded(picture(1000, 900, seed, coarse=(3, 3)), quality=95) for seed in range(6)]
    rows = torch.tensor([4, 9, 2, 7, 7, 100])
    reading = RandomResizedCrops(48, 3, scale=(0.3, 1.0), scaled_decoding=scaled)
    found = reading(contents, 3, rows, 2)
    whole = RandomResizedCrops(48, 3, scale=(0.3, 1.0))(contents, 3, rows, 2)
    for one, other in zip(found, whole, strict=True):
        assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        assert one.shape == (2, 3, 48, 48) and one.dtype == torch.uint8
        assert (one.int() - other.int()).abs().float().mean() <= (1.5 if scaled else 0)
    (alone,) = reading(contents[2:3], 3, rows[2:3], 2)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, found[2])  # type: ignore[arg-type]
    (other_epoch,) = reading(contents[2:3], 3, rows[2:3], 3)
    assert not torch.equal(other_epoch, alone)  # type: ignore[arg-type]
    assert isinstance(reading([b"?"], 3, rows[:1], 0)[0], ValueError)
