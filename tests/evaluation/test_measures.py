import math

import numpy as np
import pytest
import scipy.linalg
import torch

from lzn_dist.data import EvaluationBatch
from lzn_dist.evaluation.accuracy import Proportion, classification_accuracy
from lzn_dist.evaluation.data import Unmeasurable
from lzn_dist.evaluation.frechet import DigitClassifier, frechet_distance
from lzn_dist.evaluation.generation import balanced_labels, disagreement, image_errors, recognised
from lzn_dist.evaluation.probe import FeatureSet, effective_rank, few_label_probe, knn_accuracy, linear_probe
from lzn_dist.inference import LZN
from lzn_dist.inference.interpolation import slerp
from tests.helpers.hand_made import CLASSES, class_images


def random_covariance(seed: int, d: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(d, d))
    covariance: np.ndarray = root @ root.T / d
    return covariance


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n samples whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(scipy.linalg.cholesky(np.cov(x, rowvar=False)))
    samples: np.ndarray = x @ scipy.linalg.sqrtm(covariance).real + mean
    return samples


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    d = 5
    s1, s2 = random_covariance(1, d), random_covariance(2, d)
    m1, m2 = np.zeros(d), np.linspace(-1, 1, d)
    exact = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    found = frechet_distance(with_moments(m1, s1, 300, 3), with_moments(m2, s2, 200, 4))
    assert found == pytest.approx(exact, rel=1e-8)
    one = np.array([[1.0], [3.0]])  # one dimension: (μ₁ − μ₂)² + (s₁ − s₂)²
    assert frechet_distance(one, 2 * one + 1) == pytest.approx(3.0**2 + 2.0)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    x = np.random.default_rng(0).normal(size=(6, 20))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-7)
    assert frechet_distance(x, x + 1.0) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(x, x[:, :3])


def test_digit_classifier_recognises_and_its_features_decide() -> None:
    labels = np.arange(200) % CLASSES
    noise = np.random.default_rng(0).normal(size=(200, 64))
    pixels = class_images(torch.from_numpy(labels)).flatten(1).numpy() + 0.1 * noise
    judge = DigitClassifier(pixels[:150], labels[:150], hidden=16)
    assert judge.accuracy(pixels[150:], labels[150:]) > 0.95
    assert judge.accuracy(pixels[150:], (labels[150:] + 1) % CLASSES) < 0.1
    features = judge.features(pixels)
    assert features.shape == (200, 16) and features.min() >= 0
    logits = features @ judge._weights[1] + judge._biases[1]
    assert np.array_equal(logits.argmax(1), judge.predict(pixels))


def toy(separation: float, n: int = 300, d: int = 8) -> FeatureSet:
    random = np.random.default_rng(1)
    labels = np.arange(2 * n) % 3
    x = random.normal(size=(2 * n, d))
    x[np.arange(2 * n), labels] += separation
    return FeatureSet(x[:n] + 50.0, labels[:n], x[n:] + 50.0, labels[n:])  # far from the origin: centring matters


def test_effective_rank() -> None:
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(50, 20)))
    assert effective_rank(basis @ np.eye(20)) == pytest.approx(20, rel=1e-4)  # all values alike
    assert effective_rank(np.outer(random.normal(size=50), random.normal(size=20))) == pytest.approx(1, abs=1e-3)
    spectrum = np.array([3.0, 1.0])  # shares 3/4 and 1/4: exp(ln 4 − 3/4 ln 3)
    assert effective_rank(basis[:, :2] * spectrum) == pytest.approx(4 / 3**0.75, rel=1e-4)
    with pytest.raises(Unmeasurable):
        effective_rank(np.zeros((5, 3)))


def test_probes_on_separable_and_on_random_features() -> None:
    for score in (linear_probe, knn_accuracy, lambda data: few_label_probe(data, 10, 3)[0]):
        assert score(toy(8.0)) > 0.98
        assert score(toy(0.0)) == pytest.approx(1 / 3, abs=0.12)


def test_knn_equals_counting_by_hand() -> None:
    data = toy(1.5)
    train, test = (x - data.train.mean(0) for x in (data.train, data.test))
    right = 0
    for x, label in zip(test, data.test_labels, strict=True):
        similarity = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        nearest = np.argsort(-similarity)[:5]
        votes = [((data.train_labels[nearest] == c).sum(), similarity[nearest][data.train_labels[nearest] == c].sum())
                 for c in range(3)]  # fmt: skip
        right += max(range(3), key=lambda c: votes[c]) == label
    assert knn_accuracy(data, k=5, chunk=7) == pytest.approx(right / len(test))


