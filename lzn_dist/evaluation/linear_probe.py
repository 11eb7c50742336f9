"""The published linear probe: a dense layer on frozen features of augmented images (arXiv 2509.15591, appendix).

AdamW 3e-4 without weight decay, 300 epochs, batch 8192, on the features before the head; the encoder has averaged
weights, the test images are cropped at the centre. Unlike `probe.linear_probe`, which fits cached features of the
images as they are, each epoch sees new augmentations, so that the encoder runs throughout: hours on ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.config import ConfigError
from lzn_dist.data import Batch
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import all_gather_object
from lzn_dist.distributed.spread import spread
from lzn_dist.evaluation.data import EvaluationData
from lzn_dist.inference import LZN
from lzn_dist.modalities import Image
from lzn_dist.terminal import one_line
from lzn_dist.training.batches import open_stream
from lzn_dist.training.checkpoint_reader import read_saved
from lzn_dist.training.tracking import BadSamples

TOP = (1, 5, 10)


@dataclass(frozen=True)
class ProbeSettings:
    """epochs: over the training images; batch: images a step, over all ranks; lr: of AdamW, without weight decay.
    views: how the training images are augmented (data.views); "": simclr in colour, digits in grey, whatever the model
    was trained with.
    """

    epochs: int = 300
    batch: int = 8192
    lr: float = 3e-4
    views: Literal["", "simclr", "digits", "none"] = ""


def published_probe(
    model: LZN, data: EvaluationData, settings: ProbeSettings, folder: Path,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict[str, float]:  # fmt: skip
    """Train the probe and measure its top-1, top-5 and top-10 accuracy on the test split. Collective.

    folder/linear_probe.pt holds the last finished epoch: the same call goes on from there, on any number of ranks, and
    ends as it would have without a stop. progress: called after each epoch with its mean loss.
    Raises ConfigError where the data has no labels, fewer images than a batch or too many damaged ones, and on all
    ranks the OSError (a lost server, say) of any.
    """
    config, topology = model.config, Topology.current()
    if not data.labelled:
        raise ConfigError("a linear probe needs labels: set data.num_classes")
    policy = settings.views or ("simclr" if config.data.image_channels == 3 else "digits")
    keep = config.data.cache_decoded and policy != "simclr"  # which crops anew in each epoch
    changes = {"global_batch": settings.batch, "views": policy, "cache_decoded": keep}
    views = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    try:
        stream = open_stream(views, topology, labelled=True, augmented=True)
    except ValueError as error:
        raise ConfigError(f"linear probe: {error}") from error
    probe, optimizer, first = _begin(model, settings, folder / "linear_probe.pt")
    bad = BadSamples(None)
    for epoch in range(first, settings.epochs):
        total = torch.zeros((), device=model.device)
        start = epoch * stream.batches_per_epoch
        batches = stream.iterate(start, start + stream.batches_per_epoch)
        for number in range(start, start + stream.batches_per_epoch):
            batch = _next(batches, bad, number, config.data.max_bad_samples)
            image, *_ = Image(views).views(batch, batch.index.to(model.device), 1, augmented=True)
            loss = F.cross_entropy(probe(model.embed(image).float()), batch.labels.to(model.device))
            optimizer.zero_grad()
            loss.backward()
            _average([p.grad for p in probe.parameters() if p.grad is not None], topology)
            optimizer.step()
            total += loss.detach()
        _average([total], topology)
        if topology.is_main:
            _save(folder / "linear_probe.pt", probe, optimizer, epoch + 1, model.step, settings)
        progress(epoch + 1, float(total) / stream.batches_per_epoch)
    return _accuracy(model, probe, data)


def _next(batches: Iterator[Batch], bad: BadSamples, number: int, most: int) -> Batch:
    """The next batch; its damaged samples are told and counted as in training. Collective: what one rank cannot read
    ends all of them."""
    batch, damaged = None, 0
    lost: Exception | None = None
    try:
        batch = next(batches)
        damaged = bad.count(batch)
    except (OSError, ValueError) as error:
        lost = error
    told = all_gather_object((lost, damaged))
    total = sum(count for _, count in told)
    new_damage = bad.report(total, number)
    for problem in (problem for problem, _ in told if problem is not None):
        raise problem if isinstance(problem, OSError) else ConfigError(f"linear probe: {problem}")
    if new_damage and total > most:
        raise ConfigError(
            f"linear probe: {total} samples of this epoch are damaged, data.max_bad_samples is {most}: mend the shards "
            "or raise it"
        )
    assert batch is not None
    return batch


def _begin(model: LZN, settings: ProbeSettings, path: Path) -> tuple[nn.Linear, torch.optim.AdamW, int]:
    """A fresh probe, the same on every rank, or the one of a stopped call; and the number of its finished epochs."""
    data = model.config.data
    image = torch.zeros(1, data.image_channels, data.image_size, data.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.config.seed)
        probe = nn.Linear(model.embed(image).shape[1], data.num_classes).to(model.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr, weight_decay=0.0)
    if not path.is_file():
        return probe, optimizer, 0
    try:
        found = read_saved(path, model.device)
        told, epoch = (found["step"], found["batch"], found["lr"]), int(found["epoch"])
        if told == (model.step, settings.batch, settings.lr):
            probe.load_state_dict(found["probe"])
            optimizer.load_state_dict(found["optimizer"])
            return probe, optimizer, epoch
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path} is damaged ({one_line(error)}): remove it to begin anew") from error
    raise ConfigError(f"{path} is of another checkpoint or other settings: remove it to begin anew")


def _average(tensors: list[Tensor], topology: Topology) -> None:
    if topology.world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= topology.world_size


def _save(
    path: Path, probe: nn.Linear, optimizer: torch.optim.AdamW, epoch: int, step: int, settings: ProbeSettings
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    state = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    torch.save({**state, "step": step, "batch": settings.batch, "lr": settings.lr}, temporary)
    temporary.replace(path)


@torch.no_grad()
def _accuracy(model: LZN, probe: nn.Linear, data: EvaluationData) -> dict[str, float]:
    batches = data.batches("test")

    def hits(number: int) -> Tensor:
        batch = batches[number]
        ranked = probe(model.embed(batch.images).float()).argsort(1, descending=True).cpu()
        place = torch.eq(ranked, batch.labels[:, None]).int().argmax(1)[batch.valid]  # of the true class
        return torch.tensor([int((place < k).sum()) for k in TOP] + [len(place)])

    *right, trials = torch.stack(spread(len(batches), hits)).sum(0).tolist()
    return {f"published_probe_top{k}": count / trials for k, count in zip(TOP, right, strict=True)}
