import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lzn_dist.config import ConfigError, override
from lzn_dist.evaluation import EvaluationData, evaluate_model, figures, report
from lzn_dist.evaluation import data as report_data
from lzn_dist.evaluation.frechet import frechet_distance
from lzn_dist.evaluation.report import Asked, generation_values, health_values
from lzn_dist.evaluation.zone_figure import toy_anchors, toy_zone_figure, trajectories, zone_figure, zone_of
from lzn_dist.inference import LZN
from tests.helpers.hand_made import CLASSES, class_images, tiny


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def shows(path: Path, images: torch.Tensor, columns: int, *, width: float, left: float) -> None:
    """The picture has these images [n, c, h, w] in rows: `width` inches of it, from `left` on."""
    canvas = figures.mosaic(images, columns)
    rows, per_row, _ = canvas.shape
    found = pixels_of(path)
    height, scale = width * rows / per_row, 100  # dots an inch
    y = [len(found) - round(scale * (0.1 + height * (1 - (i + 0.5) / rows))) for i in range(rows)]
    x = [round(scale * (left + width * (j + 0.5) / per_row)) for j in range(per_row)]
    assert np.abs(found[np.ix_(y, x)] / 255 - canvas).max() < 0.01


def test_trajectories_end_in_the_zone_that_the_map_says() -> None:
    anchors, _ = toy_anchors()
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    states = trajectories(points, anchors, 60)
    assert torch.equal(states[0], points)
    ends = torch.cdist(states[-1], anchors).argmin(1)
    assert (ends == zone_of(points, anchors, 60)).float().mean() > 0.99
    assert len(ends.unique()) > 15
    # a zone is not the set of points that are nearest to its anchor
    assert (torch.cdist(points, anchors).argmin(1) != ends).float().mean() > 0.2


def test_zone_figure_of_two_half_planes(tmp_path: Path) -> None:
    path = zone_figure(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), tmp_path / "z.png", lines=0)
    image = pixels_of(path).astype(int)
    assert image.shape == (896, 896, 3) and path.stat().st_size < 300_000
    left, right = image[300, 200], image[300, 700]
    assert left[2] > left[0] and right[0] > right[2]  # blue, orange
    assert (image[300, 447:449] > 245).all() and (image[5, 5] == 255).all()  # boundary and outside are white


@pytest.mark.slow
def test_zone_figures_of_the_toy_and_of_a_slice(tmp_path: Path) -> None:
    """As many colours as classes, each on some of the picture."""
    anchors = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for path, classes in (
        (toy_zone_figure(tmp_path / "toy.png", classes=3, each=4), 3),
        (
            zone_figure(anchors, torch.arange(5), tmp_path / "slice.png", lines=5, steps=20, class_names=list("abcde")),
            5,
        ),
    ):
        hue, saturation, _ = np.moveaxis(np.asarray(Image.open(path).convert("RGB").convert("HSV")).astype(int), 2, 0)
        wanted = [Image.new("RGB", (1, 1), figures.class_colour(label)) for label in range(classes)]
        hues = [image.convert("HSV").getpixel((0, 0))[0] for image in wanted]
        shares = [((np.abs(hue - own) <= 4) & (saturation > 40)).mean() for own in hues]
        assert min(shares) > 0.002 and sum(shares) > 0.25, shares
    with pytest.raises(ValueError, match="need anchors"):
        zone_figure(torch.zeros(3, 1), torch.zeros(3), tmp_path / "no.png")


def test_image_figures_show_their_images_in_order(tmp_path: Path) -> None:
    images = class_images(torch.arange(20) % CLASSES)
    path = figures.sample_grid(images, 5, tmp_path / "a.png", ["zero", "one", "two", "three"])
    shows(path, images, 5, width=7.0, left=0.9)
    path = figures.reconstruction_grid(images[:12], -images[:12], tmp_path / "b.png", columns=8)
    white = torch.ones(4, 1, 8, 8)
    pairs = torch.cat((images[:8], -images[:8], images[8:12], white, -images[8:12], white))
    shows(path, pairs, 8, width=8.0, left=0.9)
    path = figures.interpolation_grid([images[:4], images[4:8]], tmp_path / "c.png")
    shows(path, images[:8], 4, width=7.0, left=0.1)
    colours = torch.rand(4, 3, 16, 16) * 2 - 1
    shows(figures.sample_grid(colours, 2, tmp_path / "d.png"), colours, 2, width=7.0, left=0.1)
    canvas = figures.mosaic(class_images(torch.tensor([0, 3, 1])), 2)
    assert canvas.shape == (17, 17, 3)
    assert canvas[0, 0, 0] == pytest.approx(0.9) and canvas[0, 9 + 3, 0] == pytest.approx(0.9)
    assert canvas[9, 1, 0] == pytest.approx(0.9) and (canvas[9:, 9:] == 1).all()


