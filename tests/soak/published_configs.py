"""The published configurations as they stand, at a smaller batch, on this CPU: data sets made true to their published
format go through data_prep/, stream into the full-size networks, and take optimiser steps on 2 ranks.

    python -m tests.soak.published_configs [--only cifar10_joint ...] [--steps 2]

Prints a line a configuration; exit status 1 where one failed. The 256² networks need 8 GB and some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.published import afhq, cifar10, encode, imagenet, picture

ROOT = Path(__file__).parents[2]


def prepare_cifar10(source: Path, output: Path) -> list[str]:
    cifar10(source)
    return ["cifar10", "--archive", str(source / "cifar-10-python.tar.gz"), "--output", str(output)]


def prepare_afhq(source: Path, output: Path) -> list[str]:
    afhq(source)
    return ["afhq_cat", "--archive", str(source / "afhq.zip"), "--output", str(output), "--resize", "256"]


def prepare_folder(script: str) -> Callable[[Path, Path], list[str]]:
    def prepare(source: Path, output: Path) -> list[str]:
        source.mkdir(parents=True)
        for number in range(6):
            (source / f"{number:05d}.jpg").write_bytes(encode(picture(number, 300, 280)))
        return [script, "--folder", str(source), "--output", str(output), "--resize", "256", "--crop"]

    return prepare


def prepare_imagenet(source: Path, output: Path) -> list[str]:
    imagenet(source, per_class=6, val=6, size=(150, 200))
    names = {"train": "img_train.tar", "val": "img_val.tar", "devkit": "devkit_t12.tar.gz"}
    files = [part for key, name in names.items() for part in (f"--{key}", str(source / f"ILSVRC2012_{name}"))]
    return ["imagenet", *files, "--output", str(output)]


PREPARE = {
    "cifar10_generation": prepare_cifar10,
    "cifar10_joint": prepare_cifar10,
    "imagenet_representation": prepare_imagenet,
    "afhq_cat_generation": prepare_afhq,
    "celeba_hq_generation": prepare_folder("celeba_hq"),
    "lsun_bedroom_generation": prepare_folder("lsun_bedroom"),
}


LARGE = ("afhq_cat_generation", "celeba_hq_generation", "lsun_bedroom_generation")


def train(name: str, shards: Path, run: Path, steps: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file",
        "launch/ddp.yaml", "--num_processes=2", "lzn_dist/train.py", f"configs/{name}.yaml", f"data.shards={shards}",
        f"output_dir={run}", f"max_steps={steps}", "log_every=1",
        f"data.global_batch={2 if name in LARGE else 6}",  # of two images, the second step may have nothing to learn
        "data.streams=2",
        "data.workers=1", "evaluation.batch=2", "flow.sampler=euler", "flow.sampler_steps=1",
        "evaluation.samples_per_class=1", "evaluation.alignment_steps=5", "activation_checkpointing=selective",
        "tracking.wandb=disabled",
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PREPARE), default=list(PREPARE))
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    failed = 0
    print(f"{'configuration':<26} {'parameters':>12} {'seconds':>8}  losses of {options.steps} steps on 2 ranks")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            folder, began = Path(temporary) / name, time.monotonic()
            script, *arguments = PREPARE[name](folder / "published", folder / "shards")
            subprocess.run([sys.executable, f"data_prep/{script}.py", *arguments], cwd=ROOT, check=True,
                           capture_output=True)  # fmt: skip
            done = train(name, folder / "shards", folder / "run", options.steps)
            seen = re.search(r"([\d,]+) parameters, engine ddp on 2 process", done.stdout)
            path = folder / "run" / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            good = (
                done.returncode == 0 and seen is not None and len(rows) == options.steps
                and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and not row["skipped"] for row in rows)
            )  # fmt: skip
            failed += not good
            said = ", ".join(f"{row['loss']:.4f}" for row in rows) if good else "FAIL: " + done.stdout[-1500:]
            count = seen.group(1) if seen else "?"
            print(f"{name:<26} {count:>12} {time.monotonic() - began:>8.0f}  {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
