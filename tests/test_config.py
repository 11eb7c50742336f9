"""Configurations are read strictly: every mistake is one clear line before anything starts."""

from __future__ import annotations

import operator
import pwd
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lzn_dist.config import ConfigError, load_config, override, save_config
from lzn_dist.paths import path_argument
from lzn_dist.training.checkpoint import CheckpointError, find_checkpoint
from lzn_dist.yaml_core import dump_yaml, parse_yaml

ROOT = Path(__file__).parents[1]
JOINT = ROOT / "configs" / "digits_joint.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("digits_[!b]*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_loads_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_base_and_overrides_are_merged_in_order() -> None:
    config = load_config(
        JOINT,
        [
            "modalities.image.encoder.lr=1e-4",
            "modalities.image.encoder.arguments.channel_multipliers=[1,2,2]",
            "seed=7",
        ],
    )
    assert config.network("image", "encoder").lr == 1e-4
    assert config.network("image", "encoder").arguments["channel_multipliers"] == (1, 2, 2)
    assert config.seed == 7
    assert config.data.embedded == "digits"  # from the base
    assert config.network("image", "decoder").lr == 3e-3  # from the file


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("latent.dmi=3", "unknown key 'latent.dmi'; known here: dim"),
        ("max_steps=many", "max_steps: .*integer"),
        ("max_steps=1.5", "max_steps: .*integer"),
        ("max_steps=true", "max_steps: .*integer"),
        ("max_steps=5.0", "max_steps: .*integer"),
        ("compile=1", "compile: .*boolean"),
        ("latent.noise_scale=.inf", "latent.noise_scale: .*finite"),
        (
            "modalities.image.encoder.arguments.channel_multipliers=[1",
            "override 'modalities.image.encoder.arguments.channel_multipliers=.1' is not readable YAML",
        ),
        ("compile=yes", "compile: .*true or false"),
        ("seed=1_000", "seed: .*integer"),
        ("seed=1:30", "seed: .*integer"),
        ("output_dir=~nobody-of-this-name/x", "output_dir: .*nobody's home"),
        ("output_dir=$SCRATCH/x", "output_dir: .*HOME alone"),
        ("data=3", "data: a section of keys"),
        ("seed.x=3", "seed: .*integer"),
        ("evaluation.fid_samples=9", "evaluation.fid_samples: "),
        ("latent.solver=heun", "latent.solver: .*euler"),
        ("objective=detection", "objective: .*rectified_flow"),
        ("modalities.image.encoder.kind=resnet", "unknown key .*kind'; known here: arguments, lr, stop, target"),
        ("alignment.cutoff=1.5", "alignment.cutoff: "),
        ("data.image_size=32", "8x8"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_config(JOINT, [override])
    assert "\n" not in str(error.value)


def test_missing_files_and_keys_and_circles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration: no file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "a.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="is a list: a configuration has"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "c.yaml").write_text("data: [1]\n")
    (tmp_path / "d.yaml").write_text("base: c.yaml\ndata: {global_batch: 3}\n")
    with pytest.raises(ConfigError, match=r"d\.yaml: data: a section of keys"):
        load_config(tmp_path / "d.yaml")
    (tmp_path / "b.yaml").write_text("seed: 1\nmax_steps: 3\n")
    with pytest.raises(ConfigError, match="'output_dir' is missing"):
        load_config(tmp_path / "b.yaml")


# ── values as they are given, and written ───────────────────────────────────────────────────────────────────────────

GIVEN = [
    "runs/try #2",
    " blanks ",
    "1e3",
    "010",
    "0o10",
    "yes",
    "null",
    "{a",
    "[x",
    "a: b",
    "@x",
    "a${HOME2}",
    "'",
    "-",
]


@pytest.mark.parametrize("text", GIVEN)
def test_a_key_of_text_takes_the_text_as_it_stands(text: str, tmp_path: Path) -> None:
    config = load_config(JOINT, [f"output_dir={text}", f"tracking.project={text}"])
    assert (config.output_dir, config.tracking.project) == (text, text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("seed=010", "seed", 10), ("seed=0o10", "seed", 8), ("seed=0x10", "seed", 16), ("seed=+3", "seed", 3),
        ("optimizer.eps=1e-4", "optimizer.eps", 1e-4), ("watchdog=1E2", "watchdog", 100.0),
        ("compile=True", "compile", True), ("precision=bf16", "precision", "bf16"), (" seed =3", "seed", 3),
        ("data={workers: 3}", "data.workers", 3),
        ("evaluation.noise_scales=[0, .5]", "evaluation.noise_scales", (0, 0.5)),
    ],
)  # fmt: skip
def test_all_other_values_are_yaml_1_2_on_the_command_line_and_in_files(
    given: str, key: str, value: Any, tmp_path: Path
) -> None:
    name, _, text = given.partition("=")
    for section in reversed(name.strip().split(".")):
        text = f"{{{section}: {text}}}"
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    for config in (load_config(JOINT, [given]), override(load_config(JOINT), [given])):
        assert operator.attrgetter(key)(config) == value
    written = parse_yaml((tmp_path / "config.yaml").read_text())
    for part in key.split("."):
        written = written[part]
    assert (tuple(written) if isinstance(written, list) else written) == value


