from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageEnhance

from lzn_dist.data import (
    DigitsPolicy,
    Exact,
    ShardedDataset,
    ShardIndex,
    SimCLRPolicy,
    make_views,
    random_flip,
    to_unit_range,
)
from lzn_dist.data.augment import (
    Policy,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_intensity,
    adjust_saturation,
    affine,
    gaussian_blur,
    luminance,
)
from lzn_dist.keyed_random import make_key


@pytest.fixture(scope="module")
def batch(index: ShardIndex) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.arange(0, 640, 10)
    pixels, _ = ShardedDataset(index, "train", 1, Exact(8)).read(rows)
    return to_unit_range(pixels[0]), torch.from_numpy(rows)


def views_of(
    images: torch.Tensor, index: torch.Tensor, epoch: int, seed: int, policy: Policy
) -> tuple[torch.Tensor, torch.Tensor]:
    return make_views([images], index, epoch, seed, policy)


def test_views_are_keyed_by_sample_epoch_and_view(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, index = batch
    views = views_of(images, index, 2, 7, DigitsPolicy())
    for parts in ([5, 59], [1] * 64, [32, 32]):
        pieces = [views_of(*p, 2, 7, DigitsPolicy()) for p in zip(images.split(parts), index.split(parts), strict=True)]
        for view in range(2):
            torch.testing.assert_close(torch.cat([p[view] for p in pieces]), views[view], rtol=0, atol=1e-6)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    again = views_of(images[shuffled], index[shuffled], 2, 7, DigitsPolicy())
    torch.testing.assert_close(again[1], views[1][shuffled], rtol=0, atol=1e-6)

    def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(((a - b).abs().amax(dim=(1, 2, 3)) > 0.01).all())

    assert differs(*views)
    assert differs(views[0], images)
    assert differs(views_of(images, index, 3, 7, DigitsPolicy())[0], views[0])
    assert differs(views_of(images, index, 2, 8, DigitsPolicy())[0], views[0])
    assert differs(views_of(images, index + 1, 2, 7, DigitsPolicy())[0], views[0])


def test_views_stay_in_range_and_keep_most_of_the_digit(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, index = batch
    for view in views_of(images, index, 0, 0, DigitsPolicy()):
        assert view.shape == images.shape and view.dtype == images.dtype
        assert view.min() >= -1 and view.max() <= 1
    still = DigitsPolicy(rotation=0, zoom=0, translation=0, shear=0, contrast=0, brightness=0)
    torch.testing.assert_close(views_of(images, index, 0, 0, still)[0], images, rtol=0, atol=1e-5)


def test_policy_draws_what_it_says() -> None:
    keys = make_key(0, "test", torch.arange(4000))
    policy = DigitsPolicy(rotation=20, zoom=0.3, translation=2, shear=0)
    matrices = policy.sample_affine(keys)
    scale = 1 / torch.linalg.det(matrices[:, :, :2]).sqrt()
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]) * (180 / math.pi)
    for values, middle, reach in (
        (scale, 1, 0.3),
        (angle, 0, 20),
        (matrices[:, 0, 2], 0, 2),
        (matrices[:, 1, 2], 0, 2),
    ):
        assert values.min() == pytest.approx(middle - reach, abs=0.02 * reach)
        assert values.max() == pytest.approx(middle + reach, abs=0.02 * reach)
        assert values.mean() == pytest.approx(middle, abs=0.05 * reach)
    draws = torch.stack((scale, angle, matrices[:, 0, 2], matrices[:, 1, 2]))
    torch.testing.assert_close(torch.corrcoef(draws), torch.eye(4), rtol=0, atol=0.07)  # independent of each other


