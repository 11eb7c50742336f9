"""Exports that others read: transformers, torchvision, timm, ONNX, torch.export. Each is read by the real one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lzn_dist import load
from lzn_dist.exchange import ExportError, Loaded
from lzn_dist.exchange.for_transformers import can_be_written, torchvision_weights
from lzn_dist.exchange.programs import Classifier, programs, write_programs
from lzn_dist.inference import LZN
from lzn_dist.models import ResNetEncoder
from lzn_dist.objectives import build_networks
from tests.helpers.own_networks import Encoder as OwnEncoder
from tests.helpers.settings import OWN, both_with
from tests.helpers.small_run import small_config


@pytest.mark.process  # that its source needs no lzn_dist can be seen in a fresh process alone
def test_transformers_loads_the_encoders_by_their_own_source(exported: Path, tmp_path: Path) -> None:
    model = load(exported)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = model.tokenizer.encode(["a thin three", "a bold two"], model.config.data.text_length)
    torch.save({"images": images, "tokens": tokens}, tmp_path / "given.pt")
    script = textwrap.dedent(f"""
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
        import torch
        from transformers import AutoModel
        given, found = torch.load("given.pt"), {{}}
        for folder, name in (("encoder", "images"), ("text_encoder", "tokens")):
            network = AutoModel.from_pretrained(f"{exported}/" + folder, trust_remote_code=True)
            found[name] = network(given[name])
        assert "lzn_dist" not in sys.modules
        torch.save({{name: (o.anchors.detach(), o.features) for name, o in found.items()}}, "found.pt")
    """)
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["images"][0], model.anchors(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["images"][1], model.embed(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["tokens"][0], model.embed_text(["a thin three", "a bold two"]), rtol=0, atol=1e-6)
    assert not can_be_written(OwnEncoder(1, 8, 8)) and not can_be_written(None)


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The real torchvision and timm, which tests/run.sh installs beside the environment. The former's operators are for
    CUDA's torch: their shapes are not registered, and nothing here uses them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(sys.prefix) / "measures")
    monkeypatch.setattr(torch.library, "register_fake", lambda *_, **__: lambda function: function)
    import timm  # type: ignore[import-not-found, unused-ignore]
    import torchvision  # type: ignore[import-not-found, unused-ignore]

    yield torchvision, timm
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("torchvision", "timm"):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
def test_a_resnet_is_torchvisions_and_timms(vision: tuple[ModuleType, ModuleType]) -> None:
    torchvision, timm = vision
    ours = ResNetEncoder(latent_dim=16, blocks=(1, 2, 1, 1)).eval()
    for parameter in ours.parameters():
        parameter.data.add_(
            0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        )
    weights = torchvision_weights(ours)
    assert weights is not None
    norm = partial(nn.GroupNorm, 32)
    theirs = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], norm_layer=lambda channels: norm(channels)
    )
    others = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=0, norm_layer=timm.layers.GroupNorm
    )
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = ours.features(images)
        for network in (theirs, others):
            network.load_state_dict(weights)
            torch.testing.assert_close(network.eval()((images + 1) / 2), expected)
    assert torchvision_weights(ResNetEncoder(latent_dim=16, channels=16)) is None  # groups are others
    assert torchvision_weights(ResNetEncoder(latent_dim=16, stem="small")) is None
    assert torchvision_weights(OwnEncoder(1, 8, 8)) is None


@pytest.mark.slow
def test_the_classifier_program_is_the_models(exported: Path) -> None:
    """Dense and in float64, against `inference`'s field of zones."""
    model = load(exported)
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = model.classify(images)
    assert len(expected.unique()) > 1
    program = Classifier(model.parts()).eval()
    with torch.no_grad():
        assert torch.equal(program(images), expected)
    shuffled = model.parts()
    shuffled.reference["image"] = shuffled.reference["image"] * 0.05
    with torch.no_grad():
        assert not torch.equal(Classifier(shuffled).eval()(images), expected)  # it does depend on the reference


def tiny(*overrides: str) -> LZN:
    torch.manual_seed(0)
    config = small_config(
        "evaluation.alignment_steps=4", "latent.steps=3", "flow.sampler_steps=2", "latent.solver=dpm_solver_pp",
        *overrides,
    )  # fmt: skip
    networks = build_networks(config)
    for parameter in networks.parameters():  # fresh decoders give zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return LZN(networks, config, reference={"image": torch.randn(30, config.latent.dim)}, classes=tuple("0123456789"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_programs_of_any_batch_equal_the_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    monkeypatch.setattr("lzn_dist.networks._trusted", {"lzn_dist", "tests"})
    # lzn_dist's networks, of one block, go through torch.export on the way to ONNX
    model = tiny(*(OWN if kind == "pt2" else both_with(channel_multipliers=[1], residual_blocks=1)))
    parts = model.parts()
    assert set(write_programs(tmp_path, parts, kind)) == {
        f"{name}.{kind}" for name in ("encoder", "classifier", "decoder_step", "sampler")
    }
    for count in (1, 7):
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count)) * 2 - 1
        latents, t = model.latents(images), torch.linspace(0.1, 0.9, count)
        labels, noise = model.read_class(latents), model.noise(count, 3)
        decoder = model.networks.find("image", "decoder")
        assert decoder is not None
        with torch.no_grad():
            velocity = decoder(images, t, latents, labels=labels)
        expected = {
            "encoder": ([images], model.anchors(images)), "classifier": ([images], model.classify(images)),
            "decoder_step": ([images, t, latents, labels], velocity),
            "sampler": ([noise, latents, labels], model.decode(noise, latents, labels)),
        }  # fmt: skip
        for name, (given, value) in expected.items():
            path = tmp_path / f"{name}.{kind}"
            if kind == "pt2":
                found = torch.export.load(path).module()(*given).detach().numpy()
            else:
                session = onnxruntime.InferenceSession(path)
                names = [one.name for one in session.get_inputs()]
                assert names == list(next(p.inputs for p in programs(parts) if p.name == name))
                (found,) = session.run(None, dict(zip(names, (one.numpy() for one in given), strict=True)))
            np.testing.assert_allclose(found, value.numpy(), rtol=0, atol=1e-4, err_msg=f"{name} of {count}")


def test_a_network_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Asks(nn.Module):
        def forward(self, images: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
            return images.sum((1, 2, 3)) if images.sum() > 0 else images.mean((1, 2, 3))

    parts = tiny().parts()
    networks = {"image": {"encoder": Asks()}}
    other = Loaded(type(parts.networks)(networks), parts.config, 0, {}, None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"^encoder cannot be exported: ") as refused:
        list(write_programs(tmp_path, other, "pt2"))
    assert "\n" not in str(refused.value)
