"""From latents to captions, and from captions to images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import Tokenizer
from lzn_dist.evaluation import EvaluationData
from lzn_dist.evaluation.attributes import Judge, judged, stated
from lzn_dist.inference import LZN, MissingCapability
from lzn_dist.keyed_random import make_key
from lzn_dist.modalities import Image, Text
from lzn_dist.models import TextDecoder
from lzn_dist.objectives import Samples, build_networks
from lzn_dist.prepare.captions import DIGITS
from lzn_dist.prepare.tokenizer import train_tokenizer
from lzn_dist.training.step import compute_gradients
from tests.helpers.small_run import small_config, small_state
from tests.test_text import close, gradients, text_samples

VOCABULARY = 5
SMALL = [
    *(f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")),
    "data.vocabulary=40",
]  # fmt: skip
EVERYTHING = (
    "decode=[{what: image, latents: text, condition_dropout: 0.4}, {what: text, latents: image, weight: 0.3}, "
    "{what: text, latents: text, point: anchor}]"
)


def text_config(*overrides: str) -> Config:
    return small_config("precision=float64", *SMALL, *overrides, task="text")


@pytest.fixture
def decoder() -> TextDecoder:
    torch.manual_seed(1)
    made = TextDecoder(vocabulary=VOCABULARY, text_length=4, latent_dim=3, width=8, heads=2).double().eval()
    for p in made.parameters():
        p.data.mul_(3)  # choices that are not all alike
    return made


def latents(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def chances(decoder: TextDecoder, latent: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Log-probabilities of what stands behind some tokens."""
    with torch.no_grad():
        return decoder(torch.tensor([tokens], dtype=torch.int64).reshape(1, -1), latent[None])[0, -1].log_softmax(0)


Chances = Callable[[tuple[int, ...]], Tensor]


def small_text(length: int = 4) -> Text:
    return Text(text_config(f"data.text_length={length}"))


def test_word_by_word_is_all_at_once(decoder: TextDecoder) -> None:
    z, tokens = latents(3), torch.randint(0, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(0))
    whole = decoder(tokens, z)
    assert whole.shape == (3, 5, VOCABULARY + 1)
    logits, past = decoder.begin(z)
    for place in range(4):
        torch.testing.assert_close(logits, whole[:, place])
        logits, past = decoder.extend(tokens[:, place], past)
    torch.testing.assert_close(logits, whole[:, 4])
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % VOCABULARY
    torch.testing.assert_close(decoder(other, z)[:, :3], whole[:, :3])  # nothing of what comes
    assert not torch.allclose(decoder(tokens, z + 1)[:, 0], whole[:, 0])
    with pytest.raises(ValueError, match="num_classes=0"):
        decoder(tokens, z, labels=torch.zeros(3, dtype=torch.int64))


@pytest.mark.slow
def test_the_likeliest_words_and_the_likeliest_caption(decoder: TextDecoder) -> None:
    z, keys = latents(6), torch.arange(6)
    greedy = small_text().write(decoder, z, None, keys)
    best = small_text().write(decoder, z, None, keys, beams=400)
    few = small_text().write(decoder, z, None, keys, beams=2)
    differs = 0
    for row in range(6):
        after = cache(partial(chances, decoder, z[row]))
        said: tuple[int, ...] = ()
        while len(said) < 4 and (token := int(after(said).argmax())) != VOCABULARY:
            said += (token,)
        assert [token for token in greedy[row].tolist() if token >= 0] == list(said)

        def score(tokens: tuple[int, ...], after: Chances = after) -> float:
            ended = (*tokens, VOCABULARY) if len(tokens) < 4 else tokens
            return sum(float(after(ended[:i])[ended[i]]) for i in range(len(ended))) / len(ended)

        every = [tokens for n in range(5) for tokens in itertools.product(range(VOCABULARY), repeat=n)]
        found = tuple(token for token in best[row].tolist() if token >= 0)
        assert score(found) == pytest.approx(max(map(score, every)), rel=1e-5)
        assert score(tuple(token for token in few[row].tolist() if token >= 0)) >= score(said) - 1e-9
        differs += found != said
    assert differs  # else the search showed nothing


