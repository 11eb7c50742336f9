"""Configurations are read strictly: every mistake is one clear line before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lzn_dist.config import ConfigError, load_config, save_config

ROOT = Path(__file__).parents[1]
JOINT = ROOT / "configs" / "digits_joint.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("digits_[!b]*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_loads_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_base_and_overrides_are_merged_in_order() -> None:
    config = load_config(JOINT, ["optimizer.encoder_lr=1e-4", "encoder.channel_multipliers=[1,2,2]", "seed=7"])
    assert config.optimizer.encoder_lr == 1e-4
    assert config.encoder.channel_multipliers == (1, 2, 2)
    assert config.seed == 7
    assert config.data.embedded == "digits"  # from the base
    assert config.optimizer.decoder_lr == 3e-3  # from the file


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("latent.dmi=3", "unknown key 'latent.dmi'; known here: dim"),
        ("max_steps=many", "max_steps: .*integer"),
        ("max_steps=1.5", "max_steps: .*integer"),
        ("max_steps=true", "max_steps: .*integer"),
        ("max_steps=5.0", "max_steps: .*integer"),
        ("compile=1", "compile: .*boolean"),
        ("tracking.project=3", "tracking.project: .*string"),
        ("latent.noise_scale=.inf", "latent.noise_scale: .*finite"),
        ("output_dir=[x", "override 'output_dir=.x' is not readable YAML"),
        ("tracking.project=@x", "is not readable YAML"),
        ("evaluation.fid_samples=9", "evaluation.fid_samples: "),
        ("latent.solver=heun", "latent.solver: .*euler"),
        ("task=detection", "task: "),
        ("alignment.cutoff=1.5", "alignment.cutoff: "),
        ("data.num_classes=0", "data.num_classes"),
        ("data.image_size=32", "8x8"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_config(JOINT, [override])
    assert "\n" not in str(error.value)


def test_missing_files_and_keys_and_circles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "a.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="is a list: a configuration has"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "c.yaml").write_text("data: [1]\n")
    (tmp_path / "d.yaml").write_text("base: c.yaml\ndata: {global_batch: 3}\n")
    with pytest.raises(ConfigError, match=r"d\.yaml: Cannot merge incompatible container types"):
        load_config(tmp_path / "d.yaml")
    (tmp_path / "b.yaml").write_text("task: joint\nmax_steps: 3\n")
    with pytest.raises(ConfigError, match="'output_dir' is missing"):
        load_config(tmp_path / "b.yaml")
