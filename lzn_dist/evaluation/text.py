"""Images and captions: retrieval in both directions, and classification from the classes' descriptions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.distributed.spread import once, spread
from lzn_dist.evaluation.data import IN_MEMORY, EvaluationData, Unmeasurable
from lzn_dist.inference import LZN

RECALLS = (1, 5, 10)
CHUNK = 1024


@dataclass
class Pairs:
    """Unit anchors of images [n, D] and of the different texts [m, D]; belongs: bool [n, m]."""

    images: Tensor
    texts: Tensor
    belongs: Tensor


def embedded_pairs(model: LZN, data: EvaluationData) -> Pairs:
    """The measured images that have captions, and all of these; the first IN_MEMORY images. Collective."""
    batches = data.batches("test")
    dataset = batches.dataset

    def part(number: int) -> tuple[Tensor, list[list[str]]]:
        batch = batches[number]
        anchors = model.anchors(batch.images).float().cpu()[batch.valid]
        return anchors, dataset.captions(batch.index[batch.valid].numpy())

    most = min(len(batches), -(-IN_MEMORY // model.config.evaluation.batch))
    parts = spread(most, part)
    captions = [own for _, found in parts for own in found]
    there = torch.tensor([bool(own) for own in captions])
    if not there.any():
        raise Unmeasurable(f"split {data.names['test']} of {data.index.folder} has no captions")
    texts = list(dict.fromkeys(text for own in captions for text in own))
    numbers = {text: number for number, text in enumerate(texts)}
    kept = [own for own in captions if own]
    belongs = torch.zeros(len(kept), len(texts), dtype=torch.bool)
    for row, own in enumerate(kept):
        belongs[row, [numbers[text] for text in own]] = True
    embedded = spread(
        -(-len(texts) // CHUNK), lambda number: model.embed_text(texts[number * CHUNK : (number + 1) * CHUNK]).cpu()
    )
    images = torch.cat([anchors for anchors, _ in parts])[there]
    return Pairs(F.normalize(images, dim=1), F.normalize(torch.cat(embedded).float(), dim=1), belongs)


def recalls(queries: Tensor, candidates: Tensor, belongs: Tensor, name: str) -> dict[str, float]:
    """The share of queries [q, D] that have one of those [c, D] that belong to them (bool [q, c]) among the k with the
    largest cosines, for each k of RECALLS; of equal ones those that do not belong come first."""
    hits = dict.fromkeys(RECALLS, 0)
    for start in range(0, len(queries), CHUNK):
        own = belongs[start : start + CHUNK]
        cosines = queries[start : start + CHUNK] @ candidates.T
        best = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        before = ((cosines >= best) & ~own).sum(1)
        for k in RECALLS:
            hits[k] += int((before < k).sum())
    return {f"{name}_recall_at_{k}": count / len(queries) for k, count in hits.items()}


def retrieval_values(model: LZN, data: EvaluationData) -> dict[str, float]:
    """image_to_text_recall_at_1 (5, 10): an image looks for one of its captions among all; text_to_image_…: each
    caption for one of its images. By the cosine of (centred) anchors. Collective."""
    data.need_held_out()
    pairs = embedded_pairs(model, data)
    return once(
        lambda: (
            recalls(pairs.images, pairs.texts, pairs.belongs, "image_to_text")
            | recalls(pairs.texts, pairs.images, pairs.belongs.T, "text_to_image")
        )
    )


def zero_shot_values(model: LZN, data: EvaluationData) -> dict[str, float]:
    """zero_shot_accuracy: of `LZN.zero_shot` with the classes' names in evaluation.templates. Collective."""
    data.need_held_out()
    data.need_labels()
    settings = model.config.evaluation
    names = settings.class_names or data.index.classes
    if not data.labelled or len(names) < 2:
        raise Unmeasurable("the classes have no names: set evaluation.class_names")
    if settings.class_names and data.index.classes and len(names) != len(data.index.classes):
        raise Unmeasurable(
            f"evaluation.class_names has {len(names)} names, {data.index.folder} {len(data.index.classes)} classes"
        )
    texts = [[template.replace("{}", name) for template in settings.templates] for name in names]
    batches = data.batches("test")

    def hits(number: int) -> tuple[int, int]:
        batch = batches[number]
        right = torch.eq(model.zero_shot(batch.images, texts).argmax(1).cpu(), batch.labels)[batch.valid]
        return int(right.sum()), len(right)

    right, count = (sum(part) for part in zip(*spread(len(batches), hits), strict=True))
    return {"zero_shot_accuracy": right / count}
