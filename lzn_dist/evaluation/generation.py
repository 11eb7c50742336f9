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


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation [w, ...] between two points of one shape: keeps a Gaussian draw's typical norm.

    weights [w]: 0 gives the first, 1 the second. Norms are interpolated linearly; nearly parallel points too.
    """
    shape = first.shape
    a, b = first.flatten().double(), second.flatten().double()
    norms = a.norm(), b.norm()
    cosine = ((a / norms[0]) @ (b / norms[1])).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    w = weights.to(a)[:, None]
    if angle < 1e-4:
        path = (1 - w) * a + w * b
    else:
        direction = (torch.sin((1 - w) * angle) * a / norms[0] + torch.sin(w * angle) * b / norms[1]) / angle.sin()
        path = direction * ((1 - w) * norms[0] + w * norms[1])
    return path.reshape(len(weights), *shape).to(first.dtype)


def interpolate(
    model: LZN, images: Tensor, first: int, second: int, count: int = 9, seed: int = 0, labels: Tensor | None = None
) -> Tensor:
    """``count`` images [count, c, h, w] between images[first] and images[second], through latents and noise.

    images is the fixed batch that the latents are computed over. A joint model's one-hot labels are read from the
    latents on the way; a decoder that takes labels without zones gets the nearer end's, of labels int64 [b].
    """
    latents, own = model.code(images, seed, labels=labels)
    pair = torch.tensor([first, second], device=latents.device)
    ends = None if own is None else own[pair]
    noise = model.encode_noise(images[pair.cpu()], latents[pair], ends)
    weights = torch.linspace(0, 1, count)
    path = slerp(latents[first], latents[second], weights)
    if model.has_labels:
        path_labels: Tensor | None = model.read_class(path)
    else:
        path_labels = None if ends is None else ends[(weights > 0.5).long().to(ends.device)]
    return model.decode(slerp(noise[0], noise[1], weights), path, path_labels)


def interpolate_texts(model: LZN, first: str, second: str, count: int = 9, seed: int = 0) -> Tensor:
    """``count`` images [count, c, h, w] between two texts, of one noise."""
    ends = model.given("image", texts=[first, second], seed=seed)
    path = slerp(ends[0], ends[1], torch.linspace(0, 1, count)).to(ends.device)
    labels = model.decoder_labels(path, None, count) if model.takes_labels else None
    return model.decode(model.noise(1, seed).expand(count, -1, -1, -1), path, labels)
