"""Losses of 20 steps of every task, baseline and published configuration (at reduced size), in one process and on two
ranks under every engine: written down before the code is changed, and compared to the last digit afterwards.

python -m tests.soak.losses FILE [--compare] [--only PART]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tests.helpers.settings import BOTH_DIRECTIONS, both_with, decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
STEPS = 20
SAID = ["log_every=1", f"max_steps={STEPS}", "tracking.wandb=disabled", "cpu_threads=1"]
SMALL = [
    "data.global_batch=24", "latent.dim=8", "latent.steps=6", "alignment.steps=6", "optimizer.warmup_steps=2",
    "evaluation.samples_per_class=1", "evaluation.alignment_steps=3", "evaluation.noise_scales=[0.5]",
    "flow.sampler=euler", "flow.sampler_steps=1",
]  # fmt: skip
DIGITS = {
    "joint": ("digits_joint", [*decoder_with(attention_resolutions=[4])]),
    "generation": ("digits_generation", [*decoder_with(attention_resolutions=[4])]),
    "conditional": ("digits_generation", ["decode=[{class_conditional: true}]"]),
    "representation": ("digits_representation", [BOTH_DIRECTIONS, "latent.noise_scale=0.45"]),
    "rectified_flow": ("digits_generation", ["objective=rectified_flow"]),
    "simclr": ("digits_representation", ["objective=simclr"]),
    "moco": ("digits_representation", ["objective=moco", "contrast.queue=48"]),
    "supervised": ("digits_representation", ["objective=supervised"]),
}
CIFAR = ["data.workers=0", "data.streams=2", *both_with(channel_multipliers=[1, 2], residual_blocks=1)]
AT_256 = ["data.workers=0", "data.streams=2", "data.image_size=32", "data.resize=32",
          *both_with(channel_multipliers=[1, 1, 2], residual_blocks=1),
          *encoder_with(feature_resolutions=[16, 8])]  # fmt: skip
PUBLISHED = {
    "cifar10_generation": ("cifar10_generation", CIFAR),
    "cifar10_joint": ("cifar10_joint", CIFAR),
    "afhq_cat_generation": ("afhq_cat_generation", AT_256),
    "celeba_hq_generation": ("celeba_hq_generation", AT_256),
    "lsun_bedroom_generation": ("lsun_bedroom_generation", AT_256),
    "imagenet_representation": ("imagenet_representation", [
        "data.workers=0", "data.streams=2", "data.shuffle_window=0", "data.image_size=32", "data.resize=36",
        "data.num_classes=4", *encoder_with(blocks=[1, 1, 1, 1])]),
}  # fmt: skip
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
# what runs under every engine, also with gradient caching, recomputation and a ring
SHARED = {
    "joint": DIGITS["joint"],
    "joint, cached": ("digits_joint", ["micro_batch=6", "activation_checkpointing=selective", "flow_store_every=3"]),
    "representation": DIGITS["representation"],
    "representation, ring": ("digits_representation", ["anchors=ring", "precision=bf16"]),
    "moco": DIGITS["moco"],
}


def cases() -> dict[str, tuple[str, str, list[str]]]:
    """By name: the engine ("" for one process without a launcher), the configuration, overrides."""
    found = {f"one process: {name}": ("", *case) for name, case in (DIGITS | PUBLISHED).items()}
    found |= {f"{engine}: {name}": (engine, *case) for engine in ENGINES for name, case in SHARED.items()}
    return found


def colours(folder: Path) -> None:
    """64 images of 40 x 40 pixels in 4 classes, and as shards of 32 x 32 and 40 x 40."""
    random = np.random.default_rng(0)
    for number in range(64):
        path = folder / "images" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    for size in (32, 40):
        command = [sys.executable, "data_prep/image_folder.py", "--folder", str(folder / "images"), "--resize",
                   str(size), "--crop", "--output", str(folder / f"images{size}")]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def losses(work: Path, number: int, engine: str, config: str, overrides: list[str]) -> list[dict[str, float]] | str:
    """Loss and gradient norm of each step; what the run said where it failed."""
    run = work / f"run{number}"
    shards = "digits" if config.startswith("digits") else "images32" if config.startswith("cifar") else "images40"
    command = [sys.executable, "-m"]
    if engine:
        command += ["accelerate.commands.launch", "--main_process_port", "0", "--config_file",
                    f"launch/{engine}.yaml", "--num_processes=2", "lzn_dist/train.py"]  # fmt: skip
    else:
        command += ["lzn_dist.train"]
    classes = ["data.num_classes=4"] if config == "cifar10_joint" else []
    networks = encoder_with(channels=8) if "representation" in config else both_with(channels=8, dropout=0.1)
    command += [
        f"configs/{config}.yaml",
        *SAID,
        *SMALL,
        *networks,
        *classes,
        f"data.shards={work / shards}",
        f"output_dir={run}",
    ]
    done = subprocess.run(
        [*command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = run / "metrics.jsonl"
    if not path.is_file() or len(lines := path.read_text().splitlines()) != STEPS:
        return done.stdout[-1500:]
    return [{key: json.loads(line)[key] for key in ("loss", "grad_norm")} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON, written or compared to")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name has this in it")
    options = parser.parse_args()
    before = json.loads(options.file.read_text()) if options.compare else {}
    found, differ = dict(before), 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        colours(work)
        wanted = {name: case for name, case in cases().items() if options.only in name}
        for number, (name, case) in enumerate(tqdm(wanted.items(), unit="case")):
            now = losses(work, number, *case)
            if isinstance(now, str):
                tqdm.write(f"{name}: FAILED: {now}")
                differ += 1
                continue
            if options.compare and now != before.get(name):
                differ += 1
                old = before.get(name, now)
                step = next((k for k, (a, b) in enumerate(zip(old, now, strict=True)) if a != b), -1)
                tqdm.write(f"{name}: differs from step {step + 1} on: {old[step]} before, {now[step]} now")
            found[name] = now
    if not options.compare:
        options.file.write_text(json.dumps(found, indent=0) + "\n")
    print(f"{len(wanted)} cases, {differ} failed or differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
