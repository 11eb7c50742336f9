"""FID, sFID, Inception score, precision and recall of generated images against the training images, over ranks.

The images are those of `LZN.generate_with_latents` by sample number, so that neither the number of ranks nor of
images at a time changes them; the features' moments are joined in float64. Real images are resized and cropped as in
training and not mirrored; their statistics are kept in a file named by all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lzn_dist.distributed import Topology
from lzn_dist.distributed.spread import once, spread
from lzn_dist.evaluation.data import EvaluationData
from lzn_dist.evaluation.distribution import Moments, frechet_distance_of, inception_score, precision_recall
from lzn_dist.evaluation.inception import InceptionOutput
from lzn_dist.inference import LZN
from lzn_dist.terminal import one_line

MANIFOLD = 10_000  # samples of each side for precision and recall, which compare all pairs; as published evaluators do

_REAL = np.dtype(np.float64)  # of moments
Network = Callable[[Tensor], InceptionOutput]


@dataclass(frozen=True)
class Statistics:
    """What is kept of a set of images: moments of pool and spatial features, the pool features [≤ MANIFOLD, F] of the
    first images, and class probabilities [n, K] (empty for real images)."""

    pool: Moments
    spatial: Moments
    first: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write an .npz so that a reader sees all of it or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(
                file, count=self.pool.count, first=self.first,
                pool_mean=self.pool.mean, pool_covariance=self.pool.covariance,
                spatial_mean=self.spatial.mean, spatial_covariance=self.spatial.covariance,
            )  # fmt: skip
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """What `save` wrote. Raises ValueError, naming the file, where that is damaged; zipfile compares checksums."""
        try:
            with np.load(path, allow_pickle=False) as file:
                count, first = int(file["count"]), file["first"]
                found = {kind: (file[f"{kind}_mean"], file[f"{kind}_covariance"]) for kind in ("pool", "spatial")}
            for mean, covariance in found.values():
                if mean.ndim != 1 or covariance.shape != 2 * mean.shape or {mean.dtype, covariance.dtype} != {_REAL}:
                    raise ValueError("its moments have other shapes than moments have")
            if first.dtype != np.float32 or first.shape != (min(count, MANIFOLD), len(found["pool"][0])):
                raise ValueError("its features have another shape than features have")
        except Exception as error:  # numpy's header alone can raise SyntaxError, TokenError, MemoryError and others
            raise ValueError(f"{path} is damaged ({one_line(error)})") from error
        pool, spatial = (Moments(count, *found[kind]) for kind in ("pool", "spatial"))
        return Statistics(pool, spatial, first, np.zeros((0, 0), np.float32))


def fid_values(
    model: LZN, data: EvaluationData, network: Network, *, weights: str, cache: Path, samples: int, seeds: Iterable[int]
) -> dict[str, float]:
    """fid, sfid, inception_score, precision, recall: means over seeds, with their standard deviations under _std where
    there are several; fid_samples (generated), fid_real_images, fid_image_size (that the real ones were resized to; the
    network resizes once more) and fid_seeds: what they were measured on. Collective.

    weights: the network's digest; cache: the folder for real images' statistics. By label where the model takes
    labels, all equally often (the published conditional FID).
    """
    real = real_statistics(data, network, weights, cache)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        fake = sampled_statistics(model, network, samples, seed)
        for key, value in once(lambda fake=fake: _distances(real, fake)).items():  # type: ignore[misc]
            found.setdefault(key, []).append(value)
    values = {key: statistics.fmean(each) for key, each in found.items()}
    values |= {f"{key}_std": statistics.stdev(each) for key, each in found.items() if len(each) > 1}
    measured_on = {"samples": samples, "real_images": real.pool.count, "image_size": model.config.data.image_size}
    measured_on["seeds"] = len(found["fid"])
    return values | {f"fid_{key}": float(value) for key, value in measured_on.items()}


def _distances(real: Statistics, fake: Statistics) -> dict[str, float]:
    precision, recall = precision_recall(real.first, fake.first)
    return {
        "fid": frechet_distance_of(real.pool, fake.pool),
        "sfid": frechet_distance_of(real.spatial, fake.spatial),
        "inception_score": inception_score(fake.probabilities)[0],
        "precision": precision,
        "recall": recall,
    }


def real_statistics(data: EvaluationData, network: Network, weights: str, cache: Path) -> Statistics:
    """Of all training images; from the cache where they are there. Not kept where nothing says which images they are
    (no manifest), or where some are damaged. Collective."""
    settings = data.config.data
    depends = [data.index.identity, data.names["train"], weights, settings.image_size, settings.resize,
               settings.image_channels, settings.scaled_decoding, MANIFOLD]  # fmt: skip
    path = cache / f"inception-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.npz"
    if data.index.identity and (kept := once(lambda: _kept(path))) is not None:
        return kept
    batches = data.batches("train")

    def images(number: int) -> Tensor:
        batch = batches[number]
        return batch.images[batch.valid]

    found = _statistics(len(batches), data.config.evaluation.batch, images, network, keep_probabilities=False)
    if data.index.identity and found.pool.count == data.index.samples(data.names["train"]):
        once(lambda: found.save(path))
    return found


def _kept(path: Path) -> Statistics | None:
    """What the cache has; None where it has nothing, or something damaged, which is told and made anew."""
    if not path.is_file():
        return None
    try:
        return Statistics.load(path)
    except ValueError as error:
        print(f"{error}: measuring the real images again", file=sys.stderr, flush=True)
        return None


def sampled_statistics(model: LZN, network: Network, samples: int, seed: int) -> Statistics:
    """Of generated images 0 … samples − 1 under a seed. Collective."""
    size = model.chunk

    def images(number: int) -> Tensor:
        first = number * size
        count = min(size, samples - first)
        labels = torch.arange(first, first + count) % model.config.data.num_classes if model.takes_labels else None
        return model.generate(count, labels, seed, first=first)

    return _statistics(-(-samples // size), size, images, network, keep_probabilities=True)


@dataclass
class _Part:
    """What one rank has seen: moments, and by number of the batch what must keep its order."""

    pool: Moments | None
    spatial: Moments | None
    first: dict[int, NDArray[np.float32]]
    probabilities: dict[int, NDArray[np.float32]]


def _statistics(
    batches: int, size: int, images: Callable[[int], Tensor], network: Network, *, keep_probabilities: bool
) -> Statistics:
    """Of images(0), …, images(batches − 1), each of ``size`` images but the last, spread over ranks."""
    world_size = Topology.current().world_size

    def part(rank: int) -> _Part:
        found = _Part(None, None, {}, {})
        for number in range(rank, batches, world_size):
            output = network(images(number))
            found.pool = _joined(found.pool, output.pool)
            found.spatial = _joined(found.spatial, output.spatial)
            if number * size < MANIFOLD:
                found.first[number] = output.pool
            if keep_probabilities:
                found.probabilities[number] = output.probabilities
        return found

    parts = spread(world_size, part)
    kept = [
        {number: rows for part in parts for number, rows in getattr(part, name).items()}
        for name in ("first", "probabilities")
    ]
    first, probabilities = (
        np.concatenate([rows[number] for number in sorted(rows)]) if rows else np.zeros((0, 0), np.float32)
        for rows in kept
    )
    return Statistics(
        reduce(Moments.merged, [part.pool for part in parts if part.pool is not None]),
        reduce(Moments.merged, [part.spatial for part in parts if part.spatial is not None]),
        first[:MANIFOLD],
        probabilities,
    )


def _joined(moments: Moments | None, features: NDArray[np.float32]) -> Moments:
    return Moments.none(features.shape[1]).joined(features) if moments is None else moments.joined(features)
