"""How close are two sets of features? Fréchet distance, Inception score, and improved precision and recall.

Pure functions of feature arrays, in float64 inside, for sets of 50,000 samples with 2048 features; which network the
features come from is the caller's business (`inception` for natural images, `frechet` for the digits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK_ELEMENTS = 1 << 24  # numbers in one temporary array: 128 MiB in float64


@dataclass(frozen=True)
class Moments:
    """What the Fréchet distance needs of ``count`` samples: mean [F] and unbiased covariance [F, F], float64."""

    count: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(features: np.ndarray) -> Moments:
        """Of features [n, F]. Raises ValueError for another shape, NaN, infinity, or fewer than two samples."""
        _check("features", features)
        if len(features) < 2:
            raise ValueError("a covariance needs at least two samples on each side")
        n, dim = features.shape
        mean = features.mean(0, dtype=np.float64)
        # centred first: the difference of second moments would lose the digits that the mean has in excess
        covariance = np.zeros((dim, dim))
        for rows in _chunks(n, dim):
            centred = features[rows] - mean
            covariance += centred.T @ centred
        return Moments(n, mean, covariance / (n - 1))

    @staticmethod
    def none(dim: int) -> Moments:
        """Of no samples: what `joined` begins with."""
        return Moments(0, np.zeros(dim), np.zeros((dim, dim)))

    def joined(self, features: np.ndarray) -> Moments:
        """Of these samples and features [n, F] of n ≥ 1 more."""
        more = features.astype(np.float64)
        mean = more.mean(0)
        scatter = (more - mean).T @ (more - mean)
        return self._with(len(more), mean, scatter)

    def merged(self, other: Moments) -> Moments:
        """Of these samples and the other ones (Chan, Golub and LeVeque 1979)."""
        return self._with(other.count, other.mean, other.covariance * (other.count - 1))

    def _with(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> Moments:
        total, shift = self.count + count, mean - self.mean
        between = np.outer(shift, shift) * (self.count * count / total)
        own = self.covariance * (self.count - 1)
        return Moments(total, self.mean + shift * (count / total), (own + scatter + between) / max(1, total - 1))

    def root(self) -> NDArray[np.float64]:
        """A [F, r] with A Aᵀ = covariance and r = min(F, count − 1)."""
        values, vectors = np.linalg.eigh(self.covariance)
        # n samples span n − 1 dimensions: the other eigenvalues are rounding, whose root would not be small
        rank = min(len(values), self.count - 1)
        root: NDArray[np.float64] = vectors[:, -rank:] * np.sqrt(values[-rank:].clip(min=0.0))
        return root


def frechet_distance_of(first: Moments, second: Moments) -> float:
    """d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (arXiv 1706.08500; FID, where the features are Inception's).

    With Σ₁ = A Aᵀ and Σ₂ = B Bᵀ, tr (Σ₁ Σ₂)^½ is the sum of the singular values of Aᵀ B: no root of a non-symmetric
    matrix is needed, and singular covariances (fewer samples than features) are harmless.
    Raises ValueError where the numbers of features differ.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(f"features must be of one kind, got {len(first.mean)} and {len(second.mean)} of them")
    overlap = np.linalg.svd(first.root().T @ second.root(), compute_uv=False).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * overlap
    return float(np.square(first.mean - second.mean).sum() + spread)


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean of KL(p(y|x) ‖ p(y)), p(y) being the mean of p(y|x) (arXiv 1606.03498), of probabilities [n, K].

    Returns mean and (population) standard deviation over ``splits`` consecutive parts of nearly equal size, the
    published protocol: samples in the order of their classes must be shuffled before. Raises ValueError for another
    shape, rows that are no probabilities, or fewer samples than parts.
    """
    _check("probabilities", probabilities)
    n = len(probabilities)
    if not 1 <= splits <= n:
        raise ValueError(f"splits must lie in 1..{n}, the number of samples, got {splits}")
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(1, dtype=np.float64), 1.0, atol=1e-3):
        raise ValueError("probabilities must be rows of numbers ≥ 0 that sum to 1; logits need a softmax")
    scores = []
    for part in range(splits):
        p = probabilities[part * n // splits : (part + 1) * n // splits].astype(np.float64)
        log_p, log_mean = (np.log(np.maximum(x, np.finfo(np.float64).tiny)) for x in (p, p.mean(0)))  # 0 log 0 = 0
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features real [n, F] and fake [m, F].

    A set's manifold is the union of closed balls around its samples, each reaching to the sample's k-th nearest other
    one. Precision: the share of fake samples in the real manifold; recall: of real samples in the fake one.

    Exact on duplicates and ties: products only choose which pairs to look at, distances are sums of squared
    differences. Time (n + m)² F; memory a float64 copy of a set and a few chunks.
    Raises ValueError for other shapes, NaN, infinity, or a set of at most k samples.
    """
    _check("real", real)
    _check("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be of one kind, got {real.shape[1]} and {fake.shape[1]} of them")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(f"k must be at least 1 and below the number of samples, {len(real)} and {len(fake)}, got {k}")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of queries in the manifold of points."""
    centre = points.mean(0, dtype=np.float64)  # distances do not feel it, and products lose fewer digits
    shifted = points - centre
    # of the k + 1 nearest, a point itself is one
    radii = np.concatenate([found.max(1) for _, found in _nearest(points, points, shifted, centre, None, k + 1)])
    inside = [
        (found <= radii[which]).any(1) for which, found in _nearest(queries, points, shifted, centre, radii, k + 1)
    ]
    return float(np.concatenate(inside).mean())


def _nearest(
    queries: np.ndarray, points: np.ndarray, shifted: NDArray[np.float64], centre: NDArray[np.float64],
    radii: NDArray[np.float64] | None, count: int,
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float64]]]:  # fmt: skip
    """Chunk by chunk for each query: the ``count`` points with the smallest ‖q − p‖² − radii (squared ones; None: 0),
    and their ‖q − p‖². shifted: points − centre.

    Products (fast) choose the points and may err in the last digits; the distances are taken from differences.
    """
    level = np.square(shifted).sum(1) - (0.0 if radii is None else radii)
    for rows in _chunks(len(queries), max(len(points), count * points.shape[1])):
        # ‖q‖² is the same for all points
        key = level - 2.0 * (queries[rows] - centre) @ shifted.T
        which = np.argpartition(key, count - 1, axis=1)[:, :count]
        difference = queries[rows, None].astype(np.float64) - points[which]
        yield which, np.square(difference).sum(2)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    height = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _check(name: str, features: np.ndarray) -> None:
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{name} must be a matrix [n, F], got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
