"""Images and captions: alignment around centres, missing captions, equal captions, and the baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.keyed_random import make_key, normal
from lzn_dist.models import TextEncoder
from lzn_dist.models.layers import attention
from lzn_dist.objectives import Samples
from lzn_dist.objectives.base import View
from lzn_dist.training.step import TrainState, compute_gradients
from lzn_dist.zones import align, alignment_loss, compute_latents
from tests.helpers.small_run import small_config, small_samples, small_state

SMALL = [
    *(f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")),
    "data.vocabulary=40", "decode=[]",
]  # fmt: skip
IMAGE, TEXT = View("image"), View("text")
VARIED = [
    "modalities.image.anchor_norm=1.5", "modalities.text.anchor_norm=0.7", "latent.noise_scale=0.3",
]  # fmt: skip
WITH_LABELS = (
    "alignment.pairs=[{latents: image, anchors: text, over: last}, {latents: text, anchors: image, over: softmax}, "
    "{latents: image, anchors: label, weight: 0.5}, {latents: label, anchors: image}]"
)


def text_config(*overrides: str) -> Config:
    return small_config("precision=float64", *SMALL, *overrides, task="text")


def text_samples(
    count: int = 12, batch: int = 0, gone: tuple[int, ...] = (), unlabelled: tuple[int, ...] = ()
) -> Samples:
    """Samples 1 and 4 have one caption; gone: those without one."""
    samples = small_samples(0, count, torch.float64)
    tokens = torch.randint(0, 40, (count, 16), generator=torch.Generator().manual_seed(7))
    tokens[4] = tokens[1]
    for row in range(count):
        tokens[row, 5 + (row if row != 4 else 1) % 7 :] = -1
    tokens[list(gone)] = -1
    labels = samples.labels.clone()
    labels[list(unlabelled)] = -1
    inputs = {**samples.inputs, "text": (tokens,), "label": (labels,)}
    return replace(samples, inputs=inputs, labels=labels)


def gradients(state: TrainState, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = compute_gradients(state, samples)
    return loss, state.engine.gradients()


def close(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-9
) -> None:
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=tolerance)
    total = torch.stack([value.norm() for value in theirs[1].values()]).norm()
    assert total > 1e-3
    for name, value in theirs[1].items():
        assert (ours[1][name] - value).norm() <= tolerance * total, name


def differentiated(loss: Tensor, state: TrainState) -> tuple[Tensor, dict[str, Tensor]]:
    """By autograd alone."""
    named = dict(state.engine.networks.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = zip(named.items(), grads, strict=True)
    return loss.detach(), {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in found}


def by_definition(state: TrainState, samples: Samples, keep: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """LZN's loss from its definition, autograd and the plain field, of the samples that are kept alone."""
    config, networks = state.config, state.engine.networks
    own = samples.part(slice(None))
    encoded = {view: state.objective.encode(networks, own, view)[keep] for view in (IMAGE, TEXT)}
    placed, latents = {}, {}
    for view, anchors in encoded.items():
        norm = config.modalities[view.modality].anchor_norm
        assert norm is not None
        placed[view] = norm * F.normalize(anchors - anchors.mean(0), dim=1)
        noise = normal(
            make_key(config.seed, "latent", samples.batch, samples.index[keep]), (config.latent.dim,), torch.float64
        )
        latents[view] = compute_latents(
            placed[view], config.latent.noise_scale * noise, steps=config.latent.steps, backend="plain"
        )
    tokens = samples.view(TEXT)[keep]
    captions = torch.tensor([[bool(torch.equal(a, b)) for a in tokens] for b in tokens]).int().argmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for pair in config.alignment.pairs:
        result = align(
            latents[View(pair.latents)], placed[View(pair.anchors)], torch.arange(len(keep)), groups=captions,
            steps=config.alignment.steps, backend="plain",
        )  # fmt: skip
        total = total + pair.weight * alignment_loss(
            result.log_probs, cutoff=config.alignment.cutoff, kind=config.alignment.kind, over=pair.over
        )
    return differentiated(total, state)


def test_alignment_of_images_and_captions_is_its_definition() -> None:
    state = small_state(text_config(*VARIED))
    samples = text_samples()
    close(gradients(state, samples), by_definition(small_state(text_config(*VARIED)), samples, list(range(12))))


