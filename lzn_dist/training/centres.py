"""Where evaluation centres anchors: the mean of the averaged encoder's own over the first training samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.data import Batch, ShardIndex
from lzn_dist.distributed.pieces import gather_pieces
from lzn_dist.distributed.spread import spread
from lzn_dist.modalities import Network, modality
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


@torch.no_grad()
def mean_anchors(networks: Networks, config: Config, index: ShardIndex) -> dict[str, Tensor]:
    """The mean anchor [D] of each data type that is centred and has an encoder of samples, over the first
    `evaluation.centre_samples` training samples (those that have data of it), in float32 on the CPU. Collective."""
    kinds = {name: modality(name, config) for name in networks}
    kinds = {name: kind for name, kind in kinds.items() if kind.centred and not kind.table}
    dataset = whole_dataset(config, index, "train")
    device = next(networks.parameters()).device
    count, size = min(len(dataset), config.evaluation.centre_samples), config.evaluation.batch

    def sums(number: int) -> dict[str, tuple[Tensor, int]]:
        read = dataset.read_or_replace(torch.arange(number * size, min(count, (number + 1) * size)).numpy())
        rows = torch.from_numpy(read.rows).to(device)
        batch = Batch(torch.from_numpy(read.rows), read.pixels, read.labels, 0, members=read.members)
        found = {}
        for name, kind in kinds.items():
            (view, *_) = kind.views(batch, rows, 1, False)
            encoder: Network = networks.find(name, "encoder")  # type: ignore[assignment]
            anchors = kind.encode(encoder, view, rows).double()
            present = kind.present(view)
            if present is not None:
                anchors = anchors[present]
            found[name] = (anchors.sum(0).cpu(), len(anchors))
        return found

    parts = spread(-(-count // size), sums)
    found = {}
    for name in kinds:
        total = torch.stack([part[name][0] for part in parts]).sum(0)
        found[name] = (total / max(1, sum(part[name][1] for part in parts))).float()
    return found