def test_drawn_words_have_their_probabilities(decoder: TextDecoder) -> None:
    count = 4000
    z = latents(1).expand(count, 3)
    keys = make_key(0, "test", torch.arange(count))
    drawn = small_text().write(decoder, z, None, keys, temperature=0.7)
    expected = (chances(decoder, z[0], ()) / 0.7).softmax(0)
    first = torch.where(drawn[:, 0] < 0, VOCABULARY, drawn[:, 0])
    shares = torch.bincount(first, minlength=VOCABULARY + 1) / count
    assert (shares - expected).abs().max() < 4 * 0.5 / math.sqrt(count)
    token = int(expected[:VOCABULARY].argmax())
    behind = drawn[first == token, 1]
    second = torch.bincount(torch.where(behind < 0, VOCABULARY, behind), minlength=VOCABULARY + 1) / len(behind)
    wanted = (chances(decoder, z[0], (token,)) / 0.7).softmax(0)
    assert (second - wanted).abs().max() < 4 * 0.5 / math.sqrt(len(behind))
    assert torch.equal(small_text().write(decoder, z[5:9], None, keys[5:9], temperature=0.7), drawn[5:9])
    order = expected.argsort(descending=True)
    top = float(expected[order[:2]].sum()) - 1e-6
    few = small_text().write(decoder, z, None, keys, temperature=0.7, top_p=top)
    assert set(torch.where(few[:, 0] < 0, VOCABULARY, few[:, 0]).tolist()) == set(order[:2].tolist())
    with pytest.raises(ValueError, match="temperature must be 0"):
        small_text().write(decoder, z[:1], None, keys[:1], temperature=1.0, beams=2)


def test_the_loss_counts_words_and_the_end(decoder: TextDecoder) -> None:
    """A caption that was cut has no end; shares weigh samples."""
    samples = torch.tensor([[1, 2, -1, -1, -1], [3, 0, 4, 2, 1], [0, 1, 2, 3, -1], [-1] * 5])
    z, shares = latents(4), torch.tensor([0.5, 2.0, 1.5, 0.0], dtype=torch.float64)

    def keys(_: str) -> Tensor:
        return torch.zeros(4, dtype=torch.int64)

    found = small_text().decoding_loss(decoder, samples, z, None, keys, shares)
    total = 0.0
    for row, (tokens, share) in enumerate([((1, 2, 5), 0.5), ((3, 0, 4, 2), 2.0), ((0, 1, 2, 3, 5), 1.5)]):
        each = [-float(chances(decoder, z[row], tokens[:i])[tokens[i]]) for i in range(len(tokens))]
        total += share * sum(each) / len(each)
    assert found.item() == pytest.approx(total / 4, rel=1e-9)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_caching_gives_the_gradients_of_one_backward(micro_batch: int) -> None:
    samples = text_samples(gone=(2, 5))
    whole, cached = (
        gradients(small_state(text_config(EVERYTHING, "data.partial=true", *also)), samples)
        for also in ([], [f"micro_batch={micro_batch}"])
    )
    close(cached, whole)


def test_samples_without_a_caption_do_not_teach_the_decoders() -> None:
    """Whatever is in their images."""
    config = text_config(
        EVERYTHING, "data.partial=true", "alignment.pairs=[{latents: text, anchors: text.1}]"[:0] or "seed=0"
    )
    state = small_state(config)
    _, parts = compute_gradients(state, text_samples(gone=(2, 5)))
    assert set(parts) >= {"loss_flow", "loss_text", "loss_text_2"}
    objective, networks = state.objective, state.engine.networks
    samples = text_samples(gone=(2, 5))
    shares = objective.shares(objective.present(samples, "text"), torch.zeros(1, dtype=torch.float64))
    given = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for decoding in objective.needs.decodes[1:]:
        loss = objective.decode(networks, samples, decoding, given, shares)
        other = given.clone()
        other[[2, 5]] += 1
        assert objective.decode(networks, samples, decoding, other, shares) == loss
    images = samples.inputs["image"][0].clone()
    images[[2, 5]] = 0.3
    changed = Samples(0, samples.index, samples.position, {**samples.inputs, "image": (images,)}, samples.labels)
    first = objective.needs.decodes[0]
    assert objective.decode(networks, changed, first, given, shares) == objective.decode(
        networks, samples, first, given, shares
    )


def test_a_share_of_the_conditions_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    more = "decode=[{what: image, latents: image, class_conditional: true, condition_dropout: 0.25}]"
    state = small_state(text_config(more))
    given: list[Any] = []
    monkeypatch.setattr(Image, "decoding_loss", lambda self, *of: given.append(of) or of[2].sum())
    samples = text_samples(2000)
    for part in (samples, samples.part(slice(30, 60))):
        z = torch.ones(len(part), 8, dtype=torch.float64)
        state.objective.decode(state.engine.networks, part, state.objective.needs.decodes[0], z)
    dropped = given[0][2].eq(0).all(1)
    assert torch.equal(dropped, given[0][3].eq(-1))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(given[1][2].eq(0).all(1), dropped[30:60])
    assert given[0][2][~dropped].eq(1).all() and torch.equal(given[0][3][~dropped], samples.labels[~dropped])


