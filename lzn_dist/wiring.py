"""From a configuration to a stream of samples and a state to train: what the entry points share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import ValidationError

from lzn_dist.checkpoint import CheckpointError, RunRecord, held_checkpoint, load_weights, resume_state
from lzn_dist.config import Config, ConfigError
from lzn_dist.data import (
    Batch,
    BatchStream,
    RandomResizedCrops,
    SampleOrder,
    ShardedDataset,
    ShardIndex,
    augment,
    ensure_digits,
    to_unit_range,
    whole_images,
)
from lzn_dist.data.pixels import load_with_pillow
from lzn_dist.data.storage import RemoteError
from lzn_dist.distributed import Topology, gather_anchors, ring_field
from lzn_dist.distributed.engine import Engine, TorchEngine, build_engine
from lzn_dist.distributed.grad_cache import check_batch_independent
from lzn_dist.distributed.launch import Launch, same_everywhere
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks, build_networks, fitted
from lzn_dist.objectives import Objective, Samples, build_objective
from lzn_dist.step import TrainState, make_optimizer


def open_stream(config: Config, topology: Topology, *, labelled: bool = False) -> BatchStream:
    """A rank's stream of training batches. labelled: labels are needed whatever the objective.

    Raises ConfigError where they are needed and the shards have none, or another number of classes, and where images
    have another size; ValueError or OSError, naming the shards.
    """
    data, simclr = config.data, config.task == "representation" and config.data.views == "simclr"
    try:
        index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if index.samples("train") < 2:
        raise ConfigError(f"{index.folder} has a single training image: zones are made between two at least")
    if data.global_batch < 2 and config.objective != "rectified_flow":
        raise ConfigError(
            "data.global_batch=1: a batch's images share the latent space, two at least: set it to 2 or more"
        )
    if (measured := config.evaluation.split) and measured not in index.splits:  # not only when it is measured
        raise ConfigError(f"evaluation.split={measured}: {index.folder} has {', '.join(sorted(index.splits))}")
    if not simclr and not data.resize:
        _check_sizes(index, data.image_size)
    labelled = labelled or config.labels_decoder or config.objective == "supervised"
    if labelled:
        _check_labels(index, data.num_classes)
    dataset = ShardedDataset(
        index, "train", data.image_channels,
        RandomResizedCrops(data.image_size, config.seed, scaled_decoding=data.scaled_decoding)
        if simclr else whole_images(data.image_size, data.resize, data.scaled_decoding),
        num_classes=data.num_classes if labelled else 0, cache_decoded=data.cache_decoded, shared=data.workers > 0,
        seed=config.seed,
    )  # fmt: skip
    order = SampleOrder(
        [shard.samples for shard in dataset.table.shards], data.global_batch, config.seed, data.streams,
        data.shuffle_window,
    )  # fmt: skip
    return BatchStream(dataset, order, topology.rank, topology.world_size, data.workers)


def resolve(config: Config) -> Config:
    """A configuration with what it leaves to the data: image size and channels, number of classes, and networks that
    fit these. Reads the shards' index and the first images: every process finds the same.

    Raises ConfigError, and RemoteError where a server is away.
    """
    try:
        return _resolved(config)
    except (ConfigError, RemoteError):
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _resolved(config: Config) -> Config:
    data = config.data
    if data.embedded == "none" and (not data.image_size or not data.image_channels or data.num_classes < 0):
        index = ShardIndex.load(data.shards, data.cache, data.retry_seconds)
        found: dict[str, int] = {}
        if data.num_classes < 0:
            found["num_classes"] = len(index.classes)
            if not index.identity:
                raise ConfigError(f"{index.folder} has no manifest, which counts the classes: set data.num_classes")
        if not data.image_size or not data.image_channels:
            images = first_images(index)
            height = images[0][0]
            if not data.image_size and {size[:2] for size in images} != {(height, height)}:
                other = next(size for size in images if size[:2] != (height, height))
                raise ConfigError(
                    f"images of {index.folder} are not squares of one size, one is {other[0]}x{other[1]}: prepare the "
                    "shards with --resize and --crop, or set data.image_size and data.resize"
                )
            colours = max(channels for *_, channels in images)  # one in colour makes it a set in colour
            found |= {"image_size": data.image_size or height, "image_channels": data.image_channels or colours}
        config = _updated(config, data=found)
    size = config.data.image_size
    return _updated(config, encoder=fitted(config.encoder, size), decoder=fitted(config.decoder, size))


def _updated(config: Config, **sections: Mapping[str, object]) -> Config:
    """Checked anew."""
    values = config.model_dump()
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


_LOOKED_AT = 32


def first_images(index: ShardIndex) -> list[tuple[int, int, int]]:
    """Height, width and channels (1 or 3) of the first training images, of those that can be read."""
    split, found = index.split("train"), []
    for row in range(min(len(split), _LOOKED_AT)):
        content = index.storage.read(split.shard_of(row).name, *split.images[row].tolist())
        with suppress(ValueError):
            image = load_with_pillow(content)
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            found.append((image.height, image.width, 1 if grey else 3))
    if not found:
        raise ConfigError(
            f"{index.folder}: none of its first images can be read: see python data_prep/check.py --decode"
        )
    return found


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


def prepare_samples(batch: Batch, number: int, config: Config, device: torch.device, topology: Topology) -> Samples:
    """Views, positions and labels of a rank's share of global batch `number`, on the device, in the run's dtype."""
    images = [to_unit_range(view) for view in batch.pixels.to(device, non_blocking=True)]
    index = batch.index.to(device)
    if config.task == "representation" and config.data.views != "none":
        policy = augment.SimCLRPolicy() if config.data.views == "simclr" else augment.DigitsPolicy()
        views: tuple[torch.Tensor, ...] = augment.make_views(images, batch.index, batch.epoch, config.seed, policy)
    else:
        views = (augment.random_flip(images[0], index, batch.epoch, config.seed) if config.data.flip else images[0],)
    if config.precision == "float64":
        views = tuple(view.double() for view in views)
    position = torch.arange(len(index), device=device) + topology.rank * len(index)
    return Samples(number, index, position, views, batch.labels.to(device))


def no_samples(number: int, config: Config, device: torch.device, topology: Topology) -> Samples:
    """What stands in for a rank's share that cannot be read: its NaN makes all ranks skip the step."""
    count, data = config.data.global_batch // topology.world_size, config.data
    nothing = torch.zeros(count, dtype=torch.int64, device=device)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    view = torch.full(
        (count, data.image_channels, data.image_size, data.image_size), torch.nan, dtype=dtype, device=device
    )
    position = torch.arange(count, device=device) + topology.rank * count
    views = (view, view) if config.task == "representation" else (view,)
    return Samples(number, nothing, position, views, nothing)


