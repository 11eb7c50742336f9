"""Runs that are killed, told to end, or meet numbers that are not finite; as a user starts them, on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.launching import ROOT, untimed_rows
from tests.helpers.launching import ranks as start_ranks
from tests.soak.kills import (
    SETTINGS,
    Outcome,
    command,
    compare,
    complete,
    differences,
    log_of,
    ranks,
    start,
    tensors,
)

FEWER = 30  # steps
FAULTY = Path(__file__).parent / "distributed" / "faulty_train.py"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def plain(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The run as `start` starts it, without the launcher."""
    words = command(folder, "ddp", 2)
    script = "lzn_dist/train.py"
    rest = words[words.index(script) + 1 :]
    return start_ranks("ddp", ROOT / script, *rest, *overrides, cwd=ROOT, timeout=200)


@pytest.mark.soak
@pytest.mark.process
def test_killed_and_told_to_end_a_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """All ranks killed, then SIGTERM to a single one: in the end bit for bit what the undisturbed run is."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    fewer = f"max_steps={FEWER}"
    assert plain(reference, fewer).returncode == 0
    process = start(run, "ddp", 2, fewer)
    wait_for(lambda: len(untimed_rows(run)) >= 8, process)
    for pid in ranks(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=100) != 0
    newest = complete(run)[-1]
    assert len(untimed_rows(run)) < FEWER // 2

    process = start(run, "ddp", 2, fewer)
    wait_for(lambda: len(untimed_rows(run)) >= 16, process)
    assert f"{newest} at step {int(newest.removeprefix('step_'))}\n" in log_of(run).read_text()
    os.kill(ranks(process.pid)[-1], signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    # what the launcher says of the first rank that failed; 75 is train.py's, not that of a process killed by SIGTERM
    assert "exitcode  : 75 " in log_of(run).read_text().rpartition("resumed from")[2]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted" and 16 <= status["step"] < FEWER
    assert complete(run)[-1] == f"step_{status['step']:08d}"  # of that very step
    assert untimed_rows(run)[-1]["step"] == status["step"]

    assert start(run, "ddp", 2, fewer).wait(timeout=200) == 0
    assert f"at step {status['step']}\n" in log_of(run).read_text()
    assert plain(run, fewer).returncode == 0  # once more, with nothing left to do
    outcome = Outcome("killed")
    compare(run, reference, outcome, steps=FEWER)
    assert outcome.problems == []


@pytest.mark.process
@pytest.mark.parametrize(
    "engine,micro_batch",
    [pytest.param("ddp", 0, marks=pytest.mark.soak), ("zero2", 7), pytest.param("zero3", 0, marks=pytest.mark.soak),
     pytest.param("fsdp", 7, marks=pytest.mark.soak)],
)  # fmt: skip
def test_what_is_not_finite_is_skipped_and_a_group_that_stops_stays(
    engine: str, micro_batch: int, digits: Path, tmp_path: Path
) -> None:
    """A NaN in one rank's loss is skipped on all; the decoder stops after 3 steps; neither is forgotten on resuming."""
    run, again = tmp_path / "run", tmp_path / "again"
    arguments = [ROOT / "configs" / "digits_joint.yaml", f"data.shards={digits}", *SETTINGS]
    arguments += ["modalities.image.decoder.stop=3", f"micro_batch={micro_batch}", "checkpoint_every=1", "keep_last=9"]
    done = start_ranks(engine, FAULTY, 2, 2, *arguments, "max_steps=5", f"output_dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("skipped global batch 2") == 1
    found = untimed_rows(run)
    assert [(row["step"], row["skipped"], row["images"] // 24) for row in found] == [
        (1, 0, 1), (2, 0, 2), (3, 1, 4), (4, 1, 5), (5, 1, 6)
    ]  # fmt: skip
    assert all(torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all() for row in found)

    assert [row["lr_image.decoder"] for row in found][1:] == [0.003, 0.003, 0.0, 0.0]
    names = complete(run)
    before, stopped, late = (tensors(run, names[step - 1]) for step in (2, 3, 5))
    for name, value in stopped.items():
        kind, _, parameter = name.partition(".")
        # what trains has moments; a bias may be 0 for good
        if kind in ("weights", "ema") and f"exp_avg.{parameter}" in stopped and value.any():
            assert torch.equal(value, late[name]) == parameter.startswith("image.decoder."), name
            assert not torch.equal(value, before[name]), name
    if engine not in ("ddp", "zero2"):
        return

    # Go on from step 3, past the skipped batch: had ranks not agreed, a common start would part from the run above.
    # Then every batch from the seventh on is NaN, and the run ends by itself.
    shutil.copytree(run, again)
    for name in names[3:]:
        shutil.rmtree(again / "checkpoints" / name)
    arguments += ["max_nonfinite=2", "max_steps=9"]
    done = start_ranks(engine, FAULTY, 7, 99, *arguments, f"output_dir={again}", cwd=tmp_path)
    assert done.returncode != 0 and f"{names[2]} at step 3\n" in done.stdout
    assert [line for line in done.stdout.splitlines() if "error: 2 steps in a row had gradients" in line]
    assert "Traceback" not in done.stdout.partition("error: 2 steps")[0]
    status = json.loads((again / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 6)
    assert untimed_rows(again)[:5] == found and len(untimed_rows(again)) == 6
    assert complete(again) == [*names, "step_00000006"]
    assert differences(again, run, names[3]) == differences(again, run, names[4]) == []
    for rank in (0, 1):
        saved = torch.load(again / "nonfinite" / f"batch_8_rank_{rank}.pt")
        assert saved["batch"] == 8 and saved["inputs"]["image"][0].shape == (12, 1, 8, 8)
