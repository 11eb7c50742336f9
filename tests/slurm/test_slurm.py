"""Jobs on a real SLURM: a run over two nodes ends, and comes back from signals, cancelling and a lost node, exactly."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import pytest
import submit

from lzn_dist.training.checkpoint import find_checkpoint
from tests.helpers.slurm_cluster import Cluster
from tests.helpers.slurm_run import ROOT, STEPS, Run

pytestmark = pytest.mark.process


def test_a_run_on_two_nodes_is_checked_trains_and_evaluates(reference: Run) -> None:
    status = reference.status()
    assert (status["state"], status["step"], status["world_size"], status["nodes"]) == ("finished", STEPS, 2, 2)
    assert status["requeues"] == 0, reference.story()
    assert status["job"] == reference.job and status["wall_seconds"] > 0
    assert reference.evaluations()[-1]["step"] == STEPS
    folder = next((reference.folder / "job").glob("*/code")).parent
    found = json.loads((folder / "preflight.json").read_text())
    assert [node["host"] for node in found["nodes"]] == ["node1", "node2"] and found["problems"] == []
    assert found["all_reduce_gb_s"] > 0 and found["pairs_gb_s"][0][:2] == ["node1", "node2"]
    assert "everything agrees" in reference.logs()  # verify.py, on this very job
    origin = json.loads((folder / "provenance.json").read_text())
    assert origin["packages"]["torch"] and origin["command"][-1] == "--verify"
    assert (folder / "code" / "lzn_dist" / "train.py").read_bytes() == (ROOT / "lzn_dist" / "train.py").read_bytes()
    said = reference.told()
    assert "finished" in said and f"{STEPS} of {STEPS}" in said and reference.job in said


def test_cancelled_signalled_and_after_a_lost_node_it_is_the_undisturbed_run(
    reference: Run, cluster: Cluster, tmp_path: Path
) -> None:
    """One run meets them one after the other."""
    run = Run(cluster, tmp_path / "run").submit()
    run.until_step(5)
    cluster.call("scancel", run.job)
    assert run.until_ended() == "CANCELLED"
    step = run.status()["step"]
    assert run.status()["state"] == "preempted" and 5 <= step < 30
    assert find_checkpoint(run.folder).name == f"step_{step:08d}"
    first_job = run.job

    run.submit()  # again into the same folder
    run.until_step(step + 3)
    cluster.call("scancel", "--signal=USR2", run.job)  # what SLURM sends before a time limit
    run.until(lambda: "end" in [line["event"] for line in run.attempts() if line["job"] == run.job])
    end = run.attempts()[-1]
    assert end["status"] == 75 and step + 3 <= end["step"] < STEPS

    run.until_step(max(end["step"] + 3, 22))  # by itself
    assert f"at step {step}\n" in run.logs() and f"at step {end['step']}\n" in run.logs()  # nothing was taken twice
    assert run.status()["requeues"] == 1, run.story()
    nodes = cluster.call("squeue", "--noheader", "--jobs", run.job, "--format", "%N")
    lost = 2 if "2" in nodes or "-" in nodes else 1
    cluster.kill_node(lost)
    assert run.until_ended() == "COMPLETED"
    cluster.start_node(lost)
    starts = [line for line in run.attempts() if line["event"] == "start"]
    assert [line["job"] for line in starts[:2]] == [first_job, run.job] and len(starts) >= 4
    assert [line["restart"] for line in starts[:2]] == [0, 0] and starts[-1]["restart"] >= 2
    last = run.attempts()[-1]
    assert (last["event"], last["status"], last["step"]) == ("end", 0, STEPS)
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert run.rows() == reference.rows()
    assert run.evaluations() == reference.evaluations()
    cluster.wait_idle(3)


def test_a_job_that_fails_at_once_comes_back_twice_and_says_why_it_ends(cluster: Cluster, tmp_path: Path) -> None:
    profile = tmp_path / "held.yaml"
    profile.write_text("sbatch: {hold: true}\n")
    run = Run(cluster, tmp_path / "run").submit("--profile", str(profile), nodes=1)
    code = next((run.folder / "job").glob("*/code/lzn_dist/train.py"))
    code.write_text("raise RuntimeError('no such luck')\n")  # the job runs its own copy
    cluster.call("scontrol", "release", run.job)
    assert run.until_ended() == "FAILED"
    assert [line["status"] for line in run.attempts() if line["event"] == "end"] == [1, 1, 1]
    status = run.status()
    assert status["state"] == "failed"
    assert status["why"] == "it failed 3 times in a row without a step: rank 0: RuntimeError: no such luck"
    said = run.told()
    assert "failed" in said and "last error: rank 0: RuntimeError: no such luck" in said


@pytest.mark.parametrize("arguments,message", [
    (["--profile", "{wrong}"], "SLURM refuses the job: .*[Pp]artition.*partitions here: high, main"),
    (["--nodes", "64"], "SLURM refuses the job: "),
    (["output_dir=/proc/run"], "output_dir /proc/run cannot be written"),
    (["output_dir=run%j"], "reads % and .* in the names of logs as patterns"),
    (["output_dir=run\nscancel"], "output_dir '.*run.nscancel' has characters that a batch script cannot"),
    (["data.shards=nowhere", "data.embedded=none"], "no shards"),
    (["latent.stepz=3"], "unknown key 'latent.stepz'"),
    (["data.global_batch=25"], "global batch of 25 cannot be split evenly over 2 ranks"),
    (["--engine", "zero9"], "no engine 'zero9'"),
    (["--time", "soon"], "time 'soon': write"),
    (["--profile", "none_such"], "no profile .*known: example"),
])  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_queued(
    arguments: list[str], message: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.chdir(tmp_path)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("partition: moon\n")
    before = cluster.call("squeue", "--noheader", "--states", "all", "--format", "%i")
    config = str(ROOT / "configs" / "digits_joint.yaml")
    given = [config, "output_dir=run", "--nodes", "2", *(part.format(wrong=wrong) for part in arguments)]
    assert submit.main(given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert cluster.call("squeue", "--noheader", "--states", "all", "--format", "%i") == before
    assert not (tmp_path / "run" / "job").exists()


def current_umask() -> int:
    os.umask(found := os.umask(0o077))
    return found


def test_a_run_that_is_in_the_queue_is_not_submitted_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "held.yaml"
    key = secrets.token_hex(8)
    profile.write_text(f"{{sbatch: {{hold: true}}, setup: [export A_KEY={key}], environment: {{B_KEY: {key}}}}}\n")
    run = Run(cluster, tmp_path / "run").submit("--profile", str(profile))
    holding = [path for path in run.folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert holding and all(path.stat().st_mode & 0o077 == 0 for path in holding)
    assert (next(run.folder.glob("job/*/logs")).stat().st_mode & 0o077) == 0o077 & ~current_umask()
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.chdir(tmp_path)
    assert submit.main([str(ROOT / "configs" / "digits_joint.yaml"), f"output_dir={run.folder}"]) == 2
    assert f"has job {run.job} in the queue (pending): scancel {run.job} first" in capsys.readouterr().err
    cluster.call("scancel", run.job)
