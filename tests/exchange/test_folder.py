"""An exported folder gives the same results as the run, needs nothing of it, and says what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from lzn_dist import load
from lzn_dist.config import ConfigError, load_config
from lzn_dist.exchange import ExportError, Loaded, is_export, read_export, write_export
from lzn_dist.export import main
from lzn_dist.inference import LZN
from lzn_dist.objectives import build_networks
from tests.helpers.settings import OWN
from tests.helpers.small_run import small_config

pytestmark = pytest.mark.slow  # a run is trained and exported for them, once a worker

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
TEXTS = ["a thin three", "a bold seven, leaning right"]


def everything(model: LZN) -> dict[str, object]:
    return {
        "embed": model.embed(IMAGES), "anchors": model.anchors(IMAGES), "latents": model.latents(IMAGES, 1.0, 3),
        "classify": model.classify(IMAGES), "probabilities": model.class_probabilities(IMAGES, 5),
        "text": model.embed_text(TEXTS), "text latents": model.latents(texts=TEXTS), "captions": model.caption(IMAGES),
        "by text": model.generate(texts=TEXTS, seed=2), "by class": model.generate(3, 4), "classes": model.classes,
        "zero-shot": model.zero_shot(IMAGES, TEXTS), "between": model.interpolate(IMAGES[0], TEXTS[0], 3),
        "reconstruct": model.reconstruct(IMAGES),
    }  # fmt: skip


def test_run_export_load_and_the_hubs_way_agree(three: Path, exported: Path, tmp_path: Path) -> None:
    expected = everything(load(three, anchors="all"))
    for model in (load(exported), LZN.from_pretrained(exported)):
        found = everything(model)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
            else:
                assert found[name] == value, name
    model = load(exported)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (exported / "config.json").read_text()
    assert torch.equal(load(tmp_path / "again").latents(IMAGES), model.latents(IMAGES))


def test_it_tells_nothing_of_the_machine_and_says_what_it_is(three: Path, exported: Path) -> None:
    text = (exported / "config.json").read_text() + (exported / "README.md").read_text()
    assert str(three.parent) not in text and str(Path.home()) not in text
    card = (exported / "README.md").read_text()
    for said in ("license: mit", "library_name: lzn_dist", "pipeline_tag: text-to-image", "image.decoder", "1,437 of"):
        assert said in card
    mode = (exported / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in exported.iterdir() if path.is_file()} == {mode}


def test_push_to_hub_uploads_the_folder(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent, seen at the place where huggingface_hub would send it."""
    sent: list[str] = []

    class Url:
        repo_id = "me/model"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Url)
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda *_, folder_path, **__: sent.extend(p.name for p in Path(folder_path).iterdir())
    )
    load(exported).push_to_hub("me/model")
    assert {"config.json", "model.safetensors", "anchors.safetensors", "tokenizer.json", "README.md"} <= set(sent)


