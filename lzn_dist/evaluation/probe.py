"""How much of the class do features hold? Linear probe, nearest neighbours, a probe from few labels; and their rank.

For comparison the same is asked of raw pixels and of an untrained encoder of the same configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lzn_dist.config import Config
from lzn_dist.evaluation.data import Unmeasurable
from lzn_dist.inference import LZN
from lzn_dist.objectives import build_networks

NEIGHBOURS = 10
LABELS_A_CLASS = 10
DRAWS = 10
QUICK_DRAWS = 2


@dataclass
class FeatureSet:
    """Features [n, F] and labels [n] of the training and the test images."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def linear_probe(data: FeatureSet, c: float = 1.0) -> float:
    """Test accuracy of L2-regularised logistic regression (inverse strength c) on standardised features."""
    from sklearn.exceptions import ConvergenceWarning  # a second that only the process that fits needs
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _check(data, 1)
    scale = StandardScaler().fit(data.train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(C=c, max_iter=500).fit(scale.transform(data.train), data.train_labels)
    return float(probe.score(scale.transform(data.test), data.test_labels))


def few_label_probe(
    data: FeatureSet, labels_a_class: int = LABELS_A_CLASS, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Mean test accuracy of the linear probe from ``labels_a_class`` training images of each class, over ``draws``
    random choices of them, and the standard deviation over the draws. Features are standardised on the chosen images.
    """
    _check(data, labels_a_class)
    random = np.random.default_rng(seed)
    scores = []
    for _ in range(draws):
        rows = np.concatenate(
            [
                random.permutation(np.flatnonzero(data.train_labels == label))[:labels_a_class]
                for label in np.unique(data.train_labels)
            ]
        )
        chosen = FeatureSet(data.train[rows], data.train_labels[rows], data.test, data.test_labels)
        scores.append(linear_probe(chosen))
    return float(np.mean(scores)), float(np.std(scores))


def knn_accuracy(data: FeatureSet, k: int = NEIGHBOURS, chunk: int = 1024) -> float:
    """Test accuracy of the majority of the k training images with the largest cosine similarity.

    Features are centred on the training mean first; of classes with equal votes, the one with the larger sum of
    similarities wins.
    """
    _check(data, 1)
    if len(data.train) < k:
        raise Unmeasurable(f"there are {len(data.train)} training images: {k} are needed")
    mean = data.train.mean(0)
    train, test = (_unit(features - mean) for features in (data.train, data.test))
    classes, codes = np.unique(data.train_labels, return_inverse=True)
    right = 0
    for start in range(0, len(test), chunk):
        similarity = test[start : start + chunk] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = np.zeros((len(similarity), len(classes)))
        rows = np.arange(len(similarity))
        for column in nearest.T:
            # a vote is worth 1; similarities, at most 1 in size, only break ties
            votes[rows, codes[column]] += 1.0 + similarity[rows, column] / (4 * k)
        right += int((classes[votes.argmax(1)] == data.test_labels[start : start + chunk]).sum())
    return right / len(test)


def effective_rank(features: np.ndarray) -> float:
    """RankMe of features [n, F] (Garrido et al., arXiv 2210.02885, equation 1): exp of the entropy of the shares that
    singular values have of their sum, 1 to min(n, F). Low: features have collapsed to few directions. It needs no
    labels; features are not centred, as there."""
    # the smaller Gram matrix: of 50,000 x 2,048 features far cheaper than a decomposition of the features; what it
    # rounds away, 1e-8 of the largest value, is below the paper's 1e-7
    products = features.T @ features if len(features) > features.shape[1] else features @ features.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(products), 0))
    if not values.sum() > 0:
        raise Unmeasurable("features are all zero, or there are none")
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(norms, 1e-12)
    return unit


def probes(data: FeatureSet, quick: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """linear_probe, knn, probe_10_labels and its deviation over draws, each to be called. Each raises Unmeasurable
    where there are too few classes or images for it. quick: no linear_probe, fewer draws."""

    def few() -> dict[str, float]:
        mean, deviation = few_label_probe(data, draws=QUICK_DRAWS if quick else DRAWS)
        return {"probe_10_labels": mean} | ({} if quick else {"probe_10_labels_std": deviation})

    found = {
        "linear_probe": lambda: {"linear_probe": linear_probe(data)},
        "knn": lambda: {"knn": knn_accuracy(data)},
        "probe_10_labels": few,
    }
    if quick:
        del found["linear_probe"]
    return found


def _check(data: FeatureSet, a_class: int) -> None:
    classes, counts = np.unique(data.train_labels, return_counts=True)
    if len(classes) < 2:
        raise Unmeasurable(f"the training images have {len(classes)} class: two are needed")
    if not len(data.test):
        raise Unmeasurable("there are no images to measure")
    if counts.min() < a_class:
        scarce = classes[counts.argmin()]
        raise Unmeasurable(f"class {scarce} has {counts.min()} training images: {a_class} are needed")


def untrained_model(config: Config, seed: int = 0) -> LZN:
    """A model of the same configuration with its initial weights; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LZN(build_networks(config), config)
