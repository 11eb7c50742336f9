"""What people give a model: taken as meant, or refused in a line that says what to give."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lzn_dist.data.pixels import centre_crop, convert
from lzn_dist.inference import LZN
from lzn_dist.inference.inputs import as_count, as_images, as_labels
from lzn_dist.objectives import build_networks
from tests.helpers.small_run import small_config

PIXELS = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
UNIT = PIXELS.float() / 127.5 - 1


@pytest.fixture(scope="module")
def model() -> LZN:
    torch.manual_seed(0)
    config = small_config("evaluation.batch=4", "evaluation.alignment_steps=5")
    networks = build_networks(config)
    return LZN(networks, config, reference={"image": torch.randn(6, config.latent.dim)})


FORMS: dict[str, Any] = {
    "uint8": PIXELS, "array of uint8": PIXELS.numpy(), "array": UNIT.numpy(), "list of tensors": list(PIXELS),
    "list of arrays": [image.numpy() for image in UNIT], "PIL": [Image.fromarray(i[0].numpy()) for i in PIXELS],
    "colour PIL": [Image.fromarray(i[0].numpy()).convert("RGB") for i in PIXELS], "float64": UNIT.double(),
    "read-only array": np.broadcast_to(UNIT.numpy(), (3, 1, 8, 8)), "channels last": UNIT.permute(0, 2, 3, 1),
    "array of uint8, channels last": PIXELS.permute(0, 2, 3, 1).numpy(), "grey without channels": UNIT[:, 0],
    "list of [h, w]": [image[0].numpy() for image in PIXELS],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_images_are_taken_as_they_are_meant(form: str) -> None:
    torch.testing.assert_close(as_images(FORMS[form], 1, 8).float(), UNIT, rtol=0, atol=1e-6)


def test_one_image_and_none() -> None:
    assert as_images(UNIT[0], 1, 8).shape == as_images(Image.new("L", (8, 8)), 1, 8).shape == (1, 1, 8, 8)
    assert len(as_images([], 1, 8)) == len(as_images(UNIT[:0], 1, 8)) == 0
    assert as_images(Image.new("L", (8, 8)), 3, 8).shape == (1, 3, 8, 8)
    assert UNIT.requires_grad is False and as_images(UNIT, 1, 8).data_ptr() == UNIT.data_ptr()


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (UNIT.repeat(1, 3, 1, 1), r"got \[3, 3, 8, 8\]: this model takes grey images"),
        (torch.zeros(2, 1, 28, 28), "bring them to 8x8 first"), (torch.zeros(8, 9), r"got \[8, 9\]"),
        (UNIT.flatten(1), r"got \[3, 64\]"),
        (PIXELS.float(), r"from 0 to 25\d: give pixels from 0 to 255 as uint8"), (UNIT * 2, "must be from -1 to 1"),
        (UNIT * float("nan"), "NaN"), (UNIT.where(UNIT < 0, torch.inf), "NaN or infinity"),
        (PIXELS.long(), "not int64"), (PIXELS > 3, "not bool"), (3, "not int"), (None, "not NoneType"),
        ([UNIT[0], UNIT[0, :, :4]], "different sizes or types"), ([UNIT[0], PIXELS[0]], "different sizes or types"),
        (np.array(["a"]), "ndarray of <U1"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_meant(images: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says) as refused:
        as_images(images, 1, 8)
    assert "\n" not in str(refused.value)


def test_files_and_pictures_are_brought_to_size_upright(tmp_path: Path) -> None:
    """As the run's evaluation does it: the shorter side, then the central square; grey or RGB; EXIF's orientation."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    turned = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture, 1).copy()).save(tmp_path / "turned #1.png", exif=exif)
    turned.save(tmp_path / "b.png")
    for channels, shorter in ((1, 0), (3, 0), (3, 12)):
        expected = as_images(centre_crop(np.array(convert(turned, channels == 1)).reshape(30, 20, channels), 8,
                                         shorter or 8), channels, 8)  # fmt: skip
        found = as_images([tmp_path / "turned #1.png", str(tmp_path / "b.png"), turned], channels, 8, shorter)
        assert found.shape == (3, channels, 8, 8)
        for image in found:
            # OpenCV's grey and Pillow's differ in rounding
            torch.testing.assert_close(image, expected[0], rtol=0, atol=2.1 / 127.5)
    assert torch.equal(as_images(tmp_path / "b.png", 3, 8), as_images(turned, 3, 8))
    with Image.open(tmp_path / "turned #1.png") as opened:
        assert torch.equal(as_images(opened, 3, 8), as_images(turned, 3, 8))


