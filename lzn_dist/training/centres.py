"""Anchors of the first training samples: their mean, where evaluation centres, and those that a model is used among."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.data import Batch, ShardedDataset, ShardIndex, Tokenizer
from lzn_dist.distributed.pieces import gather_pieces
from lzn_dist.distributed.spread import spread
from lzn_dist.modalities import Modality, Network, modality
from lzn_dist.networks import Networks
from lzn_dist.objectives import build_networks
from lzn_dist.training.batches import whole_dataset
from lzn_dist.training.checkpoint import average_pieces
from lzn_dist.training.step import TrainState


def averaged_networks(state: TrainState) -> Networks:
    """Networks with the averaged weights, on the engine's device, in evaluation mode. Collective."""
    averages = gather_pieces(average_pieces(state.ema, state.engine), everywhere=True)
    networks = build_networks(state.config)
    networks.load_state_dict(averages | state.engine.buffers)  # type: ignore[operator]
    return networks.to(state.engine.device).eval()


def measure_centres(state: TrainState, index: ShardIndex) -> None:
    """Bring an objective's centres up to date, where it has some. Collective. Raises OSError and ValueError where the
    data is away or damaged; the centres are then as they were."""
    if state.objective.centres:
        state.objective.centres.update(mean_anchors(averaged_networks(state), state.config, index))


def _sample_kinds(config: Config, names: Iterable[str]) -> dict[str, Modality]:
    kinds = {name: modality(name, config) for name in names}
    return {name: kind for name, kind in kinds.items() if not kind.table}


def _anchors(
    networks: Networks, kinds: Mapping[str, Modality], dataset: ShardedDataset, start: int, stop: int
) -> dict[str, Tensor]:
    """Anchors [b, D] of each data type as its encoder gives them, of those of these samples that have data of it."""
    first = next(networks.parameters())
    device = first.device
    read = dataset.read_or_replace(torch.arange(start, stop).numpy())
    rows = torch.from_numpy(read.rows).to(device)
    batch = Batch(torch.from_numpy(read.rows), read.pixels, read.labels, 0, members=read.members)
    found = {}
    for name, kind in kinds.items():
        (view, *_) = kind.views(batch, rows, 1, False)
        view = view.to(first.dtype) if view.is_floating_point() else view
        encoder: Network = networks.find(name, "encoder")  # type: ignore[assignment]
        anchors, present = kind.encode(encoder, view, rows), kind.present(view)
        found[name] = anchors if present is None else anchors[present]
    return found


@torch.no_grad()
def mean_anchors(networks: Networks, config: Config, index: ShardIndex) -> dict[str, Tensor]:
    """The mean anchor [D] of each data type that is centred and has an encoder of samples, over the first
    `evaluation.centre_samples` training samples (those that have data of it), in float32 on the CPU. Collective."""
    kinds = {name: kind for name, kind in _sample_kinds(config, networks).items() if kind.centred}
    dataset = whole_dataset(config, index, "train")
    count, size = min(len(dataset), config.evaluation.centre_samples), config.evaluation.batch

    def sums(number: int) -> dict[str, tuple[Tensor, int]]:
        found = _anchors(networks, kinds, dataset, number * size, min(count, (number + 1) * size))
        return {name: (anchors.double().sum(0).cpu(), len(anchors)) for name, anchors in found.items()}

    parts = spread(-(-count // size), sums)
    found = {}
    for name in kinds:
        total = torch.stack([part[name][0] for part in parts]).sum(0)
        found[name] = (total / max(1, sum(part[name][1] for part in parts))).float()
    return found


@torch.no_grad()
def reference_anchors(
    networks: Networks, config: Config, names: Sequence[str], count: int, tokenizer: Tokenizer | None = None,
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Anchors [n, D] of data types with an encoder, as it gives them, of the first `count` training samples (of those
    that have data of it), in float32 at least, on the networks' device.

    tokenizer: the model's, where it brings one. show: is told how many samples are done, of how many. Raises
    FileNotFoundError and ConfigError where the shards or their tokenizer are not there, CorruptSampleError for damaged
    ones.
    """
    data = config.data
    index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
    dataset, kinds = whole_dataset(config, index, "train", names, tokenizer), _sample_kinds(config, names)
    count, size = min(len(dataset), count), min(config.evaluation.batch, 512)
    parts: dict[str, list[Tensor]] = {name: [] for name in kinds}
    for start in range(0, count, size):
        for name, anchors in _anchors(networks, kinds, dataset, start, min(count, start + size)).items():
            parts[name].append(anchors if anchors.dtype == torch.float64 else anchors.float())
        if show is not None:
            show(min(count, start + size), count)
    return {name: torch.cat(own) for name, own in parts.items()}
