"""Fréchet distance between feature sets, and the classifier that provides the features for the digits.

The published figures are FIDs in Inception features of natural images; those say nothing about 8×8 digits. Here it is
the *Fréchet distance in digit-classifier features*: comparable between models judged by this file, not with an FID.
"""

from __future__ import annotations

import warnings

import numpy as np

from lzn_dist.evaluation.distribution import Moments, frechet_distance_of


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """`frechet_distance_of` the moments of feature sets [n, F] and [m, F]; raises its ValueError and `Moments.of`'s."""
    return frechet_distance_of(Moments.of(first), Moments.of(second))


class DigitClassifier:
    """A multilayer perceptron with one hidden layer on pixels in [−1, 1]: recognises samples, gives features.

    pixels [n, P] and labels [n] are the real training images. Deterministic: its seed is fixed.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, hidden: int = 64, epochs: int = 60) -> None:
        from sklearn.exceptions import ConvergenceWarning  # a second that only the process that fits needs
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier((hidden,), learning_rate_init=3e-3, max_iter=epochs, alpha=1e-2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is meant
            network.fit(pixels, labels)
        self._weights, self._biases, self._classes = network.coefs_, network.intercepts_, network.classes_

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Activations [n, hidden] of the hidden layer, after its ReLU, for pixels [n, P]."""
        features: np.ndarray = np.maximum(pixels @ self._weights[0] + self._biases[0], 0.0)
        return features

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Labels [n] of pixels [n, P]."""
        labels: np.ndarray = self._classes[(self.features(pixels) @ self._weights[1] + self._biases[1]).argmax(1)]
        return labels

    def accuracy(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of pixels [n, P] that it recognises as labels [n]."""
        return float((self.predict(pixels) == labels).mean())
