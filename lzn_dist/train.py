"""Train: accelerate launch lzn_dist/train.py CONFIG [key=value ...]

Every task, on one process or many, goes through this loop. CONFIG is a YAML file of configs/; key=value overrides
any of its keys (max_steps=100 optimizer.encoder_lr=1e-4). Results, metrics and checkpoints go to output_dir; running
the same command again resumes from the newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from lzn_dist.checkpoint import CheckpointError, find_checkpoint, resume, save_checkpoint
from lzn_dist.config import Config, ConfigError, load_config, save_config
from lzn_dist.data import Batch, BatchStream, ShardIndex, augment, ensure_digits
from lzn_dist.distributed import Topology, gather_anchors
from lzn_dist.distributed.engine import build_accelerator, same_everywhere
from lzn_dist.evaluation import evaluate_model
from lzn_dist.model import LZN
from lzn_dist.models.ema import EMA
from lzn_dist.networks import build_networks
from lzn_dist.objectives import Objective, Samples
from lzn_dist.step import LossModule, TrainState, parameter_groups, train_step
from lzn_dist.tracking import Tracker


def open_stream(config: Config, accelerator: Accelerator) -> BatchStream:
    """This rank's stream of training batches; an embedded data set is written first where it is missing."""
    folder = Path(config.data.shards)
    if config.data.embedded == "digits":
        with accelerator.main_process_first():
            ensure_digits(folder)
    topology = Topology.current()
    return BatchStream(
        ShardIndex.load(folder), "train", config.data.global_batch, config.seed, topology.rank, topology.world_size,
        channels=config.data.image_channels, image_size=config.data.image_size,
        cache_decoded=config.data.cache_decoded, workers=config.data.workers,
    )  # fmt: skip


def prepare_samples(batch: Batch, step: int, config: Config, device: torch.device) -> Samples:
    """Views, positions and labels of this rank's share, on the device and in the run's dtype."""
    images, index = batch.images.to(device), batch.index.to(device)
    if config.task == "representation":
        views: tuple[torch.Tensor, ...] = augment.two_views(
            images, index, batch.epoch, config.seed, augment.DigitsPolicy()
        )
    else:
        views = (augment.random_flip(images, index, batch.epoch, config.seed) if config.data.flip else images,)
    if config.precision == "float64":
        views = tuple(view.double() for view in views)
    position = torch.arange(len(index), device=device) + Topology.current().rank * len(index)
    return Samples(step, index, position, views, batch.labels.to(device))


def build_state(config: Config, accelerator: Accelerator) -> TrainState:
    """Fresh or resumed state, the model wrapped by the engine."""
    torch.manual_seed(config.seed)
    networks = build_networks(config).to(accelerator.device)
    if config.precision == "float64":
        networks.double()
    if config.compile:
        for module in networks.children():
            module.compile()
    objective = Objective(config, gather_anchors)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(
        parameter_groups(networks, config), betas=config.optimizer.betas, eps=config.optimizer.eps
    )
    state = TrainState(
        config, networks, objective, LossModule(networks, objective), optimizer,
        EMA(networks, config.optimizer.ema_decay),
    )  # fmt: skip
    checkpoint = same_everywhere(_checkpoint_to_resume(config) if accelerator.is_main_process else None)
    if checkpoint:
        resume(state, Path(checkpoint))
        accelerator.print(f"resumed from {checkpoint} at step {state.step}")
    state.model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    return state


def _checkpoint_to_resume(config: Config) -> str | None:
    if config.resume == "none":
        return None
    if config.resume == "auto":
        try:
            return str(find_checkpoint(config.output_dir))
        except CheckpointError:
            return None
    return str(find_checkpoint(config.resume))


def evaluate(state: TrainState, accelerator: Accelerator, tracker: Tracker) -> None:
    """Measure the EMA weights in seconds, on the main process; the others wait. evaluate.py does it in full."""
    if accelerator.is_main_process:
        state.networks.eval()
        with state.ema.applied(state.networks), torch.no_grad():
            model = LZN(state.networks, state.config)
            values = evaluate_model(model, Path(state.config.output_dir), figures=False, quick=True)
        state.networks.train()
        tracker.evaluation(state.step, values)
    accelerator.wait_for_everyone()


def train(config: Config, accelerator: Accelerator) -> None:
    """The loop."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open_stream(config, accelerator)
        state = build_state(config, accelerator)
    except (ValueError, OSError) as error:
        # nothing has been computed yet: what stands in the way is named in one line, without a traceback
        raise ConfigError(str(error)) from error
    if accelerator.is_main_process:
        save_config(config, folder / "config.yaml")
    parameters = sum(p.numel() for p in state.networks.parameters())
    accelerator.print(
        f"{config.task}: {parameters:,} parameters, {accelerator.distributed_type.value} on "
        f"{accelerator.num_processes} process(es) of {accelerator.device.type}, step {state.step} to {config.max_steps}"
    )
    tracker = Tracker(config, accelerator, state.step)
    tracker.status("running", state.step)
    try:
        _loop(state, accelerator, stream, tracker)
    except BaseException as error:
        tracker.status("failed", state.step, f"{type(error).__name__}: {error}")
        raise
    tracker.status("finished", state.step)
    tracker.close()


def _loop(state: TrainState, accelerator: Accelerator, stream: BatchStream, tracker: Tracker) -> None:
    config = state.config
    state.model.train()
    batches = stream.iterate(state.step, config.max_steps)
    watch = state.objective.watch
    while state.step < config.max_steps:
        with watch("data"):
            samples = prepare_samples(next(batches), state.step, config, accelerator.device)
        scalars = train_step(state, accelerator, samples)
        tracker.bar.update()
        last = state.step == config.max_steps
        if last or state.step % config.log_every == 0:
            rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
            tracker.log(state.step, scalars, rates, watch.seconds)
            watch.seconds.clear()
        if last or state.step % config.checkpoint_every == 0:
            if accelerator.is_main_process:
                save_checkpoint(state, Path(config.output_dir) / "checkpoints")
            accelerator.wait_for_everyone()
            tracker.status("running", state.step)
        if last or (config.evaluate_every and state.step % config.evaluate_every == 0):
            evaluate(state, accelerator, tracker)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for what the user can mend, said in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, for example configs/digits_joint.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its keys")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        accelerator = build_accelerator(config)
        train(config, accelerator)
        accelerator.end_training()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