@pytest.mark.process  # what is imported can be seen in a fresh process alone
def test_it_needs_neither_data_nor_what_training_needs(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "model")
    script = textwrap.dedent("""
        import importlib.machinery as machinery, sys
        GONE = {"accelerate", "deepspeed", "webdataset", "wandb", "submitit", "sklearn", "scipy", "matplotlib",
                "torchdiffeq", "transformers", "xformers", "triton"}
        class Without(machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] in GONE else super().find_spec(name, path, target)
        sys.meta_path[:] = [Without if finder is machinery.PathFinder else finder for finder in sys.meta_path]
        import torch, lzn_dist
        model = lzn_dist.load("model")
        images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
        print(model.classify(images).tolist(), model.caption(images[:1]), model.generate(texts=["a two"]).sum().item())
        print(sorted(GONE & {name.split(".")[0] for name in sys.modules}))
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, imported = done.stdout.splitlines()
    model = load(exported)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert said.startswith(f"{model.classify(images).tolist()} {model.caption(images[:1])}") and imported == "[]"


def test_fewer_anchors_are_the_first_ones(exported: Path) -> None:
    assert len(load(exported).reference["image"]) == 1437
    assert torch.equal(load(exported, anchors=50).reference["text"], load(exported).reference["text"][:50])
    with pytest.raises(ValueError, match="has 1437 anchors of image: give anchors=1437 at most"):
        load(exported, anchors=2000)
    for wrong in (0, -1, "some", 2.5):
        with pytest.raises(ValueError, match="anchors must be a whole number from 1 on, or 'all'"):
            load(exported, anchors=wrong)  # type: ignore[arg-type]


def resign(folder: Path) -> None:
    """Sums that fit the files as they are now."""
    import hashlib

    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def of_another_version(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"format": 9, "lzn_dist": "7.0"}))


def of_another_width(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"channels": 8', '"channels": 16'))
    resign(folder)


def with_other_anchors(folder: Path) -> None:
    save_file({"image": torch.zeros(3, 5)}, folder / "anchors.safetensors")
    resign(folder)


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("label.encoder.anchor")
    save_file(tensors, folder / "model.safetensors")
    resign(folder)


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGE = {
    "another version": (of_another_version, r"format 9 \(written by lzn_dist 7.0\), this version reads 1"),
    "a flipped bit": (flipped, r"model\.safetensors is not what was written"),
    "a missing file": (lambda f: (f / "model.safetensors").unlink(), r"not whole: model\.safetensors is missing"),
    "other networks": (of_another_width, r"is .* in model\.safetensors, .* in config\.json's networks"),
    "other anchors": (with_other_anchors, r"anchors of image have shape \(3, 5\), latent\.dim is 8"),
    "a missing weight": (without_a_weight, r"label\.encoder\.anchor is missing in model\.safetensors"),
    "no configuration": (lambda f: (f / "config.json").write_text('{"library_name": "lzn_dist"}'), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(kind: str, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    damage, says = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ExportError, match=says) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_only_a_folder_of_ours_is_one(tmp_path: Path, exported: Path) -> None:
    assert is_export(exported) and not is_export(exported / "encoder") and not is_export(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    assert not is_export(tmp_path)


def test_networks_of_ones_own_are_loaded_by_who_trusts_them(tmp_path: Path) -> None:
    from lzn_dist import networks

    networks.trust(["tests"])
    config = small_config(*OWN, task="generation")
    write_export(tmp_path, Loaded(build_networks(config), config, 3, {}, None))
    assert read_export(tmp_path).step == 3
    networks._trusted.discard("tests")
    with pytest.raises(ConfigError, match="--trust tests"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "out"], "no run in nowhere"), (["{three}", "taken"], "taken is there already"),
        (["{three}", "out", "--anchors", "many"], "--anchors many: a number, or all"),
        (["{here}", "out"], "no complete checkpoint in"), (["{three}", "out", "--checkpoint", "gone"], "no complete"),
    ],
)  # fmt: skip
def test_export_refuses_in_a_line_and_leaves_nothing(
    arguments: list[str], says: str, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    assert main([text.format(three=three, here=tmp_path) for text in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_without_the_data_anchors_may_be_left_out(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(three, run)
    for file in [run / "config.yaml", *run.glob("checkpoints/step_*/config.yaml")]:
        config = load_config(file)
        file.write_text(file.read_text().replace(config.data.shards, str(tmp_path / "gone")))
    for sums in run.glob("checkpoints/step_*/SHA256SUMS"):
        sums.unlink()
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "--anchors 0 leaves them out" in capsys.readouterr().err
    assert main([str(run), str(tmp_path / "out"), "--anchors", "0"]) == 0
    assert "no anchors: where the training data is not" in capsys.readouterr().out
    model = load(tmp_path / "out")
    assert model.embed(IMAGES).shape[0] == 5
    with pytest.raises(FileNotFoundError, match="a latent depends on the anchors of other samples"):
        model.classify(IMAGES)


def test_what_an_earlier_model_left_in_a_folder_is_not_read(exported: Path, tmp_path: Path, digits: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    other = load(exported)
    other.reference = {}
    write_export(folder, other.parts())
    assert (folder / "anchors.safetensors").is_file() and read_export(folder).reference == {}
    model = load(folder, anchors=70)  # as many as are asked for, where the data is
    assert model.reference_size == 70


def test_a_copied_checkpoint_has_no_measures_of_its_neighbours(three: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a" / "b" / "copy"
    shutil.copytree(three / "checkpoints" / "step_00000002", copy)
    for place in (tmp_path, tmp_path / "a"):
        (place / "evaluation.json").write_text('{"step": 2, "knn": 0.123}')
    assert main([str(copy), str(tmp_path / "out"), "--anchors", "3"]) == 0
    assert "0.123" not in (tmp_path / "out" / "README.md").read_text()
