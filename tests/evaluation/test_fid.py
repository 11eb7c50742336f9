"""FID and the like of a model: the statistics of all its samples, once for real images, by label in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lzn_dist.config import override
from lzn_dist.evaluation import EvaluationData
from lzn_dist.evaluation.distribution import Moments, frechet_distance_of, inception_score, precision_recall
from lzn_dist.evaluation.fid import fid_values, real_statistics, sampled_statistics
from lzn_dist.evaluation.inception import InceptionOutput
from tests.helpers.hand_made import tiny


class Projection:
    """Stands for Inception: random projections of the pixels; counts the images it saw."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(64, width, generator=generator) for width in (6, 4, 5)]
        self.seen = 0

    def __call__(self, images: Tensor) -> InceptionOutput:
        self.seen += len(images)
        pool, spatial, logits = (images.cpu().flatten(1) @ weight for weight in self.weights)
        return InceptionOutput(pool.numpy(), spatial.numpy(), logits.softmax(1).numpy())


@pytest.mark.slow
def test_values_are_those_of_all_features_at_once(digits: Path, tmp_path: Path) -> None:
    model = tiny("joint", digits)
    data, network = EvaluationData(model.config), Projection()
    values = fid_values(model, data, network, weights="w", cache=tmp_path, samples=530, seeds=[3, 4])
    assert network.seen == 1437 + 2 * 530
    train = Projection()(data.train.images)
    expected: dict[str, list[float]] = {"fid": [], "sfid": [], "inception_score": [], "precision": [], "recall": []}
    for seed in (3, 4):
        fake = Projection()(model.generate(530, torch.arange(530) % 10, seed))
        expected["fid"].append(frechet_distance_of(Moments.of(train.pool), Moments.of(fake.pool)))
        expected["sfid"].append(frechet_distance_of(Moments.of(train.spatial), Moments.of(fake.spatial)))
        expected["inception_score"].append(inception_score(fake.probabilities)[0])
        for key, value in zip(("precision", "recall"), precision_recall(train.pool, fake.pool), strict=True):
            expected[key].append(value)
    for key, (first, second) in expected.items():
        assert values[key] == pytest.approx((first + second) / 2, rel=1e-9)
        assert values[f"{key}_std"] == pytest.approx(abs(first - second) / 2**0.5, rel=1e-6, abs=1e-12)
    assert values["fid_samples"] == 530 and values["fid_image_size"] == 8 and values["fid"] > 0.1
    assert values["fid_real_images"] == 1437 and values["fid_seeds"] == 2


def test_real_images_are_looked_at_once(digits: Path, tmp_path: Path) -> None:
    model = tiny("generation", digits)
    data, network = EvaluationData(model.config), Projection()
    first = real_statistics(data, network, "w", tmp_path)
    again = real_statistics(data, network, "w", tmp_path)
    assert network.seen == 1437
    for ours, theirs in ((first.pool, again.pool), (first.spatial, again.spatial)):
        assert ours.count == theirs.count == 1437
        assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.covariance, theirs.covariance)
    assert np.array_equal(first.first, again.first) and len(first.first) == 1437
    real_statistics(data, network, "other weights", tmp_path)
    assert network.seen == 2 * 1437 and len(list(tmp_path.iterdir())) == 2


def test_statistics_of_shards_without_a_manifest_are_not_kept(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in digits.glob("*.tar"):
        (tmp_path / "shards" / shard.name).symlink_to(shard)
    model, network = tiny("generation", tmp_path / "shards"), Projection()
    model.config = override(model.config, ["data.embedded=none"])
    for _ in range(2):
        real_statistics(EvaluationData(model.config), network, "w", tmp_path / "cache")
    assert network.seen == 2 * 1437 and not (tmp_path / "cache").exists()


def test_a_save_that_fails_leaves_no_statistics(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    data = EvaluationData(tiny("generation", digits).config)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop)
        with pytest.raises(OSError, match="disk full"):
            real_statistics(data, Projection(), "w", tmp_path)
    network = Projection()
    real_statistics(data, network, "w", tmp_path)
    assert network.seen == 1437


def test_a_single_sample_in_the_last_batch_counts(digits: Path) -> None:
    model, network = tiny("generation", digits), Projection()
    found = sampled_statistics(model, network, 513, seed=0)
    whole = Projection()(model.generate(513))
    assert found.pool.count == 513 and np.array_equal(found.first, whole.pool)
    assert found.pool.mean == pytest.approx(Moments.of(whole.pool).mean, rel=1e-9)
    assert found.pool.covariance == pytest.approx(Moments.of(whole.pool).covariance, rel=1e-9)


def test_moments_join_and_merge_as_one_set() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)) + 1e4
    whole, parts = Moments.of(x), [Moments.none(4).joined(x[:1]).joined(x[1:20]), Moments.none(4).joined(x[20:])]
    merged = parts[0].merged(parts[1])
    assert merged.count == 50 and np.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert np.allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
    assert np.array_equal(Moments.none(4).joined(x[:1]).covariance, np.zeros((4, 4)))