def test_equal_captions_are_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the best that can be had of two is a half each; a caption that differs by a token is another one."""
    samples, other = text_samples(), text_samples()
    other.inputs["text"][0][4, 0] += 1
    one_target, all_differ = (gradients(small_state(text_config()), each)[0] for each in (samples, other))
    monkeypatch.setattr("lzn_dist.objectives.base.Objective.same", lambda *_: None)
    each_its_own, still_differ = (gradients(small_state(text_config()), each)[0] for each in (samples, other))
    assert one_target < each_its_own - 0.1 and torch.isclose(all_differ, still_differ, rtol=1e-12)


@pytest.mark.parametrize("anchors", ["gathered", "ring"])
def test_samples_without_a_caption_are_as_if_they_were_not_there(anchors: str) -> None:
    """Of the text zones and of the loss; images without a caption stay in the images' zones, here there is no such."""
    gone = (0, 3, 7)
    keep = [row for row in range(12) if row not in gone]
    config = text_config(
        *VARIED, "data.partial=true", f"anchors={anchors}", "alignment.pairs=[{latents: image, anchors: text}]"
    )
    state = small_state(config)
    with_gaps = gradients(state, text_samples(gone=gone))
    assert all(bool(value.isfinite().all()) for value in with_gaps[1].values())
    # the images' latents are of all images, so the plain twin gets them so
    twin = small_state(config)
    samples, networks = text_samples(gone=gone), twin.engine.networks
    images = twin.objective.encode(networks, samples, IMAGE)
    images = 1.5 * F.normalize(images - images.mean(0), dim=1)
    texts = twin.objective.encode(networks, samples, TEXT)[keep]
    texts = 0.7 * F.normalize(texts - texts.mean(0), dim=1)
    noise = normal(make_key(0, "latent", 0, samples.index), (8,), torch.float64)
    latents = compute_latents(images, 0.3 * noise, steps=config.latent.steps, backend="plain")[keep]
    names = torch.tensor([1 if row == 4 else row for row in keep])
    result = align(latents, texts, torch.arange(len(keep)), groups=names, steps=config.alignment.steps, backend="plain")
    loss = alignment_loss(result.log_probs, cutoff=config.alignment.cutoff)
    close(with_gaps, differentiated(loss, twin))


@pytest.mark.parametrize("objective", ["lzn", "clip", "siglip"])
def test_a_batch_without_any_caption_teaches_nothing(objective: str) -> None:
    config = text_config("data.partial=true", f"objective={objective}")
    loss, grads = gradients(small_state(config), text_samples(gone=tuple(range(12))))
    assert loss == 0 and all(bool((value == 0).all()) for value in grads.values())


@pytest.mark.parametrize("more", [[], [WITH_LABELS, "data.partial=true"], ["objective=clip"], ["objective=siglip"]])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_caching_gives_the_gradients_of_one_backward(more: list[str], micro_batch: int) -> None:
    samples = text_samples(gone=(2, 5), unlabelled=(0, 5)) if "data.partial=true" in more else text_samples()
    whole, cached = (
        gradients(small_state(text_config(*more, *also)), samples) for also in ([], [f"micro_batch={micro_batch}"])
    )
    close(cached, whole)


def test_labels_that_are_missing_leave_the_others_as_they_are() -> None:
    """Samples without a label are out of the labels' frequencies and of the loss."""
    pairs = "alignment.pairs=[{latents: image, anchors: label}, {latents: image, anchors: text}]"
    only = "alignment.pairs=[{latents: image, anchors: label}, {latents: image, anchors: text, weight: 0}]"
    config = text_config(only, "data.partial=true", "latent.noise_scale=0.1")
    loss, _ = gradients(small_state(config), text_samples(unlabelled=(1, 2, 6)))
    state = small_state(config)
    samples, objective = text_samples(unlabelled=(1, 2, 6)), state.objective
    keep = [row for row in range(12) if row not in (1, 2, 6)]
    networks = state.engine.networks
    images = objective.encode(networks, samples, IMAGE)
    images = F.normalize(images - images.mean(0), dim=1)
    noise = normal(make_key(0, "latent", 0, samples.index), (8,), torch.float64)
    noise = config.latent.noise_scale * noise
    latents = compute_latents(images, noise, steps=config.latent.steps, backend="plain")[keep]
    table = objective.tables(networks, samples)["label"]
    counts = torch.bincount(samples.labels[keep], minlength=10).double()
    result = align(
        latents, table, samples.labels[keep], log_weights=(counts / counts.sum()).log(), steps=config.alignment.steps,
        backend="plain",
    )  # fmt: skip
    assert loss.item() == pytest.approx(alignment_loss(result.log_probs, cutoff=0.2).item(), rel=1e-9)
    assert gradients(small_state(text_config(pairs, "data.partial=true")), text_samples())[0].isfinite()