@given(st.text(max_size=20) | st.text(alphabet="0123456789_.eExob+-:~#'\"{}[]yesno \t\n\x85\u2028\udcff", max_size=8))
def test_any_text_survives_being_written(text: str) -> None:
    """Read by this package, and by a reader of YAML 1.1."""
    written = dump_yaml({"key": text, text: [text, 3, 1e-5, True, None]})
    expected = {"key": text} | {text: [text, 3, 1e-5, True, None]}
    assert parse_yaml(written) == expected == yaml.safe_load(written)
    written.encode()


def test_files_of_other_encodings_and_mistakes_in_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = "seed: 1\noutput_dir: café # a remark\nmax_steps: 3\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert load_config(path).output_dir == "café"
    for content, says in (
        (text.encode("cp1252"), "not readable YAML"), (b"a: 1\na: 2\n", "'a' stands there twice"),
        (b"seed:\t1\n\tmax_steps: 3\n", "not readable YAML"), (b"[" * 5000, "not readable YAML"),
        (b"3\n", "is a single value"), (b"a: !!python/object/apply:os.getpid []\n", "not readable YAML"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says) as error:
            load_config(path)
        assert "\n" not in str(error.value)


def test_homes_are_written_out_in_all_keys_that_are_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, meant in (
        ("~", "/home/me"), ("~/runs", "/home/me/runs"), ("$HOME/runs", "/home/me/runs"), ("${HOME}", "/home/me"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"), ("./~x", "./~x"), ("a/~/b", "a/~/b"), ("a$HOME", "a$HOME"),
    ):  # fmt: skip
        keys = ["output_dir", "resume", "data.shards", "data.cache", "evaluation.cache", "evaluation.inception"]
        config = load_config(JOINT, [f"{key}={text}" for key in keys])
        assert {operator.attrgetter(key)(config) for key in keys} == {meant}
        assert path_argument(text) == Path(meant)
    url = "http://host/~me/$HOME"
    assert load_config(JOINT, ["data.embedded=none", f"data.shards={url}"]).data.shards == url
    (tmp_path / "me").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "base.yaml").write_text("seed: 1\nmax_steps: 3\n")
    (tmp_path / "config.yaml").write_text("base: ~/base.yaml\noutput_dir: $HOME/runs\n")
    assert load_config(tmp_path / "config.yaml").output_dir == f"{tmp_path}/me/runs"
    assert load_config("~/base.yaml", ["output_dir=x"]).max_steps == 3
    with pytest.raises(CheckpointError, match=f"no complete checkpoint in {tmp_path}/me/runs"):
        find_checkpoint("~/runs")


def test_every_path_on_a_command_line_is_read_so() -> None:
    """argparse's `type=Path` would make a folder called ~ of --output=~/x, which no shell expands."""
    for folder in ("lzn_dist", "slurm", "data_prep", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "type=Path" not in file.read_text(), file
