"""Do generated images show what they should, and how well are images reconstructed?

The published conditional sampling gives the decoder a latent of the class's zone *and* the one-hot label, so the label
alone can carry the class. Whether the zones carry it is seen from latents whose class is only read (by alignment), and
from samples whose latent and label disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lzn_dist.evaluation.accuracy import Proportion
from lzn_dist.evaluation.frechet import DigitClassifier
from lzn_dist.model import LZN


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
    images = model.generate(len(zone), labels, seed, zone=zone)
    return Disagreement(recognised(judge, images, zone), recognised(judge, images, labels))


def image_error(images: Tensor, originals: Tensor) -> float:
    """Mean over images of the L2 distance ‖x̂ − x‖₂, in units of images in [−1, 1]."""
    difference = images.double().cpu() - originals.double().cpu()
    return difference.flatten(1).norm(dim=1).mean().item()


def latent_only_error(model: LZN, images: Tensor, seed: int = 0) -> float:
    """`image_error` of decoding *fresh* noise under the images' latents: what the latents alone hold of the images."""
    latents = model.latents(images, seed=seed)
    labels = model.read_class(latents) if model.has_labels else None
    return image_error(model.decode(model.noise(len(images), seed), latents, labels), images)


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


def interpolate(model: LZN, images: Tensor, first: int, second: int, count: int = 9, seed: int = 0) -> Tensor:
    """``count`` images [count, c, h, w] between images[first] and images[second], through latents and noise.

    images is the fixed batch that the latents are computed over. A joint model's one-hot labels are read from the
    latents on the way.
    """
    latents = model.latents(images, seed=seed)
    pair = torch.tensor([first, second], device=latents.device)
    labels = model.read_class(latents[pair]) if model.has_labels else None
    noise = model.encode_noise(images[pair.cpu()], latents[pair], labels)
    weights = torch.linspace(0, 1, count)
    path = slerp(latents[first], latents[second], weights)
    path_labels = model.read_class(path) if model.has_labels else None
    return model.decode(slerp(noise[0], noise[1], weights), path, path_labels)
