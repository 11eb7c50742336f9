"""What the launcher asked for, read off its environment; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from lzn_dist.config import ConfigError, load_config
from lzn_dist.distributed.launch import Launch, build_accelerator

ROOT = Path(__file__).parents[2]
NAMES = ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*NAMES, "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_engine_is_the_one_that_the_launch_configuration_names(
    engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the JSON is found from anywhere
    launch = yaml.safe_load((ROOT / "launch" / f"{engine}.yaml").read_text())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", launch["deepspeed_config"]["deepspeed_config_file"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = Launch.asked()
    assert (asked.engine, asked.world_size) == (engine, 2)


def test_one_process_ddp_and_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launch.asked() == Launch("single", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Launch.asked() == Launch("ddp", 4)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert Launch.asked() == Launch("fsdp", 4)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        Launch.asked()


def test_deepspeed_configurations_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="no DeepSpeed configuration"):
        Launch.asked()
    path = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(ConfigError, match="stage 1, 2 or 3"):
        Launch.asked()
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(ConfigError, match="offload_optimizer is for ZeRO stage 3"):
        Launch.asked()


def test_the_cores_are_shared_among_the_processes_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as launchers do
    found = []
    try:
        for local, asked in (("1", 0), ("4", 0), ("24", 0), ("1", 5), ("2", 5), ("4", 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
            overrides = [f"cpu_threads={asked}", "tracking.wandb=disabled"]
            build_accelerator(load_config(ROOT / "configs" / "digits_joint.yaml", overrides), Launch("single", 1))
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found == [12, 3, 1, 5, 2, 1]
