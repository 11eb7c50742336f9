import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from sklearn.neighbors import NearestNeighbors

from lzn_dist.evaluation import distribution
from lzn_dist.evaluation.distribution import Moments, frechet_distance_of, inception_score, precision_recall


def features(seed: int, n: int, f: int, shift: float = 0.0) -> np.ndarray:
    """Correlated, skewed, of unequal scales: float32 like a network's."""
    random = np.random.default_rng(seed)
    mixed = np.maximum(random.normal(size=(n, f)) @ np.random.default_rng(99).normal(size=(f, f)) / np.sqrt(f), -0.5)
    found: np.ndarray = (mixed * np.geomspace(0.1, 3.0, f) + shift).astype(np.float32)
    return found


def frechet_by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    s1, s2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    difference = first.mean(0) - second.mean(0)
    return float(difference @ difference + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))


def test_frechet_distance_equals_the_matrix_root(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(0, 300, 24), features(1, 200, 24, shift=0.2)
    monkeypatch.setattr(distribution, "CHUNK_ELEMENTS", 24 * 70)  # several chunks, the last one partly filled
    found = frechet_distance_of(Moments.of(first), Moments.of(second))
    assert found == pytest.approx(frechet_by_sqrtm(first, second), rel=1e-9)
    assert found == pytest.approx(frechet_distance_of(Moments.of(second), Moments.of(first)), rel=1e-12)


def test_frechet_distance_of_far_features_keeps_its_digits() -> None:
    first, second = features(0, 300, 8).astype(np.float64), features(1, 300, 8).astype(np.float64)
    near = frechet_distance_of(Moments.of(first), Moments.of(second))
    assert frechet_distance_of(Moments.of(first + 1e5), Moments.of(second + 1e5)) == pytest.approx(near, rel=1e-8)


def test_frechet_distance_of_gaussians_that_commute() -> None:
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.25])  # d² = Σ (√a − √b)², singular a included
    first, second = Moments(100, np.zeros(3), np.diag(a)), Moments(100, np.full(3, 2.0), np.diag(b))
    assert frechet_distance_of(first, second) == pytest.approx(12.0 + 1.0 + 4.0 + 0.25, rel=1e-12)


def test_frechet_distance_of_few_samples_in_orthogonal_subspaces() -> None:
    # no overlap at all: the roots of rounded zero eigenvalues must not add up to one
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(200, 200)))
    first, second = (random.normal(size=(6, 5)) @ basis[:, c : c + 5].T for c in (0, 5))
    traces = np.trace(np.cov(first, rowvar=False)) + np.trace(np.cov(second, rowvar=False))
    exact = np.square(first.mean(0) - second.mean(0)).sum() + traces
    assert frechet_distance_of(Moments.of(first), Moments.of(second)) == pytest.approx(exact, rel=1e-13)


def test_refusals() -> None:
    x = features(0, 10, 4)
    with pytest.raises(ValueError, match="two samples"):
        Moments.of(x[:1])
    with pytest.raises(ValueError, match="must be finite"):
        Moments.of(np.where(x == x[3, 2], np.nan, x))
    with pytest.raises(ValueError, match=r"must be a matrix \[n, F\]"):
        Moments.of(x[0])
    with pytest.raises(ValueError, match="got 4 and 3"):
        frechet_distance_of(Moments.of(x), Moments.of(x[:, :3]))
    with pytest.raises(ValueError, match="got 4 and 3"):
        precision_recall(x, x[:, :3])
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="need a softmax"):
        inception_score(x)
    with pytest.raises(ValueError, match=r"splits must lie in 1\.\.10"):
        inception_score(np.full((10, 2), 0.5), 11)


def test_inception_score_in_closed_form() -> None:
    # certain and balanced: K; all the same: 1; zeros count as 0 log 0 = 0
    assert inception_score(np.tile(np.eye(5), (8, 1)), splits=4) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-12))
    assert inception_score(np.tile([0.7, 0.3, 0.0], (20, 1)))[0] == pytest.approx(1.0)
    # one part certain and balanced over 2, the other all the same: 2 and 1
    mean, deviation = inception_score(np.array([[1.0, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]), splits=2)
    assert (mean, deviation) == (pytest.approx(1.5), pytest.approx(0.5))


def test_inception_score_is_the_mutual_information() -> None:
    # I(x; y) = H(y) − H(y|x), for 103 samples in 10 unequal parts
    p = scipy.special.softmax(2 * np.random.default_rng(0).normal(size=(103, 12)), axis=1).astype(np.float32)
    ends = [103 * i // 10 for i in range(11)]
    scores = []
    for start, end in itertools.pairwise(ends):
        part = p[start:end].astype(np.float64)
        part /= part.sum(1, keepdims=True)
        conditional = np.mean([scipy.stats.entropy(row) for row in part])
        scores.append(math.exp(scipy.stats.entropy(part.mean(0)) - conditional))
    assert inception_score(p) == (pytest.approx(np.mean(scores), rel=1e-6), pytest.approx(np.std(scores), rel=1e-4))


def by_neighbours(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    search = NearestNeighbors(n_neighbors=k + 1, algorithm="kd_tree").fit(points)
    radii = search.kneighbors(points)[0][:, k]
    inside = [any(np.linalg.norm(points - q, axis=1) <= radii) for q in queries]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_equals_nearest_neighbours(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = (x.astype(np.float64) for x in (features(0, 230, 6), features(1, 170, 6, shift=0.25)))
    monkeypatch.setattr(distribution, "CHUNK_ELEMENTS", 230 * 50)
    found = precision_recall(real, fake, k)
    assert found == (pytest.approx(by_neighbours(fake, real, k)), pytest.approx(by_neighbours(real, fake, k)))
    assert 0.05 < found[0] < 0.95 and 0.05 < found[1] < 0.95 and found[0] != found[1]


def test_precision_and_recall_are_not_exchanged() -> None:
    random = np.random.default_rng(0)
    real = np.concatenate([random.normal(size=(50, 4)), random.normal(size=(50, 4)) + 100])
    precision, recall = precision_recall(real, random.normal(size=(80, 4)) * 0.3)  # good images of half the modes
    assert precision == 1.0 and recall <= 0.5


def test_precision_recall_is_exact_on_duplicates_and_ties() -> None:
    # far from the origin and of no short binary fraction: ‖x‖² + ‖y‖² − 2xy does not vanish for x = y
    random = np.random.default_rng(0)
    single = (random.normal(size=(8, 33)) * 0.1 + 1000.0).astype(np.float32)
    repeated = np.repeat(single, 5, axis=0)  # every ball of the 3 nearest has radius 0
    assert precision_recall(repeated, repeated) == (1.0, 1.0)
    assert precision_recall(repeated, single)[0] == 1.0
    moved = np.nextafter(single, np.float32(np.inf))
    assert precision_recall(repeated, moved)[0] == 0.0
    # on a line 0, 1, 3 with k = 1 the balls reach 1, 1 and 2 far: 5 is on an edge
    real = np.array([[0.0], [1.0], [3.0]])
    assert precision_recall(real, np.array([[5.0], [5.0]]), k=1)[0] == 1.0
    assert precision_recall(real, np.array([[5.0], [np.nextafter(5.0, 6)]]), k=1)[0] == 0.5
