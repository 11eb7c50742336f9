"""Runs that are killed, told to end, or meet numbers that are not finite; as a user starts them, on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parent / "distributed"), str(Path(__file__).parent / "soak")]
from kills import SETTINGS, Outcome, compare, complete, ranks, rows, start, tensors
from launching import ROOT, accelerate

FAULTY = Path(__file__).parent / "distributed" / "faulty_train.py"


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_killed_or_told_to_end_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """One undisturbed run; one with all ranks killed; one with SIGTERM to a single rank. Bit for bit the same."""
    reference, killed, ended = tmp_path / "reference", tmp_path / "killed", tmp_path / "ended"
    assert start(reference, "ddp", 2).wait(timeout=200) == 0
    process = start(killed, "ddp", 2)
    wait_for(lambda: len(rows(killed)) >= 10, process)
    for pid in ranks(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=100)
    assert len(complete(killed)) >= 1 and len(rows(killed)) < 30
    assert start(killed, "ddp", 2).wait(timeout=200) == 0
    assert start(killed, "ddp", 2).wait(timeout=100) == 0  # once more, with nothing left to do
    outcome = Outcome("killed")
    compare(killed, reference, outcome)
    assert outcome.problems == []

    process = start(ended, "ddp", 2)
    wait_for(lambda: len(rows(ended)) >= 8, process)
    os.kill(ranks(process.pid)[-1], signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    status = json.loads((ended / "status.json").read_text())
    assert status["state"] == "preempted" and status["step"] < 30
    assert complete(ended)[-1] == f"step_{status['step']:08d}"  # of that very step
    assert start(ended, "ddp", 2).wait(timeout=200) == 0
    assert f"at step {status['step']}" in (tmp_path / "ended.log").read_text()
    compare(ended, reference, outcome)
    assert outcome.problems == []


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(engine: str, tmp_path: Path) -> None:
    arguments = [ROOT / "configs" / "digits_joint.yaml", f"data.shards={tmp_path / 'digits'}", *SETTINGS, "max_steps=5"]
    done = accelerate(engine, FAULTY, 2, 2, *arguments, f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("skipped global batch 2") == 1
    found = rows(tmp_path / "run")
    assert [(row["step"], row["skipped"], row["images"] // 24) for row in found] == [
        (1, 0, 1), (2, 0, 2), (3, 1, 4), (4, 1, 5), (5, 1, 6)
    ]  # fmt: skip
    assert all(torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all() for row in found)

    folder = tmp_path / "endless"
    done = accelerate(
        engine, FAULTY, 3, 99, *arguments, f"output_dir={folder}", "max_nonfinite=2", "micro_batch=7", cwd=tmp_path
    )
    assert done.returncode != 0
    assert "error: 2 steps in a row had gradients that are not finite" in done.stdout
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    saved = torch.load(folder / "nonfinite" / "batch_4_rank_1.pt")
    assert saved["batch"] == 4 and saved["views"][0].shape == (12, 1, 8, 8)
    assert complete(folder) == ["step_00000003"]


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_a_group_that_stops_does_not_move_under_sharded_engines(engine: str, tmp_path: Path) -> None:
    arguments = [ROOT / "configs" / "digits_joint.yaml", f"data.shards={tmp_path / 'digits'}", *SETTINGS]
    arguments += ["optimizer.decoder_stop=2", "checkpoint_every=2", "keep_last=3", "max_steps=6"]
    done = accelerate(
        engine, ROOT / "lzn_dist" / "train.py", *arguments, f"output_dir={tmp_path / 'run'}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert [row["lr_decoder"] for row in rows(tmp_path / "run")][1:] == [0.003, 0.0, 0.0, 0.0, 0.0]
    names = complete(tmp_path / "run")
    assert names == ["step_00000002", "step_00000004", "step_00000006"]
    early, late = tensors(tmp_path / "run", names[0]), tensors(tmp_path / "run", names[2])
    for name, value in early.items():
        kind, _, parameter = name.partition(".")
        if kind in ("weights", "ema") and value.any():
            assert torch.equal(value, late[name]) == parameter.startswith("decoder."), name
