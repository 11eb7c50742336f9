"""What needs no SLURM: the batch script, one machine's own executor, and the decisions after a job has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lzn_dist.cluster import submission
from lzn_dist.cluster.epilogue import decide
from lzn_dist.cluster.job import Job, attempts, failures_at_once, note, wall_seconds
from lzn_dist.cluster.preflight import pairs, problems, slow_nodes, tight
from lzn_dist.cluster.profile import Profile, ProfileError, load_profile
from lzn_dist.cluster.submission import SubmissionError, parse_minutes
from lzn_dist.cluster.task import Place, has_trained, launch_environment
from lzn_dist.cluster.watch import MARKER, last_error
from lzn_dist.config import load_config
from tests.helpers.launching import python
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
SMALL = [
    "evaluation.samples_per_class=2", "evaluation.alignment_steps=5", "flow.sampler_steps=2",
    "data.global_batch=24", *encoder_with(channels=8), "latent.dim=8", "latent.steps=6",
    "alignment.steps=6", *decoder_with(channels=8, attention_resolutions=[]), "log_every=1",
    "tracking.wandb=disabled", "max_steps=4",
]  # fmt: skip


def submit(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "slurm" / "submit.py", ROOT / "configs" / "digits_joint.yaml"]
    return python(*command, *arguments, cwd=folder, environment={**os.environ, **environment})


@pytest.mark.process
def test_dry_run_prints_the_script_and_needs_no_slurm(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    settings = [
        "partition: gpu", "account: me", "cpus_per_rank: 12", "memory_gb: 480", "signal_seconds: 180",
        "setup: [module load cuda]", "environment: {NCCL_SOCKET_IFNAME: ib0}", "container: image.sqsh",
        "scratch: /local", "sbatch: {exclusive: true}",
    ]  # fmt: skip
    profile.write_text("\n".join(settings) + "\n")
    done = submit(
        tmp_path, "output_dir=runs/big", "--nodes", "4", "--gpus-per-node", "8", "--engine", "zero2", "--time",
        "1-12:00:00", "--profile", str(profile), "--verify", "--dry-run", "data.global_batch=64", PATH="/usr/bin:/bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    for line in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2160", "--partition=gpu", "--account=me",
        "--cpus-per-task=12", "--mem=480G", "--signal=USR2@180", "--requeue", "--exclusive", "--job-name=big",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines, line
    text = done.stdout
    assert text.index("module load cuda") < text.index("export NCCL_SOCKET_IFNAME=ib0") < text.index("srun ")
    assert "--cpus-per-task=12" in text[text.index("srun ") :]
    assert "--kill-on-bad-exit=1" in text and "--container-image=image.sqsh" in text
    assert f"lzn_dist.cluster.epilogue {tmp_path}/runs/big" in text
    assert "each of the 32 ranks runs: verify then train with engine zero2" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text,minutes", [("90", 90), ("90m", 90), ("24h", 1440), ("2d", 2880), ("1-12:00:00", 2160), ("2:30", 150)]
)
def test_times(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes
    for wrong in ("", "0", "h", "-3", "1.5h"):
        with pytest.raises(SubmissionError, match="write 90m"):
            parse_minutes(wrong)


def test_profiles(tmp_path: Path) -> None:
    assert load_profile(None) == Profile() and load_profile("example").partition == "gpu"
    (tmp_path / "a.yaml").write_text("partitions: x\n")
    with pytest.raises(ProfileError, match=r"partitions: Extra inputs .* Known keys: account, "):
        load_profile(str(tmp_path / "a.yaml"))
    for text in (
        'partition: "x\\necho hi"', 'srun: ["a\\n"]', "environment: {'A=1; B': c}", 'sbatch: {"a b": c}',
        'sbatch: {a: "b\\nc"}', "a: &a [*a]",
    ):  # fmt: skip
        (tmp_path / "a.yaml").write_text(text + "\n")
        with pytest.raises(ProfileError, match=r"a\.yaml"):
            load_profile(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("{")
    with pytest.raises(ProfileError, match="not readable YAML"):
        load_profile(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("visible,expected", [(None, "3"), ("", "3"), ("0,1,2,3", "3"), ("0", "0"), ("3", "0")])
def test_a_gpu_that_is_bound_to_a_task_is_its_first(
    visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    place = Place(7, 8, 3, 4, 1, "12", ("a", "b"), 0)
    found = place.environment(0)
    assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("7", expected, "4")


@pytest.mark.process
def test_launch_environments_are_those_of_accelerate(tmp_path: Path) -> None:
    """What `accelerate launch` sets for the same file, as far as training reads it."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "FSDP_VERSION")
    for engine in ("ddp", "zero2", "zero3_offload", "fsdp"):
        path = ROOT / "launch" / f"{engine}.yaml"
        script = "import os, json; print(json.dumps(dict(os.environ)))"
        done = python(
            "-m", "accelerate.commands.launch", "--config_file", path, "--num_processes", 1, "--main_process_port", 0,
            "--no_python", sys.executable, "-c", script, cwd=tmp_path,
        )  # fmt: skip
        theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        ours = launch_environment(ROOT / "launch", engine)
        for name in names:
            assert ours.get(name, "false").lower() == theirs.get(name, "false").lower(), (engine, name)


