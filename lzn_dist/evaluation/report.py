"""Everything that is measured of a model, as one flat dictionary, and its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import CorruptSampleError
from lzn_dist.distributed.spread import once
from lzn_dist.evaluation.accuracy import classification_accuracy, logit_accuracy
from lzn_dist.evaluation.attributes import caption_values, generated_values, has_attributes, label_values
from lzn_dist.evaluation.data import EvaluationData, Unmeasurable
from lzn_dist.evaluation.fid import fid_values
from lzn_dist.evaluation.frechet import frechet_distance
from lzn_dist.evaluation.generation import (
    balanced_labels,
    disagreement,
    generate,
    recognised,
    reconstruction_errors,
)
from lzn_dist.evaluation.inception import InceptionFeatures, download
from lzn_dist.evaluation.probe import FeatureSet, effective_rank, probes, untrained_model
from lzn_dist.evaluation.text import retrieval_values, zero_shot_values
from lzn_dist.evaluation.zone_health import zone_health
from lzn_dist.inference import LZN

QUICK_SAMPLES_PER_CLASS = 10
COUNTED = 4  # samples whose evaluations of the decoder are counted where no others are drawn
PIXELS_COMPARED = 64 * 64 * 3  # numbers an image: probes of raw pixels say little about larger ones, and take hours
Features = tuple[np.ndarray, np.ndarray]  # [n, F], and labels [n]
RECONSTRUCTED = 1000  # images whose reconstruction is measured, at least


@dataclass(frozen=True)
class Asked:
    """What is measured and how; left_out takes the reasons of what cannot be. comparisons: whether pixels and an
    untrained encoder are probed as well."""

    model: LZN
    data: EvaluationData
    quick: bool
    seed: int
    left_out: dict[str, str]
    inception: InceptionFeatures | None
    comparisons: bool = True


@dataclass(frozen=True)
class Metric:
    """name: under which its absence is told. applies: whether it means anything of a model (and is wanted). measure:
    its values; ValueError where they cannot be had. Collective."""

    name: str
    applies: Callable[[Asked], bool]
    measure: Callable[[Asked], dict[str, float]]


def evaluate_model(
    model: LZN, output_dir: Path | None = None, *, figures: bool = True, quick: bool = False,
    data: EvaluationData | None = None, seed: int = 0, run: Path | None = None, left_out: dict[str, str] | None = None,
    comparisons: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Measure what the model's task and the data allow; keys that do not apply are absent.

    left_out: takes the measures that cannot be computed, with the reason: no held-out images, a single class, too few.
    Where the training images are measured, because evaluation.split=train asks for it, names begin with ``train.``.

    joint: accuracy_centre (noise scale 0; with _low and _high, a 95 % Wilson interval), accuracy@S and
    accuracy_weighted@S for every scale S of the configuration (weighted by the training images' class frequencies).
    joint and generation: nfe (evaluations of the decoder a sample), reconstruction_error, latent_only_error, and
    embeddings' effective_rank and, with labels, linear_probe, knn, probe_10_labels. Of digits also recognised,
    recognised_prior, rarest_class_prior (the share of prior draws in the zone of the class with fewest; 1/K at best,
    0 where a zone is dead),
    disagreement_latent, disagreement_label, frechet, frechet_prior, frechet_real (the floor: training images instead of
    samples), digit_classifier_accuracy.
    representation: those four, and (comparisons) the same under untrained. and, of small images, pixels.
    text and images: zero_shot_accuracy, image_to_text_recall_at_1 (5, 10), text_to_image_recall_at_1 (5, 10).
    Of digits that are described also caption_attributes_right and generated_attributes_right, with parts
    (`lzn_dist.evaluation.attributes`), and with labels text_to_label_accuracy and label_to_text_right.
    Baselines: what they have of these, and a supervised model's accuracy.
    Of decoders also fid and the like (`fid_values`) where evaluation.inception names the network's weights; of all LZN
    models zones.* (`zone_health`).
    quick: a few seconds, for looks during training: fewer samples and draws; no sweep, comparisons, Fréchet distances
    (but fid where it is asked for, however long it takes).
    figures: written to output_dir/figures; the training curves are those of ``run``, by default output_dir.
    Randomness is keyed by seed; the same model gives the same values. Collective: the work is spread over ranks, and
    every one gets the values. Raises ConfigError, before anything else, for Inception weights that are not to be had.
    """
    inception = inception_network(model.config, model.device) if model.has_decoder else None
    reasons: dict[str, str] = {} if left_out is None else left_out
    asked = Asked(model, data or EvaluationData(model.config), quick, seed, reasons, inception, comparisons)
    data = asked.data
    values: dict[str, float] = {}
    for metric in METRICS:
        if metric.applies(asked):
            values |= _attempt(metric.name, reasons, lambda measure=metric.measure: measure(asked))  # type: ignore[misc]
    if figures and output_dir is not None:
        once(lambda: write_figures(model, data, output_dir, seed, run))
    if not data.held_out and data.asked:
        values = {key if key in UNMEASURED else f"train.{key}": value for key, value in values.items()}
    return values


