"""What the launcher asked for, read off its environment; refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

from lzn_dist.config import Config, ConfigError, load_config
from lzn_dist.engines import start
from lzn_dist.engines.flags import obey
from lzn_dist.engines.launch import Launch, _filled, build_accelerator
from lzn_dist.engines.start import check_world
from lzn_dist.machine import has_float64

ROOT = Path(__file__).parents[2]
NAMES = ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"]
WORLD = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE"]
JOINT = ROOT / "configs" / "digits_joint.yaml"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*NAMES, *WORLD, "ACCELERATE_MIXED_PRECISION"]:
        monkeypatch.delenv(name, raising=False)


def world(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    values = {"WORLD_SIZE": str(size), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_engine_is_the_one_that_the_launch_configuration_names(
    engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the JSON is found from anywhere
    launch = yaml.safe_load((ROOT / "launch" / f"{engine}.yaml").read_text())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", launch["deepspeed_config"]["deepspeed_config_file"])
    world(monkeypatch, 2)
    asked = Launch.asked()
    assert (asked.engine, asked.world_size) == (engine, 2)


def test_one_process_ddp_and_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launch.asked() == Launch("single", 1)
    world(monkeypatch, 4)
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
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "overlap_comm": True}}))
    with pytest.raises(ConfigError, match="overlap_comm with ZeRO stage 1"):
        Launch.asked()


def test_reductions_overlap_on_gpus_alone() -> None:
    config = load_config(ROOT / "configs" / "digits_joint.yaml")
    for name, overlaps in (("zero1", False), ("zero2", True), ("zero3", True), ("zero3_offload", True)):
        given = json.loads((ROOT / "launch" / f"{name}.json").read_text())
        for on_cpu in (False, True):
            found = _filled(given, config, 2, on_cpu)["zero_optimization"]
            assert found["overlap_comm"] is (overlaps and not on_cpu)
            assert found["contiguous_gradients"] is not on_cpu
            assert found["stage"] == given["zero_optimization"]["stage"] and found["reduce_bucket_size"] == 10**7


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


# ── flags ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = {  # what `accelerate launch` sets unasked
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_USE_CPU": "False",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "flags", "precision", "compiled"),
    [
        ((), {}, "float32", False),
        (("precision=bf16",), {}, "bf16", False),
        ((), {"MIXED_PRECISION": "bf16"}, "bf16", False),
        (("precision=bf16",), {"MIXED_PRECISION": "bf16"}, "bf16", False),
        ((), {"DYNAMO_BACKEND": "INDUCTOR"}, "float32", True),
        ((), {"GRADIENT_CLIPPING": "1.0"}, "float32", False),
    ],
)
def test_flags_that_mean_a_key_are_obeyed(
    overrides: tuple[str, ...], flags: dict[str, str], precision: str, compiled: bool
) -> None:
    environment = PLAIN | {f"ACCELERATE_{name}": value for name, value in flags.items()}
    config = obey(load_config(JOINT, overrides), {"gradient_accumulation_steps": 1, "optimizer": "auto"}, environment)
    assert (config.precision, config.compile) == (precision, compiled)


@pytest.mark.parametrize(
    ("overrides", "flags", "says"),
    [
        (("precision=float32",), {"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision=bf16.*precision=float32"),
        (("compile=false",), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compile=true.*compile=false"),
        ((), {"ACCELERATE_MIXED_PRECISION": "fp16"}, "precision=bf16"),
        ((), {"ACCELERATE_MIXED_PRECISION": "fp8"}, "precision=bf16"),
        ((), {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "compile=true"),
        ((), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, "compile=true"),
        ((), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "micro_batch=N"),
        ((), {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "optimizer.clip_norm=0.5"),
        ((), {"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm"),
        ((), {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ((), {"FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload"),
        ((), {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing=selective"),
        ((), {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "zero2"),
        (
            (),
            {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero_stage,offload_param_device"},
            "^zero_stage, off",
        ),
    ],
)
def test_flags_that_mean_nothing_here_are_refused(overrides: tuple[str, ...], flags: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        obey(load_config(JOINT, overrides), None, PLAIN | flags)
    assert "\n" not in str(refused.value)


def test_the_cpu_is_refused_where_a_gpu_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    obey(load_config(JOINT), None, PLAIN | {"ACCELERATE_USE_CPU": "True"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        obey(load_config(JOINT), None, PLAIN | {"ACCELERATE_USE_CPU": "True"})


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("optimizer", {"type": "AdamW"}, "optimizer"), ("scheduler", {"type": "WarmupLR"}, "optimizer.warmup_steps"),
        ("fp16", {"enabled": True}, "precision=bf16"), ("bf16", {"enabled": True}, "precision=bf16"),
        ("train_batch_size", 64, "data.global_batch"), ("gradient_accumulation_steps", 4, "micro_batch"),
        ("gradient_clipping", 0.5, "optimizer.clip_norm"),
    ],
)  # fmt: skip
def test_keys_of_deepspeed_that_the_run_decides_are_refused(key: str, value: object, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} of the DeepSpeed configuration is the key {ours}"):
        obey(load_config(JOINT), {key: value}, PLAIN)
    off = {"enabled": False} if isinstance(value, dict) else "auto"
    assert obey(load_config(JOINT), {key: off}, PLAIN) == load_config(JOINT)


def test_every_launch_configuration_of_ours_is_accepted() -> None:
    for path in (ROOT / "launch").glob("zero*.json"):
        obey(load_config(JOINT), json.loads(path.read_text()), PLAIN)


def test_what_is_obeyed_in_a_file_of_accelerates_does_not_stop_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written by `accelerate config`; accelerate's plugin refuses the fields, whatever they say."""
    said = "deepspeed_config_file,zero3_init_flag,gradient_accumulation_steps,gradient_clipping,mixed_precision"
    for name, value in (PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_CONFIG_DS_FIELDS": said}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_GRADIENT_CLIPPING")
    deepspeed = json.loads((ROOT / "launch" / "zero2.json").read_text())
    with pytest.raises(ValueError, match="will be ignored"):
        DeepSpeedPlugin(hf_ds_config=deepspeed)
    assert obey(load_config(JOINT), deepspeed).precision == "bf16"
    DeepSpeedPlugin(hf_ds_config=deepspeed)