def test_affine_against_exact_maps() -> None:
    images = torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(2)

    def move(images: torch.Tensor, a: torch.Tensor, x: float = 0.0, y: float = 0.0) -> torch.Tensor:
        matrix = torch.cat((a, torch.tensor([[x], [y]])), dim=1).expand(len(images), 2, 3)
        return affine(images, matrix, fill=-1.0)

    torch.testing.assert_close(move(images, eye), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(move(images, -eye), images.flip(-1, -2), rtol=0, atol=1e-5)
    right = move(images, eye, x=2.0)  # the output at p is the input at p + 2
    torch.testing.assert_close(right[..., :-2], images[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(right[..., -2:], torch.full_like(right[..., -2:], -1.0), rtol=0, atol=1e-5)
    down = move(images, eye, y=-1.0)
    torch.testing.assert_close(down[..., 1:, :], images[..., :-1, :], rtol=0, atol=1e-5)
    square = images[..., :6]
    turned = move(square, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(turned, torch.rot90(square, 1, (-2, -1)), rtol=0, atol=1e-5)
    # a quarter turn of a wide image keeps its pixels square: what is cut off is cut off, what stays is exact
    wide = move(images, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(wide[..., 2:8], torch.rot90(images[..., 2:8], 1, (-2, -1)), rtol=0, atol=1e-5)


def test_intensity_against_its_formula() -> None:
    images = torch.tensor([[-0.5, 0.5], [-1.0, 0.0]]).reshape(2, 1, 1, 2)
    result = adjust_intensity(images, torch.tensor([2.0, 0.5]), torch.tensor([0.25, 0.0]))
    torch.testing.assert_close(result.flatten(1), torch.tensor([[-0.75, 1.0], [-0.75, -0.25]]))


def test_random_flip() -> None:
    images = torch.arange(4000 * 4, dtype=torch.float32).reshape(4000, 1, 1, 4)
    index = torch.arange(4000)
    flipped = random_flip(images, index, epoch=1, seed=0)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(flipped == images).flatten(1).all(1))  # each is whole or mirrored
    assert 0.46 < mirrored.float().mean() < 0.54
    assert torch.equal(
        torch.cat([random_flip(images[i::2], index[i::2], 1, 0) for i in range(2)]),
        torch.cat([flipped[i::2] for i in range(2)]),
    )
    assert not torch.equal(random_flip(images, index, epoch=2, seed=0), flipped)


# ── SimCLR: each change against its published definition ────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def colours() -> torch.Tensor:
    """Four smooth RGB images of 40 x 40 with values k/255, among them grey and saturated places."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 5, 5, generator=generator)
    coarse[0, :, :2] = coarse[0, :1, :2]
    coarse[1, 0] = 1.0
    coarse[1, 1, 2:] = 0.0
    images = torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear")
    return (images * 255).round() / 255


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def back(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("change,enhance", [
    (adjust_brightness, ImageEnhance.Brightness), (adjust_contrast, ImageEnhance.Contrast),
    (adjust_saturation, ImageEnhance.Color),
])  # fmt: skip
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.8])
def test_colour_jitter_is_pillows(change, enhance, factor: float, colours: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """torchvision's ColorJitter on PIL images calls these; they round to 8 bits, the mean luminance too."""
    found = change(colours, torch.full((4,), factor))
    for image, ours in zip(colours, found, strict=True):
        assert (ours - back(enhance(pil(image)).enhance(factor))).abs().max() <= 1.6 / 255
    if factor != 1.0:
        assert (found - colours).abs().max() > 0.05


@pytest.mark.parametrize("turn", [-0.2, 0.0, 0.13, 0.2])
def test_hue_is_a_turn_in_hsv(turn: float, colours: torch.Tensor) -> None:
    found = adjust_hue(colours, torch.full((4,), turn))
    for place in range(0, 1600, 37):
        for image, ours in zip(colours.flatten(2), found.flatten(2), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, place].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
            assert ours[:, place].tolist() == pytest.approx(expected, abs=2e-6)


def test_luminance_is_pillows(colours: torch.Tensor) -> None:
    for image, ours in zip(colours, luminance(colours), strict=True):
        expected = torch.from_numpy(np.array(pil(image).convert("L"))) / 255
        assert (ours[0] - expected).abs().max() <= 0.6 / 255


@pytest.mark.parametrize("size", [(40, 40), (24, 33)])
def test_blur_is_a_gaussian_with_reflected_borders(size: tuple[int, int]) -> None:
    images = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    found = gaussian_blur(images, sigma, 23)
    for image, ours, s in zip(images, found, sigma.tolist(), strict=True):
        for channel, result in zip(image.numpy(), ours.numpy(), strict=True):
            expected = scipy.ndimage.gaussian_filter(channel, s, mode="mirror", radius=11)
            np.testing.assert_allclose(result, expected, atol=1e-12)
    assert (found[2] - images[2]).abs().max() > 0.1
    with pytest.raises(ValueError, match="too small for a blur over 23"):
        gaussian_blur(images[..., :11, :11], sigma, 23)


def test_simclr_views_are_keyed(colours: torch.Tensor) -> None:
    images = colours.repeat(8, 1, 1, 1) * 2 - 1
    index = torch.arange(32) * 3
    first, second = make_views([images, images], index, 1, 5, SimCLRPolicy())
    pieces = [make_views([images[i : i + 1]] * 2, index[i : i + 1], 1, 5, SimCLRPolicy()) for i in range(32)]
    torch.testing.assert_close(torch.cat([p[0] for p in pieces]), first, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces]), second, rtol=0, atol=1e-5)
    assert first.min() >= -1 and first.max() <= 1
    assert ((first - second).abs().amax(dim=(1, 2, 3)) > 0.01).all()
    assert not torch.equal(make_views([images, images], index, 2, 5, SimCLRPolicy())[0], first)


def test_simclr_changes_come_as_often_as_published() -> None:
    """On images with one bright half: mirrored in half of the cases, grey in a fifth, jittered in four fifths."""
    images = torch.full((4000, 3, 12, 12), -0.6)
    images[:, 0, :, :6] = 0.4
    keys = make_key(0, "test", torch.arange(4000))
    flip = SimCLRPolicy(jitter=0.0, grey=0.0, blur=0.0)(images, keys)
    assert 0.46 < (flip[:, 0, 0, 0] < 0).float().mean() < 0.54
    grey = SimCLRPolicy(jitter=0.0, flip=0.0, blur=0.0)(images, keys)
    assert 0.18 < (grey.amax(dim=1) - grey.amin(dim=1)).flatten(1).amax(1).lt(1e-6).float().mean() < 0.22
    jitter = SimCLRPolicy(flip=0.0, grey=0.0, blur=0.0)(images, keys)
    assert 0.78 < (jitter - images).abs().flatten(1).amax(1).gt(1e-6).float().mean() < 0.82
    only = SimCLRPolicy(flip=0.0, grey=0.0, blur=0.0, jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0)(images, keys)
    factors = (only[:, 0, 0, 11] + 1) / 0.4  # of brightness, where nothing is clipped
    assert factors.min() == pytest.approx(0.2, abs=0.01) and factors.max() == pytest.approx(1.8, abs=0.01)
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