def test_guidance_is_its_formula() -> None:
    kind = Image(text_config("flow.sampler_steps=1"))

    def decoder(x: Tensor, t: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        return z[:, :1, None, None].expand_as(x) + (0 if labels is None else labels[:, None, None, None])

    x, z, labels = torch.zeros(2, 1, 8, 8), torch.tensor([[1.0], [2.0]]), torch.tensor([3, 5])
    for guidance in (1.0, 0.0, 2.5):
        found, nfe = kind.walk(decoder, x, z, labels, to_noise=False, guidance=guidance)
        expected = -1 + guidance * (z[:, 0] + labels + 1)
        step = 1 - kind.config.flow.t_min
        torch.testing.assert_close(found[:, 0, 0, 0], step * expected)
        assert nfe == (1 if guidance == 1 else 2)


def text_model(config: Config, seed: int = 0) -> LZN:
    torch.manual_seed(seed)
    networks = build_networks(config).double()
    tokenizer = Tokenizer(train_tokenizer(["a thin one", "a bold two"] * 3, 300), "test")
    return LZN(networks, config, centres={"image": torch.ones(8), "text": torch.zeros(8)}, tokenizer=tokenizer)


def test_captions_and_images_from_whatever_is_given(digits: Any) -> None:
    labels = "alignment.pairs=[{latents: image, anchors: text}, {latents: image, anchors: label}]"
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    for point in ("latent", "anchor"):
        decode = ", ".join(f"{{what: {what}, latents: text, point: {point}}}" for what in ("image", "text"))
        config = text_config(
            labels, f"decode=[{decode}]", "data.vocabulary=300", "evaluation.batch=8", f"data.shards={digits}",
            "flow.sampler_steps=2", "data.text_length=8",
        )  # fmt: skip
        model = text_model(config)
        for given in ({"images": images}, {"texts": ["a thin one", "a bold two", "x"]}, {"labels": [1, 2, 3]}):
            captions = model.caption(**given)  # type: ignore[arg-type]
            assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)
            assert model.caption(**given) == captions  # type: ignore[arg-type]
            drawn = [model.caption(**given, temperature=1.0, seed=seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
            assert drawn[0] == drawn[1] != drawn[2]
        texts = ["a thin one", "a bold two"]
        made = model.generate(texts=texts)
        assert made.shape == (2, 1, 8, 8)
        torch.testing.assert_close(model.generate(texts=["a bold two"], first=1), made[1:], atol=1e-4, rtol=1e-3)
        assert model.generate(3, texts="a thin one").shape == (3, 1, 8, 8)
        placed = model.embed_text(texts)
        assert torch.equal(model.given("image", texts=texts), placed) == (point == "anchor")
        assert model.classify_text(texts).shape == (2,)
        if point == "anchor":
            with pytest.raises(MissingCapability, match="give texts"):
                model.generate(2)
        else:
            assert model.generate(2).shape == (2, 1, 8, 8)
        assert model.generate(texts="a thin one").shape == (1, 1, 8, 8)
        for wrong in ({"n": 3, "texts": texts}, {}):
            with pytest.raises(ValueError, match=r"texts must be one or 3|n: how many"):
                model.generate(**wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="give one of"):
            model.given("text", images=images, texts=texts)
    config = small_config(task="generation")
    with pytest.raises(MissingCapability, match="no text decoder"):
        LZN(build_networks(config), config).caption(images)


def test_what_cannot_be_decoded_so() -> None:
    with pytest.raises(ConfigError, match="condition_dropout"):
        text_config("decode=[{point: anchor, latent_dropout: 0.5}]")
    with pytest.raises(ConfigError, match="say point: anchor"):
        small_state(text_config("objective=clip", "decode=[{what: text, latents: text}]"))


def test_what_a_caption_states() -> None:
    assert stated("a bold handwritten one, leaning left and wide") == {
        "digit": "one", "weight": "bold", "slant": "leaning left", "width": "wide",
    }  # fmt: skip
    assert stated("someone wrote a thin or bold three") == {"digit": "three"}
    truth = {"digit": "one", "weight": "bold", "slant": "upright", "width": "wide"}
    found = judged(["a bold one", "a thin one", "bold and wide", "a wide two"], [truth] * 4)
    assert found == {
        "caption_attributes_right": 0.25, "caption_attributes_stated": 2.0, "caption_digit_right": 0.5,
        "caption_weight_right": pytest.approx(2 / 3), "caption_width_right": 1.0,
    }  # fmt: skip


def test_the_judge_sees_in_real_images_what_their_captions_say(digits: Any) -> None:
    data = EvaluationData(small_config(*SMALL, f"data.shards={digits}", task="text"))
    seen = Judge(data)(data.test.images)
    rows = np.arange(360)
    truth = data.batches("test").dataset.attributes(rows)
    order = {
        name: np.mean([own[name] == other[name] for own, other in zip(seen, truth, strict=True)]) for name in truth[0]
    }
    assert order["weight"] == order["slant"] == order["width"] == 1.0 and order["digit"] > 0.95
    leaning = {"leaning left": 1, "upright": 0, "leaning right": -1}
    flipped = Judge(data)(data.test.images.flip(3))
    sides = np.array([[leaning[own["slant"]] for own in each] for each in (seen, flipped)])
    assert np.corrcoef(sides)[0, 1] < -0.6
    assert {own["digit"] for own in seen} == set(DIGITS)