# of samples or the training images' statistics alone
UNMEASURED = {"nfe", "recognised", "recognised_prior", "rarest_class_prior", "disagreement_latent",
              "disagreement_label"}  # fmt: skip


def _attempt(name: str, left_out: dict[str, str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A measure's values; none, and the reason under its name, where it cannot be computed. An error is the same on all
    ranks: `spread` and `once` see to it."""
    try:
        return measure()
    except CorruptSampleError:  # the data, not the measure
        raise
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        left_out[name] = " ".join(str(error).split()) or type(error).__name__
        return {}


def logit_values(asked: Asked) -> dict[str, float]:
    """A supervised classifier's accuracy on the held-out images."""
    model, data = asked.model, asked.data
    data.need_held_out()
    data.need_labels()
    found = logit_accuracy(model, data.batches("test"))
    low, high = found.interval()
    return {"accuracy": found.value, "accuracy_low": low, "accuracy_high": high}


def accuracy_values(asked: Asked) -> dict[str, float]:
    """Classification on the held-out images over noise scales, with and without class weights."""
    model, data, quick, seed = asked.model, asked.data, asked.quick, asked.seed
    data.need_held_out()
    data.need_labels()
    scales = sorted({0.0} if quick else {0.0, 1.0, *model.config.evaluation.noise_scales})
    weights = None if quick else data.class_frequencies
    found = classification_accuracy(model, data.batches("test"), scales, weights, seed)
    low, high = found[0.0, False].interval()
    values = {"accuracy_centre": found[0.0, False].value, "accuracy_centre_low": low, "accuracy_centre_high": high}
    if not quick:
        for (scale, weighted), proportion in found.items():
            values[f"accuracy{'_weighted' if weighted else ''}@{scale:g}"] = proportion.value
    return values


def generation_values(asked: Asked) -> dict[str, float]:
    """Recognised samples, Fréchet distances (where there is a judge), reconstruction.

    Fréchet distances are those of classes · samples_per_class samples to the held-out images: they shrink with the
    number of samples, so compare equal ones.
    """
    model, data, quick, seed = asked.model, asked.data, asked.quick, asked.seed
    values: dict[str, float] = {}
    config, judge = model.config, data.digit_classifier
    if judge is None:
        values["nfe"] = generate(model, COUNTED, seed=seed).nfe
    per_class = config.evaluation.samples_per_class
    short = quick and model.takes_labels  # without labels, Fréchet distance and reconstruction are all there is to see
    if short:
        per_class = min(per_class, QUICK_SAMPLES_PER_CLASS)
    if judge is not None:
        values["digit_classifier_accuracy"] = judge.accuracy(data.test.pixels, data.test.labels.numpy())
        real = judge.features(data.test.pixels)

        def distance(images: torch.Tensor) -> float:
            return frechet_distance(judge.features(images.flatten(1).double().cpu().numpy()), real)

        classes = config.data.num_classes
        samples = prior = generate(model, max(1, classes) * per_class, seed=seed)
        if model.has_labels:  # without zones, samples by label are those of the prior already
            samples = generate(model, classes * per_class, balanced_labels(classes, per_class), seed)
            assert prior.labels is not None
            values["recognised_prior"] = recognised(judge, prior.images, prior.labels).value
            shares = torch.bincount(prior.labels, minlength=classes) / len(prior.labels)
            values["rarest_class_prior"] = shares.min().item()
        if samples.labels is not None:
            values["recognised"] = recognised(judge, samples.images, samples.labels).value
        values["nfe"] = prior.nfe
        if not short:  # with fewer samples a Fréchet distance is larger: it would not compare
            values["frechet"] = distance(samples.images)
            values["frechet_real"] = distance(data.train.images)
        if not short and model.has_labels:
            values["frechet_prior"] = distance(prior.images)
            if classes > 1:
                fight = disagreement(model, judge, per_class, seed)
                values["disagreement_latent"] = fight.latent_wins.value
                values["disagreement_label"] = fight.label_wins.value
    if not short:

        def errors() -> dict[str, float]:
            data.need_held_out()
            return reconstruction_errors(model, data.batches("test"), RECONSTRUCTED, seed)

        values |= _attempt("reconstruction_error", asked.left_out, errors)
    return values


def inception_network(config: Config, device: torch.device) -> InceptionFeatures | None:
    """The network of FID and the like where `evaluation.inception` asks for it. Raises ConfigError. Collective."""
    weights = config.evaluation.inception
    if not weights:
        return None
    try:
        if weights == "hub":
            once(download)  # one process for all; the others find the file
        return InceptionFeatures(None if weights == "hub" else Path(weights).expanduser(), device=device)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"evaluation.inception: {error}") from error


def inception_values(asked: Asked) -> dict[str, float]:
    """FID and the like in Inception features."""
    settings, network = asked.model.config.evaluation, asked.inception
    assert network is not None
    seeds = 1 if asked.quick else settings.fid_seeds
    return fid_values(
        asked.model, asked.data, network, weights=network.digest, cache=Path(settings.cache).expanduser(),
        samples=settings.fid_samples, seeds=range(asked.seed, asked.seed + seeds),
    )  # fmt: skip


def health_values(asked: Asked) -> dict[str, float]:
    """`zone_health` of the first fixed batch of measured images (those that count), with noise of scale 1."""
    model, data, seed = asked.model, asked.data, asked.seed
    latent = model.config.latent

    def health() -> dict[str, float]:
        batch = data.batches("test")[0]
        anchors = model.anchors(batch.images[batch.valid])
        noise = model.latent_noise(anchors, seed, batch.index[batch.valid].to(anchors.device))
        return zone_health(anchors, noise, solver=latent.solver, steps=latent.steps, backend=model.config.backend)

    return once(health)


def probe_values(asked: Asked) -> dict[str, float]:
    """Effective rank and, with labels, probes of the features; for a representation model of pixels and an untrained
    encoder beside them."""
    model, data, quick, reasons = asked.model, asked.data, asked.quick, asked.left_out
    values: dict[str, float] = {}

    def take(name: str, prefix: str, measure: Callable[[], dict[str, float]]) -> None:
        found = _attempt(prefix + name, reasons, lambda: once(measure))
        values.update({prefix + key: value for key, value in found.items()})

    def probe(train: Features | None, test: Features, prefix: str = "") -> None:
        take("effective_rank", prefix, lambda: {"effective_rank": effective_rank(test[0])})
        if train is not None:
            for name, measure in probes(FeatureSet(*train, *test), quick).items():
                take(name, prefix, measure)

    def features(of: LZN) -> tuple[Features | None, Features]:
        return data.features("train", of.embed) if labelled else None, data.features("test", of.embed)

    try:
        data.need_held_out()
        data.need_labels()
    except Unmeasurable as error:
        reasons["probes"] = str(error)
        return values
    labelled = data.labelled
    probe(*features(model))
    if not model.has_decoder and not quick and asked.comparisons:
        fresh = untrained_model(model.config, model.config.seed)
        fresh.networks.to(model.device)
        probe(*features(fresh), "untrained.")
        size = model.config.data
        if size.image_channels * size.image_size**2 <= PIXELS_COMPARED:
            train, test = ((images.pixels, images.labels.numpy()) for images in (data.train, data.test))
            probe(train if labelled else None, test, "pixels.")
    return values


def _described(asked: Asked) -> bool:
    model = asked.model
    return (model.has_text or model.has_captions) and has_attributes(asked.data)


METRICS = (
    Metric("accuracy", lambda asked: asked.model.has_labels, accuracy_values),
    Metric("accuracy", lambda asked: asked.model.has_logits, logit_values),
    Metric("retrieval", lambda asked: asked.model.pairs_text, lambda asked: retrieval_values(asked.model, asked.data)),
    Metric("zero_shot", lambda asked: asked.model.pairs_text, lambda asked: zero_shot_values(asked.model, asked.data)),
    Metric(
        "captions",
        lambda asked: _described(asked) and asked.model.has_captions and asked.model.has_encoder,
        lambda asked: caption_values(asked.model, asked.data),
    ),
    Metric(
        "text_to_image",
        lambda asked: _described(asked) and asked.model.has_text and asked.model.has_decoder,
        lambda asked: generated_values(asked.model, asked.data),
    ),
    Metric(
        "text_and_labels",
        lambda asked: _described(asked) and asked.model.has_labels,
        lambda asked: label_values(asked.model, asked.data),
    ),
    Metric("generation", lambda asked: asked.model.has_decoder and asked.model.draws_prior, generation_values),
    Metric("fid", lambda asked: asked.inception is not None and asked.model.draws_prior, inception_values),
    Metric("zones", lambda asked: asked.model.has_latents, health_values),
    Metric(
        "probes",
        lambda asked: asked.model.has_encoder and not (asked.quick and asked.model.has_decoder),
        probe_values,
    ),
)


def write_figures(
    model: LZN, data: EvaluationData, output_dir: Path, seed: int = 0, run: Path | None = None
) -> list[Path]:
    """Draw what the model's task allows, into output_dir/figures."""
    from lzn_dist.evaluation.figures import interpolation_grid, reconstruction_grid, sample_grid, training_curves
    from lzn_dist.evaluation.zone_figure import zone_figure  # matplotlib: half a second that training does not need

    folder = output_dir / "figures"
    written: list[Path | None] = [training_curves(run or output_dir, folder / "training.png")]
    config = model.config
    if model.has_decoder and model.draws_prior:
        columns, rows = 16, min(config.data.num_classes, 10) if model.takes_labels else 8
        if model.takes_labels:
            labels = torch.arange(rows).repeat_interleave(columns)
            images = model.generate(len(labels), labels, seed)
            names = [data.class_name(label)[:12] for label in range(rows)]
            written.append(sample_grid(images, columns, folder / "samples.png", names, "Samples by class"))
        prior = model.generate_with_latents(8 * columns, seed=seed)
        written.append(sample_grid(prior.images, columns, folder / "samples_prior.png", title="Samples of the prior"))
        first = data.first("test", config.evaluation.batch)
        batch, own = first.images, first.labels
        shown = min(32, len(batch))
        rebuilt = model.reconstruct(batch, seed, own)[:shown]
        written.append(reconstruction_grid(batch[:shown], rebuilt, folder / "reconstructions.png"))
        pairs = [(2 * i, 2 * i + 1) for i in range(min(6, len(batch) // 2))] if model.has_latents else []
        paths = [
            model.interpolate(batch[first], batch[second], 12, seed, own[[first, second]]) for first, second in pairs
        ]
        if paths:
            written.append(interpolation_grid(paths, folder / "interpolation.png"))
    if model.has_text or model.has_captions:
        written += _text_figures(model, data, folder, seed)
    if model.has_labels and config.data.num_classes <= 20 and config.latent.dim > 1:
        anchors = model.label_anchors()
        names = [data.class_name(label) for label in range(len(anchors))]
        labels = torch.arange(len(anchors))
        written.append(zone_figure(anchors, labels, folder / "zones.png", lines=48, class_names=names))
    return [path for path in written if path is not None]


def _text_figures(model: LZN, data: EvaluationData, folder: Path, seed: int) -> list[Path | None]:
    """Captions of held-out images, images of held-out captions, and what lies between two of these."""
    from lzn_dist.evaluation.figures import caption_grid, sample_grid

    batch = data.batches("test")[0]
    rows = batch.valid.nonzero()[:, 0]
    written: list[Path | None] = []
    if model.has_captions and model.has_encoder:
        captions = model.caption(batch.images)
        shown = rows[:12]
        written.append(
            caption_grid(batch.images[shown], [captions[row] for row in shown.tolist()], folder / "captions.png")
        )
    if model.has_text and model.has_decoder:
        found = data.batches("test").dataset.captions(batch.index[rows[:64]].numpy())
        texts = list(dict.fromkeys(own[0] for own in found if own))[:10]
        if texts:
            columns = 10
            repeated = [text for text in texts for _ in range(columns)]
            images = model.generate(texts=repeated, seed=seed)
            written.append(sample_grid(images, columns, folder / "from_captions.png", texts, "Images of captions"))
            ends = list(zip(texts[::2], texts[1::2], strict=False))
            paths = [model.interpolate(*pair, columns, seed) for pair in ends]
            if paths:
                names = [f"{first} → {second}" for first, second in ends]
                path = folder / "between_captions.png"
                written.append(sample_grid(torch.cat(paths), columns, path, names, "Between two captions"))
    return written