def test_training_curves_are_the_logged_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures.training_curves(tmp_path, tmp_path / "t.png") is None
    rows = [{"step": s, "loss": 1 / s, "loss_flow": 0.5 / s, "loss_alignment": 0.5 / s, "aligned": 0.5} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    (tmp_path / "eval.jsonl").write_text(json.dumps({"step": 2, "accuracy_centre": 0.5, "effective_rank": 7.5}) + "\n")
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    figures.training_curves(tmp_path, tmp_path / "t.png")
    (figure,) = drawn
    curves = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    for key in ("loss", "loss_flow", "loss_alignment", "aligned"):
        assert [[row["step"], row[key]] for row in rows] in curves, key
    assert [[2, 0.5]] in curves and [[2, 7.5]] in curves


HEALTH = {
    f"zones.{key}"
    for key in ("entropy", "effective_anchors", "mean", "variance", "correlation", "kurtosis", "normality_p",
                "solver_error")
}  # fmt: skip
PROBES = {"linear_probe", "knn", "probe_10_labels", "probe_10_labels_std", "effective_rank"}
GENERATION = {"digit_classifier_accuracy", "frechet", "frechet_real", "reconstruction_error", "latent_only_error",
              "nfe"}  # fmt: skip
JOINT = {
    "accuracy_centre", "accuracy_centre_low", "accuracy_centre_high", "recognised", "recognised_prior",
    "rarest_class_prior", "frechet_prior",
    "disagreement_latent", "disagreement_label",
    *(f"accuracy{w}@{s}" for w in ("", "_weighted") for s in ("0", "0.5", "1")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", ["joint", "generation", "representation"])
def test_what_is_measured_of_each_task(task: str, digits: Path, tmp_path: Path) -> None:
    model = tiny(task, digits)
    data = EvaluationData(model.config)
    values = evaluate_model(model, tmp_path, data=data)
    expected = {
        "joint": PROBES | GENERATION | JOINT | HEALTH,
        "generation": PROBES | GENERATION | HEALTH,
        "representation": {p + key for key in PROBES for p in ("", "untrained.", "pixels.")} | HEALTH,
    }[task]
    assert set(values) == expected
    assert all(np.isfinite(value) for value in values.values())
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    pictures = {"samples_prior.png", "reconstructions.png", "interpolation.png"}
    assert names == {"joint": pictures | {"samples.png", "zones.png"}, "generation": pictures}.get(task, set())
    if task == "representation":
        assert 0.93 < values["pixels.linear_probe"] < 1 and 0.95 < values["pixels.knn"] < 1
    else:
        assert values["digit_classifier_accuracy"] > 0.96
        assert values["frechet"] > 10 * values["frechet_real"] > 0  # an untrained decoder is far off
    again = evaluate_model(model, None, data=data, quick=True)
    assert set(again) <= expected and len(again) >= 2
    assert {key: values[key] for key in again if key in GENERATION} == {
        k: v for k, v in again.items() if k in GENERATION
    }
    assert again == evaluate_model(model, None, data=EvaluationData(model.config), quick=True)


PICTURES = {"samples_prior.png", "reconstructions.png"}
FLOW = GENERATION - {"latent_only_error"}
CLASSIFIER = {"accuracy", "accuracy_low", "accuracy_high"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task,objective,by_class,measured,pictures",
    [
        ("generation", "rectified_flow", False, FLOW, PICTURES),
        ("generation", "rectified_flow", True, FLOW | {"recognised"}, PICTURES | {"samples.png"}),
        ("generation", "lzn", True, FLOW | PROBES | HEALTH | {"recognised", "latent_only_error"},
         PICTURES | {"samples.png", "interpolation.png"}),
        ("representation", "supervised", False, CLASSIFIER | PROBES, set()),
        ("representation", "simclr", False, PROBES, set()),
    ],
)  # fmt: skip
def test_what_is_measured_of_baselines(
    task: str, objective: str, by_class: bool, measured: set[str], pictures: set[str],
    digits: Path, tmp_path: Path,
) -> None:  # fmt: skip
    model = tiny(task, digits, objective, by_class)
    values = evaluate_model(model, tmp_path)
    assert {key for key in values if not key.startswith(("untrained.", "pixels."))} == measured
    assert all(np.isfinite(value) for value in values.values())
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == pictures
    if "nfe" in measured:
        assert values["nfe"] == 2.0
    if objective == "supervised":
        assert values["accuracy"] < 0.4  # untrained


def test_data_holds_every_image_once(digits: Path) -> None:
    data = EvaluationData(tiny("joint", digits).config)
    assert data.train.images.shape == (1437, 1, 8, 8) and data.test.images.shape == (360, 1, 8, 8)
    assert data.class_frequencies.sum().item() == pytest.approx(1.0)
    assert torch.bincount(data.test.labels).min() >= 33
    assert data.class_name(7) == "7"
    assert len(data.first("test", 7)) == 7 and torch.equal(data.first("test", 7).images, data.test.images[:7])
    features, labels = data.features("test", lambda images: images.flatten(1))
    assert np.array_equal(features, data.test.pixels) and np.array_equal(labels, data.test.labels.numpy())


def test_shards_without_labels_are_not_probed(digits: Path) -> None:
    model = tiny("representation", digits)
    data = EvaluationData(model.config)
    assert data.labelled
    unlabelled = {
        name: replace(split, offsets={key: table for key, table in split.offsets.items() if key != "cls"})
        for name, split in data.index.splits.items()
    }
    data.index = replace(data.index, splits=unlabelled)
    assert not data.labelled
    ranks = {f"{prefix}effective_rank" for prefix in ("", "untrained.", "pixels.")}
    assert set(evaluate_model(model, None, data=data)) == HEALTH | ranks


def test_features_of_a_large_split_are_those_of_its_first_images(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "IN_MEMORY", 250)  # batches have 200
    data = EvaluationData(tiny("joint", digits).config)
    seen: list[int] = []
    features, labels = data.features("train", lambda images: (seen.append(len(images)), images.flatten(1))[1])
    assert features.shape == (250, 64) and len(labels) == 250 and seen == [200, 200]


def asked(model: LZN, data: EvaluationData | None = None, quick: bool = False) -> Asked:
    return Asked(model, data or EvaluationData(model.config), quick, 0, {}, None)


def test_frechet_distances_are_to_held_out_images(digits: Path) -> None:
    model = tiny("generation", digits, "rectified_flow")
    data = EvaluationData(model.config)
    values, judge = generation_values(asked(model, data)), data.digit_classifier
    assert judge is not None
    images = model.generate(20, seed=0).flatten(1).double().numpy()
    train, test = (judge.features(part.pixels) for part in (data.train, data.test))
    assert values["frechet_real"] == pytest.approx(frechet_distance(train, test))
    assert values["frechet"] == pytest.approx(frechet_distance(judge.features(images), test))
    assert values["frechet"] != pytest.approx(frechet_distance(judge.features(images), train), rel=1e-3)


def test_a_dead_zone_shows_in_the_priors_classes(digits: Path) -> None:
    model = tiny("joint", digits)
    anchors = next(model.networks["label"].parameters())
    with torch.no_grad():
        anchors[9] = anchors[8]  # the first of two equal anchors is the nearest
    model.config = override(model.config, ["evaluation.samples_per_class=30"])
    values = generation_values(asked(model, quick=True))
    assert values["rarest_class_prior"] == 0.0
    with torch.no_grad():
        anchors.copy_(8.0 * torch.eye(10, 8) + 1e-3 * torch.randn(10, 8))
        anchors[8:] = -8.0
        anchors[9] = -anchors[8]
    assert generation_values(asked(model, quick=True))["rarest_class_prior"] > 0.0


def test_evaluations_are_counted_without_a_judge(digits: Path) -> None:
    model = tiny("generation", digits)
    model.config = override(model.config, ["data.embedded=none", "flow.sampler_steps=3"])
    values = generation_values(asked(model, quick=True))
    assert values["nfe"] == 3.0 and "frechet" not in values and "reconstruction_error" in values


def test_zone_health_is_of_images_that_count(digits: Path) -> None:
    """A batch larger than the split is filled up with repeated images: these are not zones of their own."""
    model = tiny("representation", digits)
    found = []
    for batch in (360, 700):
        model.config = override(model.config, [f"evaluation.batch={batch}"])
        found.append(health_values(asked(model)))
    assert found[0] == found[1]


@pytest.mark.slow
def test_pixels_of_large_images_are_not_probed(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PIXELS_COMPARED", 63)
    model = tiny("representation", digits)
    values = report.probe_values(asked(model))
    assert "untrained.knn" in values and "pixels.knn" not in values


def test_missing_inception_weights_are_named_before_anything_else(digits: Path, tmp_path: Path) -> None:
    model = tiny("generation", digits)
    model.config = override(model.config, [f"evaluation.inception={tmp_path / 'weights.pth'}", "data.shards=nowhere"])
    with pytest.raises(ConfigError, match=r"evaluation\.inception: .*(weights\.pth|lzn_dist\[measures\])"):
        evaluate_model(model, None)


@pytest.mark.slow
def test_evaluation_leaves_torchs_generator_alone(digits: Path) -> None:
    model = tiny("representation", digits)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate_model(model, None)
    assert torch.equal(before, torch.get_rng_state())
