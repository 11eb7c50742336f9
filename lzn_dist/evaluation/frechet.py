"""Fréchet distance between feature sets, and the classifier that provides the features for the digits.

The published figures are FIDs in Inception features of natural images; those say nothing about 8×8 digits. Here it is
the *Fréchet distance in digit-classifier features*: comparable between models judged by this file, not with an FID.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of feature sets [n, F] and [m, F] (arXiv 1706.08500), in float64.

    tr (Σ₁ Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½: no root of a non-symmetric matrix is needed, and
    singular covariances (fewer samples than features) are harmless. Raises ValueError for fewer than two samples.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features must be [n, F] and [m, F], got {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least two samples on each side")
    roots, traces, means = [], [], []
    for features in (first.astype(np.float64), second.astype(np.float64)):
        means.append(features.mean(0))
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(features, rowvar=False)))
        values = values.clip(min=0.0)
        traces.append(values.sum())
        roots.append((vectors * np.sqrt(values)) @ vectors.T)
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + traces[0] + traces[1] - 2.0 * overlap)


class DigitClassifier:
    """A multilayer perceptron with one hidden layer on pixels in [−1, 1]: recognises samples, gives features.

    pixels [n, P] and labels [n] are the real training images. Deterministic: its seed is fixed.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, hidden: int = 64, epochs: int = 60) -> None:
        self._network = MLPClassifier((hidden,), learning_rate_init=3e-3, max_iter=epochs, alpha=1e-2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is meant
            self._network.fit(pixels, labels)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Activations [n, hidden] of the hidden layer, after its ReLU, for pixels [n, P]."""
        x = pixels @ self._network.coefs_[0] + self._network.intercepts_[0]
        return np.maximum(x, 0.0)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Labels [n] of pixels [n, P]."""
        labels: np.ndarray = self._network.predict(pixels)
        return labels

    def accuracy(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of pixels [n, P] that it recognises as labels [n]."""
        return float((self.predict(pixels) == labels).mean())