def test_only_a_job_that_left_a_checkpoint_goes_on_from_it(tmp_path: Path) -> None:
    """Another rank that has noted its start, or another job's checkpoint, must not make a rank skip the checks."""
    (tmp_path / "job").mkdir()
    note(tmp_path, "start", job="7")
    assert not has_trained(str(tmp_path), "7")
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 0, "job": "7"}))
    assert not has_trained(str(tmp_path), "7")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001")
    assert has_trained(str(tmp_path), "7") and not has_trained(str(tmp_path), "8")


def make_job(run: Path, **changes: Any) -> Job:
    (run / "job" / "now" / "logs").mkdir(parents=True)
    values: dict[str, Any] = {
        "run": str(run), "folder": str(run / "job" / "now"), "engine": "ddp", "nodes": 2, "ranks_per_node": 1,
        "gpus_per_node": 0, "phases": ("train",), "requeue": True, "cluster": "slurm", "submitted": 0.0, "id": "7",
    }  # fmt: skip
    job = Job(**{**values, **changes})
    job.save()
    assert Job.load(run) == job
    return job


def one(run: Path, status: int, before: int, after: int) -> None:
    """A start of the job and its end, at these steps."""
    for event, step in (("start", before), ("end", after)):
        (run / "status.json").write_text(json.dumps({"state": "running", "step": step}))
        note(run, event, job="7", status=status)


