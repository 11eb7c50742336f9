"""Files in the authors' format, with known weights: they load, and give the published networks' outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lzn_dist
from lzn_dist.engines.single import SingleEngine
from lzn_dist.objectives import build_networks
from lzn_dist.tools import import_published
from lzn_dist.tools.published_checkpoint import PREFIX, build_case, load_reference_checkpoint
from lzn_dist.training.checkpoint import find_checkpoint, load_weights, resume_state
from lzn_dist.training.setup import single_state
from tests.helpers.reference import assert_same_output, fill, read, wave

pytestmark = pytest.mark.slow


def write(path: Path, case: str) -> Path:
    """Averages filled by the recipe of the reference outputs; the trained weights are half of them."""
    content: dict[str, Any] = {"iteration": 1234, "epoch": 1, "optimizer": {}, "lr_scheduler": {}, "grad_scalar": {}}
    for name, network in build_case(case).parts().items():
        fill(network)
        trainable = [p.detach().clone() for p in network.parameters() if p.requires_grad]
        content[f"{name}_ema"] = {"decay": 0.999999, "num_updates": 1234, "shadow_params": trainable}
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        content[name] = {PREFIX + key: value.clone() for key, value in network.state_dict().items()}
    torch.save(content, path)
    return path


@torch.no_grad()
def test_case_2_gives_the_reference_outputs_and_becomes_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "case_2.pt", "case_study_2")
    reference, images = read("case_study_2"), wave((2, 3, 64, 64), 0.0)
    averaged = load_reference_checkpoint(path, "case_study_2")
    assert averaged.decoder is None and averaged.label_anchors is None and averaged.step == 1234
    assert_same_output(averaged.encoder(images), reference["encoder_output"])
    trained = load_reference_checkpoint(path, "case_study_2", ema=False)
    for ours, theirs in zip(trained.encoder.parameters(), averaged.encoder.parameters(), strict=True):
        assert torch.equal(ours, 0.5 * theirs)

    monkeypatch.setattr(sys, "argv", ["", str(path), "--case", "case_study_2", "--out", str(tmp_path / "run")])
    assert import_published.main() == 0 and "evaluate it with" in capsys.readouterr().out
    model = lzn_dist.load(tmp_path / "run")
    assert model.step == 1234 and model.config.task == "representation"
    assert torch.equal(model.networks["image"]["encoder"](images), averaged.encoder(images))
    networks = build_networks(model.config)
    load_weights(networks, find_checkpoint(tmp_path / "run"))
    assert torch.equal(networks.eval()["image"]["encoder"](images), trained.encoder(images))
    # trained on, Adam's moments begin anew: at the file's number of steps its first updates would be 3 times too large
    state = single_state(model.config, torch.device("cpu"))
    resume_state(state, find_checkpoint(tmp_path / "run"))
    assert isinstance(state.engine, SingleEngine) and state.counters.step == 1234
    assert {float(moments["step"]) for moments in state.engine.optimizer.state.values()} == {0.0}
    assert import_published.main() == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.soak  # files of a gigabyte, as the next
@torch.no_grad()
def test_case_3_gives_the_reference_outputs(tmp_path: Path) -> None:
    path = write(tmp_path / "case_3.pt", "case_study_3")
    reference = read("case_study_3")
    networks = load_reference_checkpoint(path, "case_study_3")
    images, t = wave((2, 3, 32, 32), 0.0), torch.tensor(reference["t"])
    assert_same_output(networks.encoder(images), reference["encoder_output"])
    assert networks.decoder is not None and networks.label_anchors is not None
    velocity = networks.decoder(wave((2, 3, 32, 32), 2.0), t, wave((2, 200), 1.0), torch.tensor([3, 7]))
    assert_same_output(velocity, reference["decoder_output"])
    assert networks.label_anchors().shape == (10, 200)


@pytest.mark.soak
@pytest.mark.parametrize(
    "case,size,count",
    # CelebA-HQ's and LSUN-Bedroom's have AFHQ-Cat's shapes
    [("case_study_1_cifar10", 32, 2), ("case_study_1_afhqcat", 256, 1)],
)
@torch.no_grad()
def test_case_1_gives_the_reference_outputs(case: str, size: int, count: int, tmp_path: Path) -> None:
    networks = load_reference_checkpoint(write(tmp_path / "case_1.pt", case), case)
    reference, images = read(case), wave((count, 3, size, size), 0.0)
    assert networks.label_anchors is None and networks.decoder is not None
    assert_same_output(networks.encoder(images), reference["encoder_output"])
    t = torch.tensor(reference["t"])
    velocity = networks.decoder(wave((count, 3, size, size), 2.0), t, wave((count, 200), 1.0))
    assert_same_output(velocity, reference["decoder_output"])


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="case: one of case_study_1_cifar10, "):
        load_reference_checkpoint(tmp_path / "none.pt", "case_study_4")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="no checkpoint of the authors'"):
        load_reference_checkpoint(tmp_path / "text.pt", "case_study_2")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="it holds a list"):
        load_reference_checkpoint(tmp_path / "list.pt", "case_study_2")
    path = write(tmp_path / "file.pt", "case_study_2")
    content = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    with pytest.raises(ValueError, match=r"the checksum of \S+ differs"):
        load_reference_checkpoint(path, "case_study_2")
    for odd, message in (
        ({"iteration": "x"}, "its iteration is 'x'"),
        ({"decoder": {}}, "is not of case_study_2: it has a decoder"),
        ({"label_anchor": {}}, "is not of case_study_2: it has a label_anchor"),
        ({"encoder": {"a": 1}}, "it holds no tensors by name"),
        ({"encoder": 3}, "it holds no tensors by name"),
        ({"encoder_ema": []}, "no averaged weights"),
        ({"encoder_ema": {"shadow_params": 5}}, "no averaged weights"),
        ({"encoder_ema": {"shadow_params": [1] * len(content["encoder_ema"]["shadow_params"])}}, "is a int"),
    ):
        torch.save(content | odd, path)
        with pytest.raises(ValueError, match=message):
            load_reference_checkpoint(path, "case_study_2")
    content["encoder_ema"]["shadow_params"].pop()
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"encoder_ema: \d+ averages for \d+ trainable parameters"):
        load_reference_checkpoint(path, "case_study_2")
    del content["encoder_ema"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="no averaged weights; load with ema=False"):
        load_reference_checkpoint(path, "case_study_2")
    name = next(iter(content["encoder"]))
    content["encoder"][name] = content["encoder"][name][:1].clone()
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"encoder: not of case_study_2: {name.removeprefix(PREFIX)} is \("):
        load_reference_checkpoint(path, "case_study_2", ema=False)
