"""train.py as a user starts it: one and two processes, resuming, and refusals, on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lzn_dist
from lzn_dist import train
from lzn_dist.config import load_config
from lzn_dist.evaluation import evaluate_model
from lzn_dist.exit_status import REFUSED, UNREADABLE
from lzn_dist.objectives import build_networks
from lzn_dist.training.checkpoint import find_checkpoint, load_weights
from lzn_dist.training.tracking import wandb_mode
from tests.helpers.launching import python, ranks
from tests.helpers.small_run import ROOT, SMALL_RUN, rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    networks = build_networks(load_config(folder / "config.yaml")).double()
    load_weights(networks, find_checkpoint(folder))
    return networks.state_dict()


@pytest.mark.process
@pytest.mark.parametrize(
    "precision,steps,tolerance",
    [("float64", 20, 1e-9), pytest.param("float32", 12, 1e-4, marks=pytest.mark.soak)],
)
def test_four_ranks_are_one_run(precision: str, steps: int, tolerance: float, digits: Path, tmp_path: Path) -> None:
    """The same samples, noise, times and dropout masks: losses differ by rounding, over many steps."""
    config = "digits_joint" if precision == "float64" else "digits_representation"
    settings = [f"max_steps={steps}", f"precision={precision}", "checkpoint_every=1000"]
    if precision == "float64":
        # The configuration's own warm-up: at full rate from the start, training itself (one process, its weights
        # changed in the last digit) multiplies a difference by 1e5 in 50 steps.
        settings.append("optimizer.warmup_steps=50")
    arguments = [str(ROOT / "configs" / f"{config}.yaml"), f"data.shards={digits}", *SMALL_RUN, *settings]
    assert train.main([*arguments, f"output_dir={tmp_path / '1'}"]) == 0
    script = ROOT / "lzn_dist" / "train.py"
    done = ranks("ddp", script, *arguments, f"output_dir={tmp_path / '4'}", processes=4, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(rows(tmp_path / "4")) == steps
    for one, several in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        assert one["step"] == several["step"]
        assert several["loss"] == pytest.approx(one["loss"], rel=tolerance)
    if precision == "float64":
        first, second = weights(tmp_path / "1"), weights(tmp_path / "4")
        assert first.keys() == second.keys()
        for name, value in first.items():
            # Adam divides by the gradient's size, which amplifies rounding where a gradient is nearly zero
            assert torch.allclose(value, second[name], rtol=1e-4, atol=1e-6), name
    status = json.loads((tmp_path / "4" / "status.json").read_text())
    assert (status["state"], status["step"], status["engine"], status["world_size"]) == ("finished", steps, "ddp", 4)
    assert rows(tmp_path / "1", "eval.jsonl")[-1]["step"] == steps


@pytest.mark.slow
def test_a_resumed_run_logs_what_the_undisturbed_run_logs(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, steps: int) -> None:
        arguments = [str(ROOT / "configs" / "digits_generation.yaml"), f"output_dir={tmp_path / name}", *SMALL_RUN]
        arguments += [f"data.shards={digits}", "data.embedded=none", f"max_steps={steps}"]
        assert train.main(arguments) == 0

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
    again = weights(tmp_path / "parts")
    assert all(torch.equal(value, again[name]) for name, value in weights(tmp_path / "whole").items())


@pytest.mark.process
def test_what_a_run_tells(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, progress, wandb, and evaluations of the averaged weights, the last one also after a kill before it."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    arguments = [str(ROOT / "configs" / "digits_joint.yaml"), f"output_dir={run}", f"data.shards={digits}"]
    arguments += [*SMALL_RUN, "precision=float32", "max_steps=3", "evaluate_every=2", "optimizer.warmup_steps=0"]
    assert train.main([*arguments, "tracking.wandb=offline"]) == 0
    bar = capfd.readouterr().err
    assert "3/3" in bar and "loss=" in bar and "images_s=" in bar
    parts = {f"seconds_{part}" for part in ("data", "agree", "encode", "flow", "decode", "backward", "optimise")}
    wanted = {
        "step",
        "images",
        "loss",
        "loss_flow",
        "loss_alignment",
        "lr",
        "lr_image.encoder",
        "lr_image.decoder",
        "lr_label.encoder",
    }
    for row in rows(run):
        assert row.keys() >= wanted | parts | {"images_per_second", "peak_memory_mb"}
        assert row["lr"] == 3e-3 and row["lr_image.encoder"] == 2e-3
        assert row["images_per_second"] > 0 and row["peak_memory_mb"] > 50 and row["seconds_encode"] > 0
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    found = rows(run, "eval.jsonl")
    assert [row["step"] for row in found] == [2, 3] and found[0] != found[1]
    averaged = evaluate_model(lzn_dist.load(run), figures=False, quick=True)
    assert {key: found[-1][key] for key in averaged} == pytest.approx(averaged, rel=1e-5)
    model = lzn_dist.load(run)
    load_weights(model.networks, find_checkpoint(run))
    raw = evaluate_model(model, figures=False, quick=True)
    assert raw["zones.entropy"] != pytest.approx(averaged["zones.entropy"], rel=1e-3)

    (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:-1]))
    assert train.main([*arguments, "tracking.wandb=disabled"]) == 0
    assert rows(run, "eval.jsonl") == found
    assert train.main([*arguments, "tracking.wandb=disabled"]) == 0
    assert rows(run, "eval.jsonl") == found


def test_a_server_that_is_away_at_the_start_may_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(ROOT / "configs" / "digits_joint.yaml"),
        f"output_dir={tmp_path / 'run'}",
        *SMALL_RUN,
        "max_steps=1",
    ]
    arguments += ["data.embedded=none", "data.shards=http://127.0.0.1:9/digits", "data.retry_seconds=0.1"]
    assert train.main(arguments) == UNREADABLE
    assert "127.0.0.1:9/digits" in refused(capfd.readouterr().err)


@pytest.mark.process  # wandb asks git
def test_wandb_is_online_where_it_knows_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine example.org login someone password secret\n")
    assert wandb_mode("auto") == "offline"  # not any login will do
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled" and wandb_mode("offline") == "offline"


def refused(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines, said[-3000:]
    return lines[0]


@pytest.mark.process
def test_what_a_launcher_does_wrong_is_refused_in_one_line(digits: Path, tmp_path: Path) -> None:
    folder, script = tmp_path / "run", ROOT / "lzn_dist" / "train.py"
    arguments = [ROOT / "configs" / "digits_joint.yaml", f"output_dir={folder}", f"data.shards={digits}", *SMALL_RUN]
    alone = ["--main_process_port", 0, "--cpu", "--num_processes=2"]
    done = python("-m", "accelerate.commands.launch", *alone, script, *arguments, cwd=tmp_path)
    assert "asked for several processes but started one" in refused(done.stdout) and done.returncode
    done = ranks("ddp", script, *arguments, "data.global_batch=25", cwd=tmp_path)
    assert "data.global_batch=25 does not divide among 2 processes" in refused(done.stdout) and done.returncode
    assert not folder.exists()


@pytest.mark.parametrize("override,says", [("data.global_batch=5000", "5000"), ("data.shards=nowhere", "nowhere")])
def test_what_cannot_run_is_refused_in_one_line(
    override: str, says: str, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(ROOT / "configs" / "digits_joint.yaml"), f"output_dir={tmp_path / 'run'}", *SMALL_RUN]
    assert train.main([*arguments, "data.embedded=none", f"data.shards={digits}", override]) == REFUSED
    assert says in refused(capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_going_back_leaves_the_old_course(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From an earlier step on with another seed: the newest checkpoint and all lines are the new course's."""
    run = tmp_path / "run"
    arguments = [str(ROOT / "configs" / "digits_generation.yaml"), f"output_dir={run}"]
    arguments += [f"data.shards={digits}", "data.embedded=none", *SMALL_RUN, "precision=float32", "keep_last=9"]
    arguments += ["seed=1"]
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


def test_a_checkpoint_of_another_model_is_refused(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(ROOT / "configs" / "digits_generation.yaml"), f"output_dir={tmp_path / 'run'}", *SMALL_RUN]
    arguments += ["data.embedded=none", f"data.shards={digits}"]
    assert train.main([*arguments, "max_steps=1"]) == 0
    assert train.main([*arguments, "max_steps=2", "latent.dim=12"]) == REFUSED
    assert "is of another model" in refused(capfd.readouterr().err)
