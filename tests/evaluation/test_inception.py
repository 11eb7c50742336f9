import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lzn_dist.evaluation.distribution import Moments, frechet_distance_of, inception_score, precision_recall
from lzn_dist.evaluation.inception import InceptionFeatures, to_bytes

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def test_pixels_come_back_and_what_lies_outside_is_clipped() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(pixels.float() / 127.5 - 1.0), pixels)
    assert to_bytes(torch.tensor([-3.0, -1.0, -0.0001, 0.0041, 1.0, 1.5])).tolist() == [0, 0, 127, 128, 255, 255]
    with pytest.raises(ValueError, match="must be finite"):
        to_bytes(torch.tensor([0.0, torch.nan]))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r'pip install "lzn_dist\[measures\]"'):
        InceptionFeatures()


def test_a_torchvision_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity/__init__.py").write_text("raise RuntimeError('operator torchvision::nms is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"fits torch .*lzn_dist\[measures\].*nms is not there"):
        InceptionFeatures()


def stand_in(monkeypatch: pytest.MonkeyPatch, loaded: list[str]) -> None:
    """A module that stands in for torch-fidelity's and notes which weights it is given to load."""

    class Network(nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            loaded.append(feature_extractor_weights_path)
            self.Mixed_6d = nn.Module()
            self.Mixed_6d.branch1x1 = nn.Identity()

    module: Any = types.ModuleType(MODULE)
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = Network, "https://nowhere.invalid/weights-1.pth"
    package: Any = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = module
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, MODULE, module)


def test_other_weights_are_refused_before_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    stand_in(monkeypatch, loaded)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=rf"weights\.pth: expected weights with SHA-256 6726825d\w+, found {digest}"):
        InceptionFeatures(path)
    assert not loaded
    InceptionFeatures(path, sha256=digest[:8])
    assert loaded == [str(path)]


def test_weights_are_downloaded_once_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    stand_in(monkeypatch, loaded)
    calls = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        calls.append((url, hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    digest = hashlib.sha256(b"weights").hexdigest()
    for _ in range(2):
        InceptionFeatures(sha256=digest)
    assert calls == [("https://nowhere.invalid/weights-1.pth", digest)]
    assert loaded == 2 * [str(tmp_path / "hub/checkpoints/weights-1.pth")]


@pytest.fixture
def torch_fidelity_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real torch-fidelity, which tests/run.sh installs beside the environment.

    It asks for torchvision, whose builds need CUDA's torch. The measures use nothing of it: an empty one will do.
    """
    monkeypatch.syspath_prepend(Path(sys.prefix) / "measures")
    stand_ins = {
        "torchvision": {}, "torchvision.models": {},
        "torchvision.transforms": {}, "torchvision.transforms.functional": {},
        "torchvision.datasets": {name: type(name, (), {}) for name in ("CIFAR10", "CIFAR100", "STL10")},
    }  # fmt: skip
    for name, content in stand_ins.items():
        module: Any = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("torch_fidelity_at_hand")
def test_features_and_measures_equal_torch_fidelity(tmp_path: Path) -> None:
    """The weights are random ones in the published file's format."""
    import torch_fidelity.feature_extractor_inceptionv3 as module
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    class Untrained(module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *arguments: object) -> None:
            pass

    torch.save({}, tmp_path / "none.pth")
    names = ["2048", "logits_unbiased"]
    untrained = Untrained("untrained", names, feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.manual_seed(0)
    for layer in untrained.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    path = tmp_path / "weights.pth"
    torch.save(untrained.state_dict(), path)
    inception = InceptionFeatures(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    pixels = torch.randint(0, 256, (14, 1, 8, 8), dtype=torch.uint8)
    images = pixels.float() / 127.5 - 1.0
    found = inception(images, chunk=9)
    assert [part.shape for part in (found.pool, found.spatial, found.probabilities)] == [
        (14, 2048), (14, 2023), (14, 1008)]  # fmt: skip
    assert all(part.dtype == np.float32 for part in (found.pool, found.spatial, found.probabilities))
    colour = pixels.repeat(1, 3, 1, 1)
    pool, logits = untrained(colour)
    assert pool.std(0).mean() > 1e-3  # the images differ
    np.testing.assert_allclose(found.pool, pool, rtol=1e-4, atol=1e-4 * pool.abs().max())
    np.testing.assert_allclose(found.probabilities, logits.softmax(1), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.spatial[:2], spatial_by_hand(untrained, colour[:2]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(inception(images[:2].repeat(1, 3, 1, 1)).pool, found.pool[:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"images must be \[n, 1 or 3"):
        inception(images.repeat(1, 2, 1, 1))

    scale = pool.std()  # the measures, on these features in units of their spread
    real, fake = pool[:7] / scale, pool[7:] / scale + 0.1
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (real, fake)), verbose=False)
    distance = frechet_distance_of(Moments.of(real.numpy()), Moments.of(fake.numpy()))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    score = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert inception_score(found.probabilities, 4) == pytest.approx(
        (score["inception_score_mean"], score["inception_score_std"]), rel=1e-4
    )
    assert precision_recall(real.numpy(), fake.numpy()) == pytest.approx(calculate_precision_recall_full(fake, real, 3))


def spatial_by_hand(network: nn.Module, pixels: Tensor) -> np.ndarray:
    """sFID's features by running the layers up to Mixed_6d's first branch one after the other."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    x = (resize(pixels.float(), size=(299, 299), align_corners=False) - 128) / 128
    for name, layer in network.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    branch = network.Mixed_6d.branch1x1
    x = torch.relu(branch.bn(branch.conv(x)))
    positions = [(channel, row, column) for channel in range(7) for row in range(17) for column in range(17)]
    found: np.ndarray = np.array([[float(image[place]) for place in positions] for image in x])
    return found