def test_files_that_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.jpg: not a whole image"):
        as_images([str(tmp_path / "a.jpg")], 1, 8)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        as_images(tmp_path / "gone.jpg", 1, 8)
    with pytest.raises(ValueError, match="nobody's home"):
        as_images("~nobody-here/a.jpg", 1, 8)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(of)) + kind + of + struct.pack(">I", zlib.crc32(kind + of)) for kind, of in parts]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match=r"bomb\.png: .*3600000000 pixels"):
        as_images(tmp_path / "bomb.png", 3, 8)
    Image.new("L", (100_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match="too long a shape"):
        as_images(tmp_path / "long.png", 1, 64)
    monkeypatch.setattr("lzn_dist.inference.inputs.MAX_BYTES", 3)
    with pytest.raises(ValueError, match="larger than"):
        as_images(tmp_path / "a.jpg", 1, 8)


@pytest.mark.parametrize(
    "labels", [3, np.int64(3), torch.tensor(3), np.array(3), [3, 3], (3, 3), np.array([3, 3]), torch.tensor([3, 3]),
               torch.tensor([3, 3], dtype=torch.uint8)],
)  # fmt: skip
def test_labels(labels: Any) -> None:
    found = as_labels(labels, 2)
    assert found.dtype == torch.int64 and found.tolist() == [3, 3]


@pytest.mark.parametrize(
    "labels",
    [2.7, [2.7, 1], torch.tensor([2.0, 1.0]), True, [True, False], "3", ["a", "b"], None, [1, 2, 3], [[1, 2]], {}],
)
def test_labels_that_cannot_be_meant(labels: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="labels must be"):
        as_labels(labels, 2)


@pytest.mark.parametrize("n", [-1, 2.0, True, "3", None, torch.tensor(3)])
def test_counts(n: Any) -> None:
    assert as_count(0) == 0 and as_count(np.int32(3)) == 3
    with pytest.raises(ValueError, match="n must be a whole number"):
        as_count(n)


def test_every_method_takes_them(model: LZN) -> None:
    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    images = torch.cat((UNIT, UNIT))[:4]
    pixels = torch.cat((PIXELS, PIXELS))[:4]
    for method in (model.embed, model.anchors, model.latents, model.classify, model.reconstruct):
        close(method(pixels).double(), method(images).double())  # type: ignore[operator]
    noise = model.encode_noise(images, model.latents(images), torch.zeros(4, dtype=torch.int64))
    close(model.encode_noise(pixels.numpy(), model.latents(images), torch.zeros(4, dtype=torch.int64)), noise)
    for found, expected in zip(model.code(pixels), model.code(images), strict=True):
        close(found.double(), expected.double())  # type: ignore[union-attr]
    assert torch.equal(model.generate(2, labels=[1, 2], seed=5), model.generate(2, torch.tensor([1, 2]), 5))
    for count in (0, np.int64(2)):
        assert model.generate(count).shape == (count, 1, 8, 8)
    for method in (model.embed, model.anchors, model.latents, model.classify, model.reconstruct, model.code):
        with pytest.raises(ValueError, match="from 0 to 25"):
            method(pixels.float())  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9"):
        model.generate(2, labels=10)


def test_types_of_arithmetic(model: LZN) -> None:
    """bfloat16 has three digits; all that is returned is float32."""
    images = torch.cat((UNIT, UNIT))[:4]
    exact = [model.embed(images), model.anchors(images), model.generate(4, labels=3), model.reconstruct(images)]
    assert model.to(torch.bfloat16) is model
    try:
        found = [model.embed(images), model.anchors(images), model.generate(4, labels=3), model.reconstruct(images)]
        assert next(model.networks.parameters()).dtype == torch.float32
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.dtype == torch.float32
            difference = float((ours - theirs).norm() / theirs.norm())
            assert 0 < difference < 0.05, difference
        model.to("cpu", torch.float64)
        assert model.embed(images).dtype == model.generate(2).dtype == torch.float64
    finally:
        model.to(torch.float32)
    assert torch.equal(model.embed(images), exact[0])
    with pytest.raises(ValueError, match="float16 is not supported"):
        model.to(torch.float16)
    model.networks.to(torch.bfloat16)
    try:
        with pytest.raises(ValueError, match=r"use model\.to"):
            model.embed(images)
    finally:
        model.networks.to(torch.float32)