def test_a_flag_that_leaves_no_trace_is_read_off_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {
        "accelerate launch --gradient_accumulation_steps 4 train.py x": True,
        "python -m accelerate.commands.launch --gradient-accumulation-steps=4 train.py": True,
        "accelerate launch --gradient_accumulation_steps 1 train.py": False,
        "accelerate launch train.py --gradient_accumulation_steps 4": False,
        "bash --gradient_accumulation_steps 4": False,
    }
    for command, refused in commands.items():
        monkeypatch.setattr("pathlib.Path.read_text", lambda _, command=command, **__: command.replace(" ", "\0"))
        config = Config(output_dir="x", max_steps=1)
        if refused:
            with pytest.raises(ConfigError, match="micro_batch=N"):
                obey(config, None, {})
        else:
            obey(config, None, {})


# ── what other launches leave behind ────────────────────────────────────────────────────────────────────────────────

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_a_whole_world_and_none() -> None:
    assert check_world(WHOLE) == 4 and check_world({}) == 1
    assert check_world({"MASTER_ADDR": "gone", "MASTER_PORT": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}) == 1
    assert check_world(WHOLE | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == 1


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_half_a_world_is_refused(name: str) -> None:
    half = {key: value for key, value in WHOLE.items() if key != name}
    with pytest.raises(ConfigError, match=f"but {name} is not") as refused:
        check_world(half)
    for left in {"RANK", "WORLD_SIZE", "LOCAL_RANK"} - {name}:
        assert f"-u {left}" in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [{"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": "70000"},
     {"MASTER_PORT": "none"}, {"MASTER_ADDR": "no-host-of-this-name.invalid"}],
)  # fmt: skip
def test_a_world_that_does_not_fit_together_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="left by another launch"):
        check_world(WHOLE | changes)


def test_an_mpi_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"OMPI_COMM_WORLD_SIZE=4 .*mpirun"):
        check_world({"OMPI_COMM_WORLD_SIZE": "4"})
    assert check_world(WHOLE | {"OMPI_COMM_WORLD_SIZE": "4"}) == 4


@pytest.mark.slow
def test_a_wait_for_others_says_for_whom(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(start, "SILENCE", 0.7)
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in (WHOLE | {"MASTER_PORT": str(server.port)}).items():
        monkeypatch.setenv(name, value)
    with start.meeting():
        time.sleep(3.0)
    said = capfd.readouterr().err.splitlines()
    assert "rank 1 of 4 waits for rank 0" in said[0]  # before it has arrived
    assert said[-1].startswith("3 s: ") or said[-1].startswith("2 s: ")
    assert f"at localhost:{server.port} (MASTER_ADDR and MASTER_PORT) for rank 0, 2, 3" in said[-1]
    count = len(said)
    time.sleep(1.0)
    assert len(capfd.readouterr().err) == 0 and count >= 3


def test_a_gpu_without_float64_is_left_idle_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Apple's are; here there is none, and torch refuses to make anything on it."""
    before = torch.get_num_threads()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    try:
        overrides = ["tracking.wandb=disabled"]
        found = build_accelerator(load_config(ROOT / "configs" / "digits_joint.yaml", overrides), Launch("single", 1))
        assert torch.get_num_threads() == 3 and found.device.type == "cpu"
    finally:
        torch.set_num_threads(before)
        AcceleratorState._reset_state(reset_partial_state=True)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "this machine's GPU (mps) computes no float64, which the zones need: going on on the CPU"
    assert has_float64(torch.device("cpu")) and not has_float64(torch.device("mps"))
