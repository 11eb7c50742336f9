"""From a configuration to the stream of training batches, and from a batch to the samples that an objective sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import (
    Batch,
    BatchStream,
    FixedBatches,
    MemberReader,
    RandomResizedCrops,
    SampleOrder,
    ShardedDataset,
    ShardIndex,
    Tokenizer,
    whole_images,
)
from lzn_dist.distributed import Topology
from lzn_dist.modalities import modality
from lzn_dist.objectives import Objective, Samples, needs
from lzn_dist.prepare.digits import ensure_digits
from lzn_dist.training.resolve import first_images, tokenizer_of


def open_stream(config: Config, topology: Topology, *, labelled: bool = False, augmented: bool = False) -> BatchStream:
    """A rank's stream of training batches. labelled, augmented: labels, and augmented images, are needed whatever the
    objective.

    Raises ConfigError where they are needed and the shards have none, or another number of classes, and where images
    have another size; ValueError or OSError, naming the shards.
    """
    data, wanted = config.data, needs(config)
    simclr = (augmented or wanted.augmented) and data.views == "simclr"
    try:
        index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if index.samples("train") < 2:
        raise ConfigError(f"{index.folder} has a single training image: zones are made between two at least")
    if data.global_batch < 2 and wanted.latents:
        raise ConfigError(
            "data.global_batch=1: a batch's images share the latent space, two at least: set it to 2 or more"
        )
    if (measured := config.evaluation.split) and measured not in index.splits:  # not only when it is measured
        raise ConfigError(f"evaluation.split={measured}: {index.folder} has {', '.join(sorted(index.splits))}")
    if not simclr and not data.resize:
        _check_sizes(index, data.image_size)
    labelled = labelled or wanted.labels
    if labelled:
        _check_labels(index, data.num_classes)
    if "text" in wanted.modalities and "txt" not in index.split("train").offsets:
        raise ConfigError(f"{index.folder} has no captions (KEY.txt), which this objective needs")
    dataset = ShardedDataset(
        index, "train", data.image_channels,
        RandomResizedCrops(data.image_size, config.seed, scaled_decoding=data.scaled_decoding)
        if simclr else whole_images(data.image_size, data.resize, data.scaled_decoding),
        num_classes=data.num_classes if labelled else 0, partial=data.partial, members=member_readers(config, index),
        cache_decoded=data.cache_decoded, shared=data.workers > 0,
        seed=config.seed,
    )  # fmt: skip
    order = SampleOrder(
        [shard.samples for shard in dataset.table.shards], data.global_batch, config.seed, data.streams,
        data.shuffle_window,
    )  # fmt: skip
    return BatchStream(dataset, order, topology.rank, topology.world_size, data.workers)


def member_readers(
    config: Config, index: ShardIndex, names: Iterable[str] | None = None, tokenizer: Tokenizer | None = None
) -> dict[str, MemberReader]:
    """Of the data types (default: the run's) that are neither image nor label. tokenizer: default: as `tokenizer_of`
    finds it. Raises ConfigError."""
    wanted = [modality(name, config) for name in (needs(config).modalities if names is None else names)]
    if tokenizer is None and any(kind.name == "text" for kind in wanted):
        tokenizer = tokenizer_of(config, index)
    found = {kind.name: kind.reader(tokenizer) for kind in wanted}
    return {name: reader for name, reader in found.items() if reader is not None}


def whole_dataset(
    config: Config, index: ShardIndex, split: str, names: Iterable[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> ShardedDataset:  # fmt: skip
    """A split's whole images, as evaluation resizes and crops them, and what other data types have beside them; names
    and tokenizer: as for `member_readers`."""
    data = config.data
    return ShardedDataset(
        index, split, data.image_channels, whole_images(data.image_size, data.resize, data.scaled_decoding),
        partial=data.partial, members=member_readers(config, index, names, tokenizer), seed=config.seed,
    )  # fmt: skip


def _check_sizes(index: ShardIndex, image_size: int) -> None:
    """Before anything is written: images that are read as they are have the size that the networks are made for."""
    sizes = Counter((height, width) for height, width, _ in first_images(index))
    if set(sizes) != {(image_size, image_size)}:
        each = ", ".join(f"{n} of {h}x{w}" for (h, w), n in sizes.most_common(3)) + (", …" if len(sizes) > 3 else "")
        raise ConfigError(
            f"the first images of {index.folder} are {each} pixels, data.image_size is {image_size}: write the shards "
            f"at that size (data_prep/image_folder.py --resize {image_size} --crop), or set data.resize={image_size} "
            "to bring them to it as they are read; configs/images_*.yaml take the size from the shards"
        )


def _check_labels(index: ShardIndex, num_classes: int) -> None:
    """What the index knows of them; a single label is looked at when it is read."""
    if index.split("train").labels is None:
        raise ConfigError(
            f"{index.folder} has no labels, which this task needs: use labelled shards, or task=generation (without "
            "decoder.class_conditional) or task=representation (not objective=supervised)"
        )
    if index.classes and len(index.classes) != num_classes:
        raise ConfigError(
            f"data.num_classes is {num_classes}, but {index.folder} has {len(index.classes)} classes: set "
            f"data.num_classes={len(index.classes)}"
        )


def make_embedded_data(config: Config, accelerator: Accelerator) -> None:
    """Write an embedded data set where it is missing: one process does, the others wait."""
    if config.data.embedded == "digits":
        with accelerator.main_process_first():
            ensure_digits(Path(config.data.shards))


def fixed_batches(config: Config, index: ShardIndex, split: str, num_classes: int = 0) -> FixedBatches:
    """A split's whole images, as evaluation resizes and crops them, in batches of exactly `evaluation.batch`."""
    data = config.data
    reading = whole_images(data.image_size, data.resize, data.scaled_decoding)
    dataset = ShardedDataset(index, split, data.image_channels, reading, num_classes=num_classes)
    return dataset.fixed_batches(config.evaluation.batch)


def prepare_samples(
    batch: Batch, number: int, objective: Objective, device: torch.device, topology: Topology
) -> Samples:
    """Views, positions and labels of a rank's share of global batch `number`, on the device, in the run's dtype."""
    index, wanted = batch.index.to(device, non_blocking=True), objective.needs
    inputs = {
        name: found.views(batch, index, wanted.views(name), wanted.augmented)
        for name, found in objective.modalities.items()
    }
    if objective.config.precision == "float64":
        inputs = {
            name: tuple(view.double() if view.is_floating_point() else view for view in views)
            for name, views in inputs.items()
        }
    position = torch.arange(len(index), device=device) + topology.rank * len(index)
    return Samples(number, index, position, inputs, batch.labels.to(device, non_blocking=True))
