"""A run of images, labels and text, trained for two steps in this process: what is done with trained models is tried on
it."""

from __future__ import annotations

from pathlib import Path

from lzn_dist.train import main
from tests.helpers.launching import SMALL


def train_three(folder: Path, digits: Path, *overrides: str) -> Path:
    """The run's folder."""
    text = [f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")]
    given = [
        *SMALL, *text, f"data.shards={digits}", f"output_dir={folder}", "max_steps=2", "log_every=1",
        "checkpoint_every=1", "evaluation.batch=40", "evaluation.samples_per_class=1", "evaluation.centre_samples=100",
        "cpu_threads=1",
    ]  # fmt: skip
    assert main(["digits_three", *given, *overrides]) == 0
    return folder
