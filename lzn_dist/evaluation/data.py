"""The images that evaluation looks at: fixed batches in a fixed order, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import FixedBatches, ShardIndex
from lzn_dist.data.index import split_name
from lzn_dist.distributed.spread import once, spread
from lzn_dist.evaluation.frechet import DigitClassifier
from lzn_dist.prepare.digits import ensure_digits
from lzn_dist.training.batches import fixed_batches

IN_MEMORY = 50_000  # images of a split whose features, or pixels, are held at once, at most
MEMORY = 4e9  # bytes of a split's pixels that are held at once, at most


@dataclass
class ImageSet:
    """images [n, c, h, w] in [−1, 1], labels int64 [n] (−1 without one)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> np.ndarray:
        """float64 [n, c·h·w]."""
        return self.images.flatten(1).double().numpy()


class Unmeasurable(ValueError):
    """A measure that means nothing on these images; the message says why, and what would help."""


class EvaluationData:
    """A data set's training images and those that are measured; an embedded one is written if missing. Collective.

    names: of the splits "train" and "test"; the latter is `evaluation.split`, else the set's test, else its val, by
    whatever name. held_out: whether it has one; where it has none, "test" is the training images: for figures, and for
    measures that the user asked for by evaluation.split=train. Raises FileNotFoundError where the shards are not there,
    ConfigError for a split that there is not, and for a manifest that cannot be read.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.data.embedded == "digits":
            once(lambda: ensure_digits(config.data.shards))
        try:
            self.index = ShardIndex.load(config.data.shards, config.data.cache, config.data.retry_seconds)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.asked = config.evaluation.split
        if self.asked and self.asked not in self.index.splits:
            raise ConfigError(
                f"evaluation.split={self.asked}: {self.index.folder} has no such split, but "
                f"{', '.join(sorted(self.index.splits))}"
            )
        train = "train"
        # ImageNet's held-out images are called val; some published sets have none (CelebA-HQ, LSUN)
        test = self.asked or self._called("test") or self._called("val")
        self.held_out = test not in (None, train)
        self.names = {"train": train, "test": test or train}

    def _called(self, split: str) -> str | None:
        """The set's own name of a split."""
        if split in self.index.splits:
            return split
        return next((name for name in sorted(self.index.splits) if split_name(name) == split), None)

    def need_held_out(self) -> None:
        """Raises Unmeasurable where measures would be taken on the training images, unless that was asked for."""
        if not self.held_out and not self.asked:
            raise Unmeasurable(
                f"{self.index.folder} has no test or val split: prepare one, or ask for evaluation.split=train"
            )

    def need_labels(self) -> None:
        """Raises Unmeasurable where the measured images have none."""
        if self.labelled and self.index.split(self.names["test"]).labels is None:
            raise Unmeasurable(f"split {self.names['test']} of {self.index.folder} has no labels")

    @property
    def measured_on(self) -> dict[str, Any]:
        """What measures were taken on, to be kept beside them."""
        name = self.names["test"]
        return {"split": name, "images": self.index.samples(name), "held_out": self.held_out}

    def batches(self, split: str) -> FixedBatches:
        """Batches of exactly `evaluation.batch` images; the last is filled up with rows that are not valid, and damaged
        samples are not valid either."""
        data, name = self.config.data, self.names[split]
        labelled = self.labelled and self.index.split(name).labels is not None
        # a task that is trained without labels may have another number of classes than its probes find
        classes = max(data.num_classes, len(self.index.classes)) if labelled else 0
        return fixed_batches(self.config, self.index, name, classes)

    def features(self, split: str, function: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """A function's float64 [n, F] of images [b, c, h, w], and their labels int64 [n]: of the first IN_MEMORY images
        of a split, read batch by batch, over ranks. Collective."""
        batches = self.batches(split)

        def part(number: int) -> tuple[np.ndarray, np.ndarray]:
            batch = batches[number]
            found = function(batch.images).cpu()[batch.valid]
            return found.numpy(), batch.labels[batch.valid].numpy()

        most = min(len(batches), -(-IN_MEMORY // self.config.evaluation.batch))
        features, labels = (np.concatenate(parts)[:IN_MEMORY] for parts in zip(*spread(most, part), strict=True))
        return features.astype(np.float64), labels

    def first(self, split: str, count: int) -> ImageSet:
        """The first ``count`` images of a split, or as many as it has."""
        images, labels, found = [], [], 0
        for batch in self.batches(split):
            images.append(batch.images[batch.valid])
            labels.append(batch.labels[batch.valid])
            found += len(images[-1])
            if found >= count:
                break
        return ImageSet(torch.cat(images)[:count], torch.cat(labels)[:count])

    @property
    def held(self) -> int:
        """How many images of a split are held at once."""
        data = self.config.data
        return min(IN_MEMORY, int(MEMORY / (4 * data.image_channels * data.image_size**2)))

    @cached_property
    def train(self) -> ImageSet:
        """The first training images, as many as are held."""
        return self.first("train", self.held)

    @cached_property
    def test(self) -> ImageSet:
        """The first test images, as many as are held."""
        return self.first("test", self.held)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels that count."""
        return self.config.data.num_classes > 0 and self.index.split(self.names["train"]).labels is not None

    def class_name(self, label: int) -> str:
        """The manifest's name of a class, or its number."""
        return self.index.classes[label] if label < len(self.index.classes) else str(label)

    @cached_property
    def class_frequencies(self) -> Tensor:
        """Frequencies [K] of the classes among the training images, in float32."""
        counts = torch.bincount(self.train.labels, minlength=self.config.data.num_classes).float()
        return counts / counts.sum()

    @cached_property
    def digit_classifier(self) -> DigitClassifier | None:
        """A classifier trained on the real training images; for digits alone: raw pixels are enough for them.
        Collective."""
        if self.config.data.embedded != "digits":
            return None
        return once(lambda: DigitClassifier(self.train.pixels, self.train.labels.numpy()))
