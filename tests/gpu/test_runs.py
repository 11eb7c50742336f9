"""Runs on one GPU as a user starts them, under every engine, with nccl: verified, trained, resumed, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lzn_dist
from tests.helpers.launching import ROOT, SMALL, accelerate

ENGINES = ["cpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp"]  # launch/cpu.yaml: one process, GPU or not


def start(engine: str, script: str, task: str, folder: Path, *arguments: str) -> str:
    done = accelerate(
        engine, ROOT / "lzn_dist" / f"{script}.py", ROOT / "configs" / f"digits_{task}.yaml", *SMALL, *arguments,
        processes=1, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def losses(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("engine", ENGINES)
def test_verify(engine: str, tmp_path: Path) -> None:
    """tf32 is asked for: verification must not compute with it."""
    more = ["micro_batch=7", "activation_checkpointing=selective", "tf32=true", f"data.shards={tmp_path / 'digits'}"]
    assert "verify: everything agrees" in start(engine, "verify", "joint", tmp_path, *more)


@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_is_exact(engine: str, tmp_path: Path) -> None:
    """With deterministic algorithms: losses, gradients' norms and averaged weights, bit for bit."""
    common = ["deterministic=true", "log_every=1", "checkpoint_every=3", f"data.shards={tmp_path / 'digits'}"]
    start(engine, "train", "joint", tmp_path, *common, "max_steps=6", f"output_dir={tmp_path / 'whole'}")
    start(engine, "train", "joint", tmp_path, *common, "max_steps=3", f"output_dir={tmp_path / 'run'}")
    said = start(engine, "train", "joint", tmp_path, *common, "max_steps=6", f"output_dir={tmp_path / 'run'}")
    assert "at step 3" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    mine, theirs = (lzn_dist.load(tmp_path / name).networks.state_dict() for name in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("task", ["joint", "representation", "generation", "text"])
def test_bf16_is_near_float32(task: str, tmp_path: Path) -> None:
    """The networks alone are in bf16, so that losses of the first steps stay within its three digits."""
    found = {}
    for precision in ("float32", "bf16"):
        run = tmp_path / precision
        start(
            "cpu", "train", task, tmp_path, f"precision={precision}", "log_every=1", "max_steps=3",
            f"output_dir={run}", f"data.shards={tmp_path / 'digits'}",
        )  # fmt: skip
        found[precision] = torch.tensor([row[1] for row in losses(run)])
        assert json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert torch.allclose(found["bf16"], found["float32"], rtol=0.05, atol=0.02), found


def test_compiled_blocks_give_the_same(tmp_path: Path) -> None:
    found = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        start(
            "cpu", "train", "joint", tmp_path, f"compile={compiled}", "log_every=1", "max_steps=3",
            f"output_dir={run}", f"data.shards={tmp_path / 'digits'}",
        )  # fmt: skip
        found.append(torch.tensor([row[1:] for row in losses(run)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_profile_has_the_gpus_memory_and_the_flows_row(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["profile_steps=2", "max_steps=6", f"output_dir={run}", f"data.shards={tmp_path / 'digits'}"]
    said = start("cpu", "train", "joint", tmp_path, *more)
    assert "GPU ms/step" in said and "flow of the zones" in said
    assert all((run / "profile" / name).stat().st_size > 1000 for name in ("trace.json.gz", "memory.pickle"))
