"""A published checkpoint as a run: python -m lzn_dist.tools.import_published FILE --case CASE --out RUN_DIR

The run has the case study's configuration (configs/), the trained and the averaged weights, and no optimiser moments:
evaluate it, load it, or train on from it (Adam's moments begin anew, the learning rate goes on where it was).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from lzn_dist.config import ConfigError, load_config, save_config
from lzn_dist.paths import path_argument
from lzn_dist.terminal import command
from lzn_dist.tools.published_checkpoint import CASES, ReferenceNetworks, load_reference_checkpoint
from lzn_dist.training.checkpoint import CheckpointWriter
from lzn_dist.training.run_folder import RunFolder
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import Counters

NAMES = {
    "case_study_1_cifar10": "cifar10_generation",
    "case_study_1_afhqcat": "afhq_cat_generation",
    "case_study_1_celebahq": "celeba_hq_generation",
    "case_study_1_lsunbedroom": "lsun_bedroom_generation",
    "case_study_2": "imagenet_representation",
    "case_study_3": "cifar10_joint",
}


def _state(networks: ReferenceNetworks) -> dict[str, torch.Tensor]:
    """Under the names that a run's networks have."""
    names = {"encoder": "image.encoder", "decoder": "image.decoder", "label_anchor": "label.encoder"}
    return {
        f"{names[part]}.{name}": value
        for part, network in networks.parts().items()
        for name, value in network.state_dict().items()
    }


def write_run(path: Path, case: str, folder: Path, overrides: list[str]) -> None:
    """Write the run. Raises ValueError for a file of another case, ConfigError, FileExistsError for a used folder."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder")
    config = load_config(NAMES[case], [*overrides, f"output_dir={folder}"])
    trained, averaged = (load_reference_checkpoint(path, case, ema=ema) for ema in (False, True))
    state = single_state(config, torch.device("cpu"))
    state.engine.networks.load_state_dict(_state(trained))
    averages = _state(averaged)
    for name, shadow in state.ema.shadow.items():
        shadow.copy_(averages[name].flatten())
    state.counters = Counters(step=trained.step, batch=trained.step, without_moments=trained.step)
    state.ema.num_updates = trained.step
    run = RunFolder(folder).take()
    save_config(config, folder / "config.yaml")
    writer = CheckpointWriter(folder / "checkpoints", config, run.incarnation, nullcontext)
    writer.save(state)
    writer.close()
    run.status("preempted", trained.step, f"from {path.name}, as published for {case}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=path_argument, metavar="FILE", help="the authors' file")
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--out", type=path_argument, required=True, metavar="RUN_DIR", help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the case's configuration")
    given = parser.parse_intermixed_args()
    try:
        write_run(given.file, given.case, given.out, given.overrides)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: evaluate it with python -m lzn_dist.evaluate {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
