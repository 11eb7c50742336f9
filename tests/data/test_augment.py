from __future__ import annotations

import math

import pytest
import torch

from lzn_dist.data import BatchStream, DigitsPolicy, ShardIndex, random_flip, two_views
from lzn_dist.data.augment import adjust_intensity, affine
from lzn_dist.keyed_random import make_key


@pytest.fixture(scope="module")
def batch(index: ShardIndex) -> tuple[torch.Tensor, torch.Tensor]:
    batch = BatchStream(index, "train", 64, seed=0).batch(0)
    return batch.images, batch.index


def test_views_are_keyed_by_sample_epoch_and_view(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, index = batch
    views = two_views(images, index, 2, 7, DigitsPolicy())
    for parts in ([5, 59], [1] * 64, [32, 32]):
        pieces = [
            two_views(*p, 2, 7, DigitsPolicy()) for p in zip(images.split(parts), index.split(parts), strict=True)
        ]
        for view in range(2):
            torch.testing.assert_close(torch.cat([p[view] for p in pieces]), views[view], rtol=0, atol=1e-6)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    again = two_views(images[shuffled], index[shuffled], 2, 7, DigitsPolicy())
    torch.testing.assert_close(again[1], views[1][shuffled], rtol=0, atol=1e-6)

    def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(((a - b).abs().amax(dim=(1, 2, 3)) > 0.01).all())

    assert differs(*views)
    assert differs(views[0], images)
    assert differs(two_views(images, index, 3, 7, DigitsPolicy())[0], views[0])
    assert differs(two_views(images, index, 2, 8, DigitsPolicy())[0], views[0])
    assert differs(two_views(images, index + 1, 2, 7, DigitsPolicy())[0], views[0])


def test_views_stay_in_range_and_keep_most_of_the_digit(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, index = batch
    for view in two_views(images, index, 0, 0, DigitsPolicy()):
        assert view.shape == images.shape and view.dtype == images.dtype
        assert view.min() >= -1 and view.max() <= 1
    still = DigitsPolicy(rotation=0, zoom=0, translation=0, shear=0, contrast=0, brightness=0)
    torch.testing.assert_close(two_views(images, index, 0, 0, still)[0], images, rtol=0, atol=1e-5)


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
