"""Do generated images show what they should, and how well are images reconstructed?

The published conditional sampling gives the decoder a latent of the class's zone *and* the one-hot label, so the label
alone can carry the class. Whether the zones carry it is seen from latents whose class is only read (by alignment), and
from samples whose latent and label disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lzn_dist.data import EvaluationBatch
from lzn_dist.distributed.spread import spread
from lzn_dist.evaluation.accuracy import Proportion
from lzn_dist.evaluation.frechet import DigitClassifier
from lzn_dist.inference import LZN, Generated


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double().cpu()


def recognised(judge: DigitClassifier, images: Tensor, labels: Tensor) -> Proportion:
    """How many images [n, c, h, w] the judge recognises as labels [n]."""
    found = judge.predict(_pixels(images).numpy())
    return Proportion(int((found == labels.cpu().numpy()).sum()), len(images))


def balanced_labels(classes: int, samples_per_class: int) -> Tensor:
    """0, …, K−1, 0, …, K−1, … : int64 [classes · samples_per_class]; any prefix is balanced."""
    return torch.arange(classes).repeat(samples_per_class)


@dataclass
class Disagreement:
    """Samples whose latent is of one class and whose one-hot label of another: what does the judge see?"""

    latent_wins: Proportion
    label_wins: Proportion


def disagreement(model: LZN, judge: DigitClassifier, samples_per_class: int, seed: int = 0) -> Disagreement:
    """Every latent class A, in turn with the other classes B as one-hot labels."""
    classes = model.config.data.num_classes
    zone = balanced_labels(classes, samples_per_class)
    turn = torch.arange(samples_per_class).repeat_interleave(classes)
    labels = (zone + 1 + turn % (classes - 1)) % classes
    images = generate(model, len(zone), labels, seed, zone).images
    return Disagreement(recognised(judge, images, zone), recognised(judge, images, labels))


def generate(model: LZN, n: int, labels: Tensor | None = None, seed: int = 0, zone: Tensor | None = None) -> Generated:
    """`LZN.generate_with_latents` spread over ranks, results on the CPU of every one. Collective."""
    starts = range(0, n, model.chunk)

    def part(number: int) -> Generated:
        rows = slice(starts[number], min(n, starts[number] + model.chunk))
        found = model.generate_with_latents(
            rows.stop - rows.start, None if labels is None else labels[rows], seed,
            zone=None if zone is None else zone[rows], first=rows.start,
        )  # fmt: skip
        own = None if found.labels is None else found.labels.cpu()
        return Generated(found.images.cpu(), found.latents.cpu(), own, found.nfe)

    parts = spread(len(starts), part)
    found_labels = [part.labels for part in parts if part.labels is not None]
    return Generated(
        torch.cat([part.images for part in parts]), torch.cat([part.latents for part in parts]),
        torch.cat(found_labels) if found_labels else None,
        sum(part.nfe * len(part.images) for part in parts) / n,
    )  # fmt: skip


def image_errors(images: Tensor, originals: Tensor) -> Tensor:
    """L2 distances [n] ‖x̂ − x‖₂, in units of images in [−1, 1]."""
    return (images.double().cpu() - originals.double().cpu()).flatten(1).norm(dim=1)


def reconstruction_errors(model: LZN, batches: Sequence[EvaluationBatch], most: int, seed: int = 0) -> dict[str, float]:
    """Mean `image_errors` of the first ``most`` images and of some more, to a whole batch. Collective.

    reconstruction_error: inverted to noise under their latents and decoded again (paper, section 3.1).
    latent_only_error: *fresh* noise decoded under their latents: what the latents alone hold of the images.
    """
    count = min(len(batches), -(-most // len(batches[0].index)))

    def errors(number: int) -> dict[str, Tensor]:
        batch = batches[number]
        rows = batch.valid.nonzero()[:, 0]
        latents, labels = model.code(batch.images, seed, batch.index, batch.labels)
        latents, labels = latents[rows], None if labels is None else labels[rows]
        images = batch.images[rows]
        rebuilt = model.decode(model.encode_noise(images, latents, labels), latents, labels)
        found = {"reconstruction_error": image_errors(rebuilt, images)}
        if model.has_latents:
            noise = model.noise(len(images), seed, first=int(batch.index[0]))
            found["latent_only_error"] = image_errors(model.decode(noise, latents, labels), images)
        return found

    parts = spread(count, errors)
    return {key: torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}