def test_what_becomes_of_a_job_that_ended(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert decide(tmp_path, job, 0)[0] is False
    assert decide(tmp_path, job, 75)[0] is True
    assert decide(tmp_path, make_job(tmp_path / "other", requeue=False), 75)[0] is False
    assert decide(tmp_path, job, 2)[0] is False  # a wrong configuration does not mend itself
    for _ in range(2):
        one(tmp_path, 1, 0, 0)
        assert decide(tmp_path, job, 1)[0] is True
    one(tmp_path, 137, 0, 0)
    assert decide(tmp_path, job, 137) == (False, "it failed 3 times in a row without a step: exit status 137")


@pytest.mark.parametrize("history,count", [
    ([(1, 0, 0), (1, 0, 5), (1, 5, 5)], 1),  # a step in between
    ([(1, 5, 5), (75, 5, 9), (1, 9, 9), (1, 9, 9)], 2),  # a good end in between
    ([(1, 0, 0)] * 3, 3), ([(1, 0, 4)], 0), ([], 0),
])  # fmt: skip
def test_failures_at_once(tmp_path: Path, history: list[tuple[int, int, int]], count: int) -> None:
    make_job(tmp_path)
    for status, before, after in history:
        one(tmp_path, status, before, after)
    assert failures_at_once(tmp_path) == count


def test_wall_time_and_half_a_line(tmp_path: Path) -> None:
    make_job(tmp_path)
    lines = [
        ("start", 10.0),
        ("end", 15.0),
        ("start", 20.0),
        ("start", 50.0),
        ("end", 51.0),
    ]  # the second lost its node
    text = "".join(json.dumps({"event": event, "time": at, "step": 0, "job": "7"}) + "\n" for event, at in lines)
    (tmp_path / "job" / "attempts.jsonl").write_text(text + '{"event": "sta')
    assert wall_seconds(tmp_path) == 5.0 + 30.0 + 1.0 and len(attempts(tmp_path)) == 5


def test_the_last_error_is_the_lowest_ranks_of_the_newest_start(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (job.logs / "7_0_log.err").write_text(f"{MARKER}\nValueError: old\n{MARKER}\nall is well\n")
    (job.logs / "7_1_log.err").write_text(f"{MARKER}\nTraceback\n[rank1]: KeyError: 'x'\nmore\n")
    (job.logs / "7_2_log.err").write_text(f"{MARKER}\nRuntimeError: peer gone\n")
    (job.logs / "6_0_log.err").write_text("ValueError: of another job\n")
    assert last_error(job) == "rank 1: KeyError: 'x'"
    (job.logs / "7_0_log.err").write_text(f"{MARKER}\nerror: no shards\n")
    assert last_error(job) == "rank 0: error: no shards"


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_every_pair_of_nodes_meets_once(nodes: int) -> None:
    rounds = pairs(nodes)
    met = [tuple(sorted(pair)) for one in rounds for pair in one]
    assert sorted(met) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    assert all(len({node for pair in one for node in pair}) == 2 * len(one) for one in rounds)


def test_the_slow_node_is_named_and_not_its_partners() -> None:
    speeds = [(a, b, 1.0 if 2 in (a, b) else 10.0) for a in range(4) for b in range(a + 1, 4)]
    assert slow_nodes(speeds, 4) == {2: 1.0}
    assert slow_nodes([(a, b, 9.0 + a) for a, b, _ in speeds], 4) == {}
    nodes = [{"host": f"n{i}", "gpus": "8 x H100", "versions": "1", "free_disk_gb": 100.0} for i in range(3)]
    assert problems(nodes) == []
    nodes[1] |= {"gpus": "7 x H100", "free_disk_gb": 0.2}
    found = problems(nodes)
    assert "n1 has 7 x H100" in found[0] and found[1].startswith("n1 has 0.2 GB")


def test_what_loader_processes_may_lack_is_told() -> None:
    """8 ranks on a node, each 2 batches ahead in 8 processes of 128 images at 256²: 3.2 GB."""
    config = load_config(
        ROOT / "configs" / "imagenet_representation.yaml", ["data.global_batch=2048", "data.resize=256"]
    )
    nodes = [{"host": f"n{i}", "cpus": 12, "free_shm_gb": 3.3} for i in range(2)]
    assert tight(nodes, config, 8) == []
    nodes[0]["cpus"], nodes[1]["free_shm_gb"] = 8, 3.1
    cpus, room = tight(nodes, config, 8)
    assert cpus.startswith("n0: a rank has 8 CPUs for 8 loader processes") and "cpus_per_rank" in cpus
    assert room.startswith("n1: /dev/shm has 3.1 GB left") and "3.2 GB" in room


def test_packages_of_ones_own_go_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or a folder beside the user; what is installed is there on the nodes."""
    (tmp_path / "one_file.py").write_text("")
    (tmp_path / "a_folder" / "inside").mkdir(parents=True)
    for name in ("__init__.py", "inside/more.py"):
        (tmp_path / "a_folder" / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "code"
    code.mkdir()
    for package in ("one_file", "a_folder", "numpy", "not_there"):
        submission._copy_package(package, code)
    assert sorted(str(path.relative_to(code)) for path in code.rglob("*.py")) == [
        "a_folder/__init__.py", "a_folder/inside/more.py", "one_file.py",
    ]  # fmt: skip
