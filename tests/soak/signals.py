"""Both real launchers with every signal, sent to the launcher alone and to its whole group, as a terminal does.

    python -m tests.soak.signals

Prints a row a case; exit status 1 where a run left no checkpoint of its last step, a status that says "running", a
process, or a traceback of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.global_batch=32", *encoder_with(channels=8), *decoder_with(channels=8), "latent.steps=4", "alignment.steps=5",
    "evaluation.alignment_steps=5", "evaluation.samples_per_class=2", "flow.sampler_steps=2", "cpu_threads=1",
    "tracking.wandb=disabled", "max_steps=100000", "checkpoint_every=100000", "log_every=1",
]  # fmt: skip


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in found.read_text().split()] if found.exists() else []
    return below + [far for child in below for far in children(child)]


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def heard() -> None:
    """A shell's background job ignores SIGINT, and so would what it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def case(launch: str, number: signal.Signals, group: bool, folder: Path) -> list[str]:
    run = folder / f"{launch}_{number.name}_{group}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "launch" / f"{launch}.yaml"), str(ROOT / "lzn_dist" / "train.py")]
    command += [str(ROOT / "configs" / "digits_joint.yaml"), *SMALL]
    command += [f"output_dir={run}", f"data.shards={folder / 'digits'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    with (folder / f"{run.name}.log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=heard
        )
        end = time.monotonic() + 150
        while steps(run) < 5 and time.monotonic() < end:
            time.sleep(0.1)
        ranks = children(process.pid)
        (os.killpg if group else os.kill)(process.pid, number)
        began = time.monotonic()
        returned = process.wait(timeout=90)
        while any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks) and time.monotonic() < began + 60:
            time.sleep(0.05)
        seconds = time.monotonic() - began
        left = [rank for rank in ranks if Path(f"/proc/{rank}/cmdline").exists()]
        log.seek(0)
        said = log.read().decode(errors="replace")
    status = json.loads((run / "status.json").read_text())
    latest = run / "checkpoints" / "latest"
    saved = latest.read_text() if latest.exists() else ""
    # a traceback of ours has a file of the project in it; a launcher's own does not
    ours = any("lzn_dist/" in part.split("Error")[0] for part in said.split("Traceback")[1:])
    good = not left and not ours and status["state"] == "preempted" and saved == f"step_{status['step']:08d}"
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    target = "group" if group else "launcher"
    return [launch, number.name, target, str(returned), status["state"], saved, f"{seconds:.1f} s",
            "ours" if ours else str(said.count("Traceback")), "pass" if good else "FAIL"]  # fmt: skip


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        print("launch signal to status state checkpoint ended tracebacks (the launcher's)", flush=True)
        for launch in ("cpu", "ddp"):
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                for group in (False, True):
                    row = case(launch, number, group, Path(folder))
                    failed += row[-1] == "FAIL"
                    print("  ".join(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
