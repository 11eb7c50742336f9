"""train.py as a user starts it: one and two processes, resuming, and refusals, on the digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lzn_dist import train
from lzn_dist.checkpoint import find_checkpoint, load_weights
from lzn_dist.config import load_config
from lzn_dist.networks import build_networks

ROOT = Path(__file__).parents[1]
SMALL = [
    "evaluation.samples_per_class=2", "evaluation.alignment_steps=5", "flow.sampler_steps=2",
    "data.global_batch=24", "encoder.channels=8", "decoder.channels=8", "latent.dim=8", "latent.steps=6",
    "alignment.steps=6", "decoder.attention_resolutions=[]", "encoder.dropout=0.1", "decoder.dropout=0.1",
    "optimizer.warmup_steps=2", "log_every=1", "checkpoint_every=2", "tracking.wandb=disabled", "precision=float64",
]  # fmt: skip


def launch(
    engine: str, config: str, folder: Path, *overrides: str, check: bool = True, processes: int = 0, **environment: str
) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "launch" / f"{engine}.yaml")] if engine else ["--cpu", "--num_processes=2"]
    command += [f"--num_processes={processes}"] if processes else []
    command += [str(ROOT / "lzn_dist" / "train.py"), str(ROOT / "configs" / f"{config}.yaml")]
    command += [f"output_dir={folder}", f"data.shards={folder.parent / 'digits'}", *SMALL, *overrides]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500, cwd=folder.parent
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    networks = build_networks(load_config(folder / "config.yaml")).double()
    load_weights(networks, find_checkpoint(folder))
    return networks.state_dict()


@pytest.mark.parametrize("precision,steps,tolerance", [("float64", 50, 1e-9), ("float32", 20, 1e-4)])
def test_one_two_and_four_ranks_are_one_run(precision: str, steps: int, tolerance: float, tmp_path: Path) -> None:
    """The same samples, noise, times and dropout masks: losses differ by rounding, over many steps."""
    config = "digits_joint" if precision == "float64" else "digits_representation"
    settings = [f"max_steps={steps}", f"precision={precision}", "checkpoint_every=1000"]
    if precision == "float64":
        # The configuration's own warm-up: at full rate from the start, training itself (one process, its weights
        # changed in the last digit) multiplies a difference by 1e5 in 50 steps.
        settings.append("optimizer.warmup_steps=50")
    launch("cpu", config, tmp_path / "1", *settings)
    for world in (2, 4) if precision == "float64" else (4,):
        launch("ddp", config, tmp_path / str(world), *settings, processes=world)
        assert len(rows(tmp_path / str(world))) == steps
        for one, several in zip(rows(tmp_path / "1"), rows(tmp_path / str(world)), strict=True):
            assert one["step"] == several["step"]
            assert several["loss"] == pytest.approx(one["loss"], rel=tolerance)
    if precision == "float64":
        first, second = weights(tmp_path / "1"), weights(tmp_path / "2")
        assert first.keys() == second.keys()
        for name, value in first.items():
            # Adam divides by the gradient's size, which amplifies rounding where a gradient is nearly zero
            assert torch.allclose(value, second[name], rtol=1e-4, atol=1e-6), name
    status = json.loads((tmp_path / "4" / "status.json").read_text())
    assert (status["state"], status["step"], status["engine"], status["world_size"]) == ("finished", steps, "ddp", 4)
    assert rows(tmp_path / "1", "eval.jsonl")[-1]["step"] == steps


def test_a_resumed_run_logs_what_the_undisturbed_run_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(name: str, steps: int) -> None:
        shards = f"data.shards={tmp_path / 'digits'}"
        config = str(ROOT / "configs" / "digits_generation.yaml")
        assert train.main([config, f"output_dir={tmp_path / name}", shards, *SMALL, f"max_steps={steps}"]) == 0

    run("whole", 5)
    run("parts", 3)
    # a line past the checkpoint, as a killed run leaves it, and a half-written checkpoint
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"ste')
    (tmp_path / "parts" / "checkpoints" / ".step_00000004.1.tmp").mkdir()
    run("parts", 5)
    assert "at step 3" in capfd.readouterr().out
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [row["step"] for row in parts] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert all(torch.equal(v, weights(tmp_path / "parts")[k]) for k, v in weights(tmp_path / "whole").items())


def refused(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines, said[-3000:]
    return lines[0]


def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = launch("", "digits_joint", folder, "max_steps=1", check=False)
    assert "asked for several processes but started one" in refused(said)
    said = launch("ddp", "digits_joint", folder, "max_steps=1", "data.global_batch=25", check=False)
    assert "data.global_batch=25 does not divide among 2 processes" in refused(said)
    said = launch("cpu", "digits_joint", folder, "max_steps=1", "data.global_batch=5000", check=False)
    assert "5000" in refused(said)
    said = launch(
        "cpu", "digits_joint", folder, "max_steps=1", "data.embedded=none", "data.shards=nowhere", check=False
    )
    assert "nowhere" in refused(said)
    assert not (folder / "metrics.jsonl").exists()


def test_going_back_leaves_the_old_course(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From an earlier step on with another seed: the newest checkpoint and all lines are the new course's."""
    run = tmp_path / "run"
    arguments = [str(ROOT / "configs" / "digits_generation.yaml"), f"output_dir={run}"]
    arguments += [f"data.shards={tmp_path / 'digits'}", *SMALL, "precision=float32", "keep_last=9", "seed=1"]
    assert train.main([*arguments, "max_steps=6"]) == 0
    early = run / "checkpoints" / "step_00000002"
    assert train.main([*arguments, "max_steps=4", f"resume={early}", "seed=2"]) == 0
    assert "superseded/2" in capfd.readouterr().out
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    new = rows(run)[-1]["loss"]
    assert train.main([*arguments, "max_steps=5", "seed=2"]) == 0
    assert "resumed from" in (said := capfd.readouterr().out) and "at step 4" in said
    assert rows(run)[3]["loss"] == new and len(rows(run)) == 5
    assert train.main([*arguments, "max_steps=1", "resume=none"]) == 0
    assert [row["step"] for row in rows(run)] == [1] and find_checkpoint(run).name == "step_00000001"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    launch("cpu", "digits_generation", tmp_path / "run", "max_steps=1")
    said = launch("cpu", "digits_generation", tmp_path / "run", "max_steps=2", "latent.dim=12", check=False)
    assert "is of another model" in refused(said)