def test_few_labels_know_less_than_all() -> None:
    data = toy(1.5)
    mean, deviation = few_label_probe(data, labels_a_class=2, draws=5)
    assert mean < linear_probe(data) and deviation > 0
    assert (mean, deviation) == few_label_probe(data, labels_a_class=2, draws=5)


def batches_of(images: torch.Tensor, labels: torch.Tensor, size: int) -> list[EvaluationBatch]:
    count = -(-len(images) // size) * size
    position = torch.arange(count)
    index = position % len(images)
    parts = zip(index.split(size), (position < len(images)).split(size), strict=True)
    return [EvaluationBatch(i, images[i], labels[i], valid) for i, valid in parts]


def test_accuracy_counts_valid_rows_alone(joint: LZN) -> None:
    torch.manual_seed(0)
    labels = torch.arange(20) % CLASSES
    told = labels.clone()
    told[-4:] = (told[-4:] + 1) % CLASSES  # four of 20 are told wrong
    images = class_images(labels) + 0.02 * torch.randn(20, 1, 8, 8)
    found = classification_accuracy(joint, batches_of(images, told, 8), (0.0, 0.5), torch.ones(CLASSES) / CLASSES)
    assert set(found) == {(0.0, False), (0.5, False), (0.0, True), (0.5, True)}
    assert found[0.0, False] == found[0.0, True] == Proportion(16, 20)


def test_accuracy_agrees_with_classify(joint: LZN) -> None:
    torch.manual_seed(0)
    images, labels = (0.3 * torch.randn(19, 1, 8, 8)).clamp(-1, 1), torch.arange(19) % CLASSES
    found = classification_accuracy(joint, batches_of(images, labels, 8))
    assert found[0.0, False].successes == int((joint.classify(images) == labels).sum())


def test_wilson_interval() -> None:
    low, high = Proportion(9, 10).interval()  # Wilson 1927; as in R's prop.test(9, 10, correct = FALSE)
    assert (low, high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert Proportion(0, 20).interval()[0] == 0.0 and 0.1 < Proportion(0, 20).interval()[1] < 0.2
    assert Proportion(0, 0).interval() == (0.0, 1.0) and math.isnan(Proportion(0, 0).value)


@pytest.fixture
def judge() -> DigitClassifier:
    labels = torch.arange(80) % CLASSES
    return DigitClassifier(class_images(labels).flatten(1).double().numpy(), labels.numpy(), hidden=16)


def test_recognised_and_disagreement(joint: LZN, judge: DigitClassifier) -> None:
    labels = balanced_labels(CLASSES, 3)
    assert labels.tolist() == [0, 1, 2, 3] * 3
    assert recognised(judge, class_images(labels), labels).value == 1.0
    assert recognised(judge, class_images(labels), (labels + 1) % CLASSES).value == 0.0
    fight = disagreement(joint, judge, 3)  # this decoder looks at the one-hot label alone
    assert (fight.latent_wins.value, fight.label_wins.value) == (0.0, 1.0)


def test_image_error_is_the_mean_distance() -> None:
    images = torch.zeros(2, 1, 8, 8)
    other = images.clone()
    other[0] += 0.5
    assert image_errors(other, images).mean().item() == pytest.approx(0.5 * 8 / 2)


def test_slerp_keeps_ends_and_norm() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 50)
    path = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.lerp(a.norm(), b.norm(), torch.linspace(0, 1, 5)))
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3]))[0], a)


def test_interpolation_runs_between_the_two_images(joint: LZN) -> None:
    images = class_images(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    joint.encode_noise = lambda images, latents, labels=None: images.clone()  # type: ignore[method-assign]
    path = joint.interpolate(images[1], images[3], 5)
    torch.testing.assert_close(path[0], images[1])
    torch.testing.assert_close(path[-1], images[3])


def test_two_neighbours_outvote_a_nearer_one() -> None:
    height = math.sqrt(1 - 0.4**2)
    train = np.array([[1.0, 0.0], [0.4, height], [0.4, -height], [-1.8, 0.0]])  # mean 0
    data = FeatureSet(train, np.array([0, 1, 1, 0]), np.array([[1.0, 0.0]]), np.array([1]))
    assert knn_accuracy(data, k=3) == 1.0 and knn_accuracy(data, k=1) == 0.0