@pytest.mark.parametrize("gone", [(), (0, 8)])
def test_clip_and_siglip_are_their_definitions(gone: tuple[int, ...]) -> None:
    samples = text_samples(gone=gone)
    keep = [row for row in range(12) if row not in gone]
    for objective in ("clip", "siglip"):
        config = text_config(
            f"objective={objective}", "data.partial=true",
            "modalities.logits.encoder.arguments={scale: 5.0, bias: -0.4}",
        )  # fmt: skip
        state = small_state(config)
        networks = state.engine.networks
        images, texts = (
            F.normalize(state.objective.encode(networks, samples, view)[keep], dim=1) for view in (IMAGE, TEXT)
        )
        logits, names = 5 * images @ texts.T - 0.4, [1 if row == 4 else row for row in keep]
        total = 0.0
        for i, a in enumerate(names):
            same = torch.tensor([a == b for b in names])
            if objective == "siglip":
                total -= (torch.where(same, 1.0, -1.0) * logits[i]).sigmoid().log().sum()
            else:
                total -= 0.5 * (logits[i].softmax(0)[same].sum().log() + logits[:, i].softmax(0)[same].sum().log())
        loss, _ = gradients(small_state(config), samples)
        assert loss.item() == pytest.approx(float(total) / len(keep), rel=1e-5)  # the scale's logarithm is in float32


def test_what_is_watched_tells_a_cone_from_a_ball() -> None:
    objective = small_state(text_config()).objective
    generator = torch.Generator().manual_seed(0)
    ball = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    parts = objective.relate({IMAGE: ball + 100, TEXT: 3 * ball}, {}, text_samples()).parts
    assert parts["cosine_image"] > 0.99 and parts["cosine_text"] < 0.3
    assert parts["cosine_pairs"] == pytest.approx(1)
    assert parts["spread_text"] == pytest.approx(3 * parts["spread_image"].item())
    assert parts["captions_cut"] == 0


def test_captions_that_are_cut_are_counted() -> None:
    state = small_state(text_config("data.text_length=8"))
    samples = text_samples()
    _, parts = compute_gradients(state, samples)
    longer = (samples.view(TEXT)[:, 8:] >= 0).any(1).double().mean()
    assert 0 < longer < 1 and parts["captions_cut"] == pytest.approx(longer.item())


def test_a_length_that_cannot_learn_is_warned_of() -> None:
    for norm, warned in ((1.0, False), (8.0, True), (0.1, True)):
        config = text_config(f"modalities.text.anchor_norm={norm}", "alignment.steps=8")
        assert bool(small_state(config).objective.advice()) == warned


def test_attention_sees_what_is_present_and_past() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (4, 6, 6))
    present = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    past = torch.arange(6) <= torch.arange(4)[:, None] + 2
    for kept, found in (
        (present[:, None, None, :].expand(2, 1, 4, 6), attention(q, k, v, present=present)),
        (past, attention(q, k, v, causal=True)),
        (past & present[:, None, None, :], attention(q, k, v, present=present, causal=True)),
    ):
        weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", weights, v))


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_a_text_does_not_depend_on_what_stands_behind_it(pool: str) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(vocabulary=40, text_length=16, latent_dim=8, width=16, heads=2, pool=pool).double().eval()  # type: ignore[arg-type]
    samples = text_samples(gone=(3,))
    tokens = samples.view(TEXT)
    whole = encoder(tokens)
    assert whole.isfinite().all() and whole.shape == (12, 8)
    torch.testing.assert_close(encoder(tokens[:, :12]), whole)
    for row in (0, 5):  # nor on its batch
        length = int((tokens[row] >= 0).sum())
        torch.testing.assert_close(encoder(tokens[row : row + 1, :length]), whole[row : row + 1])
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 40
    assert not torch.allclose(encoder(changed)[0], whole[0])
    for wrong, why in (
        (tokens.int(), "int64"),
        (tokens[:, :0], "1 to 16"),
        (torch.cat((tokens, tokens), 1), "1 to 16"),
    ):
        with pytest.raises(ValueError, match=why):
            encoder(wrong)
    with pytest.raises(ValueError, match="width: a multiple of heads"):
        TextEncoder(vocabulary=40, width=30, heads=4)
