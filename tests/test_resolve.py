"""What a configuration leaves to the data, and sets that are too small: settled before the first step."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from lzn_dist import train
from lzn_dist.config import Config, ConfigError, changed_keys, load_config
from lzn_dist.distributed import Topology
from lzn_dist.models.ncsnpp import fitting_multipliers
from lzn_dist.objectives import build_networks
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Options, prepare
from lzn_dist.training.batches import open_stream, prepare_samples
from lzn_dist.training.resolve import resolve
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import train_step
from tests.helpers.settings import decoder_with, encoder_with
from tests.helpers.small_run import ROOT


def shards(folder: Path, count: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Path:
    """Two classes of an image's shades, prepared."""
    for i in range(count):
        buffer = io.BytesIO()
        Image.new(mode, size, 10 * i if mode == "L" else (10 * i, 0, 0)).save(buffer, "PNG")
        path = folder / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    prepare(ImageFolder(folder / "in"), Options(folder / "out"), quiet=True)
    return folder / "out"


FEW = ["latent.dim=8", "latent.steps=3", "alignment.steps=5"]


def of_images(task: str, data: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"images_{task}.yaml", [f"data.shards={data}", *overrides])


def test_size_colours_and_classes_are_those_of_the_shards(tmp_path: Path) -> None:
    config = resolve(of_images("joint", shards(tmp_path / "rgb", 4)))
    assert (config.data.image_size, config.data.image_channels, config.data.num_classes) == (24, 3, 2)
    networks = build_networks(config)["image"]
    assert networks["encoder"].widths == (32, 64, 64) and networks["decoder"].attention_resolutions == (12,)  # type: ignore[index]
    grey = resolve(
        of_images(
            "joint",
            shards(tmp_path / "grey", 4, mode="L"),
            *encoder_with(channel_multipliers=[1, 3]),
        )
    )
    assert grey.data.image_channels == 1 and build_networks(grey)["image"]["encoder"].widths == (32, 96)  # type: ignore[index]
    assert resolve(grey) == grey  # what was written to a run is what it is
    assert not changed_keys(grey, resolve(grey))
    given = resolve(of_images("joint", tmp_path / "rgb" / "out", "data.image_size=16", "data.resize=16"))
    decoder = build_networks(given)["image"]["decoder"]  # type: ignore[index]
    assert (given.data.image_size, decoder.attention_resolutions) == (16, (16,))
    with pytest.raises(ConfigError, match=r"not squares of one size, one is 30x20: prepare .* --resize and --crop"):
        resolve(of_images("joint", shards(tmp_path / "wide", 4, (20, 30))))
    with pytest.raises(ConfigError, match="nowhere"):
        resolve(of_images("joint", tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"labels are needed .* set data\.num_classes"):
        prepare(ImageFolder(tmp_path / "rgb" / "in", False), Options(tmp_path / "unlabelled"), quiet=True)
        resolve(of_images("joint", tmp_path / "unlabelled"))


@pytest.mark.parametrize("size", [8, 16, 24, 28, 30, 32, 37, 48, 64, 96, 100, 128, 224, 256])
def test_networks_fit_any_size(size: int, tmp_path: Path) -> None:
    """Shapes alone, on torch's meta device: the settings as they are, of any size."""
    sizes = [size >> level for level in range(len(fitting_multipliers(size)))]
    assert all(a == 2 * b for a, b in itertools.pairwise(sizes)) and (sizes[-1] < 8 or sizes[-1] % 2)
    known = ["data.image_channels=3", "data.num_classes=2", f"data.image_size={size}"]
    for task in ("joint", "generation", "representation"):
        config = resolve(of_images(task, tmp_path, *known))
        with torch.device("meta"), torch.no_grad():
            networks = build_networks(config)
            images = torch.zeros(2, 3, size, size)
            assert networks["image"]["encoder"](images).shape == (2, config.latent.dim)  # type: ignore[misc]
            if task != "representation":
                labels = torch.zeros(2, dtype=torch.int64) if task == "joint" else None
                latents = torch.zeros(2, config.latent.dim)
                assert networks["image"]["decoder"](images, torch.ones(2), latents, labels=labels).shape == images.shape  # type: ignore[misc]


def mixed(folder: Path, *images: Image.Image) -> Path:
    for i, image in enumerate(images):
        (folder / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "in" / "ab"[i % 2] / f"{i}.png")
    prepare(ImageFolder(folder / "in"), Options(folder / "out"), quiet=True)
    return folder / "out"


def test_one_photo_says_nothing_of_the_others(tmp_path: Path) -> None:
    """A grey one among colours, wherever it stands; sizes that differ, and another than the configuration's."""
    images = [Image.new("L", (24, 24), 80), *(Image.new("RGB", (24, 24), (40 * i, 0, 9)) for i in range(3))]
    for turn in range(4):
        colours = mixed(tmp_path / str(turn), *images[turn:], *images[:turn])
        assert resolve(of_images("joint", colours)).data.image_channels == 3
    sizes = mixed(tmp_path / "sizes", *images, Image.new("RGB", (20, 30)))
    with pytest.raises(ConfigError, match="not squares of one size, one is 30x20"):
        resolve(of_images("joint", sizes))
    with pytest.raises(ConfigError, match=r"4 of 24x24, 1 of 30x20 pixels, data\.image_size is 24: .* data\.resize=24"):
        open_stream(resolve(of_images("joint", sizes, "data.image_size=24", "data.global_batch=2")), Topology())
    brought = resolve(of_images("joint", sizes, "data.image_size=24", "data.resize=24", "data.global_batch=2"))
    assert open_stream(brought, Topology()).batch(0).pixels.shape == (1, 2, 3, 24, 24)
    digits = load_config(ROOT / "configs" / "digits_generation.yaml", [f"data.shards={colours}", "data.embedded=none"])
    with pytest.raises(ConfigError, match=r"4 of 24x24 pixels, data\.image_size is 8: .* configs/images_\*\.yaml"):
        open_stream(digits, Topology())


@pytest.mark.parametrize("size", [256, 512])
def test_encoders_of_large_images_stay_small(size: int, tmp_path: Path) -> None:
    """Reading every map, as below 128 pixels, they had 700 million weights at 256 pixels, nearly all read-outs."""
    known = ["data.image_channels=3", "data.num_classes=2", f"data.image_size={size}"]
    with torch.device("meta"):
        networks = build_networks(resolve(of_images("joint", tmp_path, *known)))
    assert sum(weight.numel() for weight in networks["image"]["encoder"].parameters()) < 60e6  # type: ignore[index]


def test_a_step_on_ones_own_images(tmp_path: Path) -> None:
    data = shards(tmp_path, 8)
    config = resolve(
        of_images(
            "joint",
            data,
            "data.global_batch=8",
            *encoder_with(channels=4),
            *decoder_with(channels=4),
            *FEW,
        )
    )
    state = single_state(config, torch.device("cpu"))
    batch = open_stream(config, Topology()).batch(0)
    result = train_step(state, prepare_samples(batch, 0, state.objective, torch.device("cpu"), Topology()))
    assert result.applied and bool(result.scalars["loss"].isfinite())


def test_sets_that_are_too_small_are_refused_with_advice_that_works(tmp_path: Path) -> None:
    one = shards(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match="has a single training image: zones are made between two at least"):
        open_stream(resolve(of_images("joint", one)), Topology())
    three = shards(tmp_path / "three", 3)
    with pytest.raises(ConfigError, match=r"evaluation\.split=test: .* has train$"):
        open_stream(resolve(of_images("joint", three, "data.global_batch=2", "evaluation.split=test")), Topology())
    with pytest.raises(ConfigError, match=r"global_batch=1: .* set it to 2 or more"):
        open_stream(resolve(of_images("joint", three, "data.global_batch=1")), Topology())
    with pytest.raises(ValueError, match="which has 3 samples: use a global batch of 3"):
        open_stream(resolve(of_images("joint", three, "data.global_batch=16")), Topology())
    for batch in (2, 3):
        config = resolve(of_images("joint", three, f"data.global_batch={batch}"))
        assert len(open_stream(config, Topology()).batch(0).labels) == batch


def test_a_backend_that_cannot_be_here_is_refused_before_the_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lzn_dist.zones.field.find_spec", lambda _: None)
    more = [f"data.shards={digits}", f"output_dir={tmp_path / 'run'}", "tracking.wandb=disabled"]
    assert train.main(["digits_joint", "backend=triton", *more]) == 2
    said = capsys.readouterr().err
    assert "error: backend triton: Triton is not installed" in said and "Traceback" not in said