def fresh_networks(config: Config, device: torch.device) -> Networks:
    """The networks at the start of a run: the same on every rank, in training mode."""
    torch.manual_seed(config.seed)
    networks = build_networks(config).to(device)
    return (networks.double() if config.precision == "float64" else networks).train()


def make_objective(config: Config, networks: Networks) -> Objective:
    """The configured objective over all ranks."""
    return build_objective(config, networks, gather_anchors, ring_field() if config.anchors == "ring" else None)


def build_state(config: Config, launch: Launch, accelerator: Accelerator, checkpoint: Path | None) -> TrainState:
    """Fresh state, or that of a checkpoint. Raises ConfigError and CheckpointError."""
    networks = fresh_networks(config, accelerator.device)
    if config.micro_batch:
        check_batch_independent(networks)
    if checkpoint is not None:
        load_weights(networks, checkpoint)
    objective = make_objective(config, networks)
    engine = build_engine(
        config, launch, networks, lambda: make_optimizer(networks, config), accelerator, objective.watch
    )
    state = TrainState(config, engine, objective, _averages(engine, config))
    if checkpoint is not None:
        resume_state(state, checkpoint)
    return state


def single_state(config: Config, device: torch.device) -> TrainState:
    """Fresh state of one process, whatever the world around it: no collective, all anchors at hand."""
    networks = fresh_networks(config, device)
    objective = build_objective(config, networks, gather=lambda anchors: anchors)
    engine = TorchEngine("single", networks, lambda: make_optimizer(networks, config), objective.watch, None)
    return TrainState(config, engine, objective, _averages(engine, config))


def _averages(engine: Engine, config: Config) -> EMA:
    return EMA({name: piece.data for name, piece in engine.weights().items()}, config.optimizer.ema_decay)


def checkpoint_to_resume(config: Config, held: ExitStack | None) -> Path | None:
    """The checkpoint that `resume` names, the same on every rank; None for a fresh start. Raises CheckpointError.

    held: as for `shared_checkpoint`.
    """
    if config.resume == "none":
        return None
    named = config.output_dir if config.resume == "auto" else config.resume
    return shared_checkpoint(named, held, needed=config.resume != "auto")


def shared_checkpoint(named: str | Path, held: ExitStack | None, *, needed: bool = True) -> Path | None:
    """A checkpoint, or a run's newest, the same on every rank, while a run may be writing newer ones. Raises
    CheckpointError; not where there is none and it is not `needed`. Collective.

    held: on the main process, keeps it from being removed for as long as it is open; None on the others.
    """
    found = error = None
    if held is not None:
        try:
            found = str(held.enter_context(held_checkpoint(named)))
            RunRecord.checked(Path(found))
        except CheckpointError as problem:
            error = str(problem) if needed or found is not None else None
    found, error = same_everywhere(found), same_everywhere(error)
    if error is not None:
        raise CheckpointError(error)
    return None if found is None else Path(found)


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys of a checkpoint's configuration that the present one has changed, as "key: before → now"."""
    ignored = {
        "output_dir", "max_steps", "resume", "tracking", "log_every", "checkpoint_every", "keep_last", "cpu_threads",
    }  # fmt: skip

    def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    old, new = (flat(config.model_dump(exclude=ignored)) for config in (before, now))
    return [f"{key}: {old.get(key)} → {value}" for key, value in new.items() if old.get(key) != value]


def describe(state: TrainState) -> str:
    """The engine that runs, for people."""
    world = Topology.current().world_size
    return f"engine {state.engine.name} on {world} process(es) of {state.engine.device.type}"
