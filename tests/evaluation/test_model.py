from pathlib import Path

import pytest
import torch

from lzn_dist.config import load_config, override
from lzn_dist.data import ShardedDataset, ShardIndex, whole_images
from lzn_dist.inference import LZN, MissingCapability, encoding, latents
from lzn_dist.objectives import build_networks
from tests.helpers.hand_made import CLASSES, DIM, class_images, hand_made
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
SIZES = [
    *encoder_with(channels=8),
    *decoder_with(channels=8),
    "latent.dim=8",
    "flow.sampler_steps=2",
]


def test_classify_finds_the_class_of_every_image(joint: LZN) -> None:
    torch.manual_seed(0)
    labels = torch.arange(20) % CLASSES  # 8 + 8 + 4: the last batch is filled up
    images = class_images(labels) + 0.02 * torch.randn(20, 1, 8, 8)
    assert torch.equal(joint.classify(images), labels)
    assert joint.classify(images[:0]).shape == (0,)


def test_an_image_is_seen_beside_the_reference_and_itself(joint: LZN, digits: Path, tmp_path: Path) -> None:
    """By itself an image would have the whole space as its zone, and the same centre as any other."""
    images = class_images(torch.arange(CLASSES))
    reference, joint.reference = joint.reference, {}
    joint.config = override(joint.config, [f"data.shards={digits}"])
    assert [int(joint.classify(image[None])) for image in images] == [0, 1, 2, 3]
    others = ShardIndex.load(digits)
    first = ShardedDataset(others, "train", 1, whole_images(8)).fixed_batches(8)[0].images
    torch.testing.assert_close(joint.reference["image"], joint.anchors(first))
    together = joint.anchors_to_latents(joint.anchors(torch.cat((images[:1], first))), 0.0)
    torch.testing.assert_close(joint.latents(images[:1], 0.0), together[:1])
    whole = joint.latents(images, 1.0, seed=3)
    parts = [joint.latents(images[i : i + 1], 1.0, seed=3, first=i) for i in range(CLASSES)]
    torch.testing.assert_close(torch.cat(parts), whole)
    elsewhere = hand_made("joint", data={"num_classes": CLASSES, "shards": str(tmp_path)})
    elsewhere.reference = {}
    with pytest.raises(FileNotFoundError, match=r"no shards.*`lzn_dist export` stores them"):
        elsewhere.classify(images)
    elsewhere.reference = reference
    assert torch.equal(elsewhere.classify(images), torch.arange(CLASSES))


def test_class_probabilities_are_shares_of_draws(joint: LZN, monkeypatch: pytest.MonkeyPatch) -> None:
    images = class_images(torch.arange(CLASSES))
    sharp = joint.class_probabilities(images, 50, 0.3)
    torch.testing.assert_close(sharp.sum(1), torch.ones(CLASSES))
    assert torch.equal(sharp.argmax(1), torch.arange(CLASSES)) and sharp.diagonal().min() > 0.9
    between = (images[:1] + images[1:2]) / 2
    shares = joint.class_probabilities(between, 400, 1.0)[0]
    assert (shares[:2] > 0.2).all() and shares.sum() == pytest.approx(1.0)
    parts = [joint.class_probabilities(images[i : i + 2], 20, seed=1, first=i) for i in (0, 2)]
    assert torch.equal(torch.cat(parts), joint.class_probabilities(images, 20, seed=1))
    monkeypatch.setattr(latents, "DRAWS", 20)  # one image at a time
    assert torch.equal(torch.cat(parts), joint.class_probabilities(images, 20, seed=1))
    with pytest.raises(ValueError, match="draws must be 1 or more"):
        joint.class_probabilities(images, 0)
    assert joint.class_probabilities(images[:0]).shape == (0, CLASSES)


def test_generation_from_images_and_by_another_sampler(joint: LZN) -> None:
    images = class_images(torch.tensor([2, 1]))
    torch.testing.assert_close(joint.generate(images=images), images)
    torch.testing.assert_close(joint.generate(3, images=images[0]), images[:1].expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="images must be one or 3, got 2"):
        joint.generate(3, images=images)
    with pytest.raises(ValueError, match="texts or images, not both"):
        joint.generate(images=images, texts=["a two"])
    assert joint.generate_with_latents(2, steps=3).nfe == 3 != joint.generate_with_latents(2).nfe
    with pytest.raises(ValueError, match="steps must be at least 1"):
        joint.generate(2, steps=0)


def test_what_is_embedded(joint: LZN) -> None:
    images = class_images(torch.arange(2))
    assert torch.equal(joint.embed(images, "anchor"), joint.anchors(images))
    assert torch.equal(joint.embed(images, "latent"), joint.latents(images, 0.0))
    with pytest.raises(MissingCapability, match="Encoder gives no map of images"):
        joint.embed(images, "map")
    with pytest.raises(ValueError, match="features, anchor, latent or map"):
        joint.embed(images, "vector")  # type: ignore[arg-type]
    model = baseline("objective=simclr", "decode=[]")
    assert model.embed(images, "map").shape[:1] == (2,) and model.embed(images, "map").dim() == 4


def test_large_images_go_through_the_networks_in_parts(joint: LZN, monkeypatch: pytest.MonkeyPatch) -> None:
    images = class_images(torch.arange(20) % CLASSES)
    expected = joint.anchors(images), joint.embed(images)
    assert joint.chunk == 512
    monkeypatch.setattr(encoding, "CHUNK_PIXELS", 3 * 64)
    assert joint.chunk == 3
    sizes: list[int] = []
    joint.networks["image"]["encoder"].register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))  # type: ignore[union-attr]
    assert torch.equal(joint.anchors(images), expected[0]) and torch.equal(joint.embed(images), expected[1])
    assert max(sizes) == 3 and sum(sizes) == 20


def test_class_weights_shift_the_decision(joint: LZN) -> None:
    latents = joint.prior_latents(400, seed=1)
    equal = joint.read_class(latents)
    assert torch.bincount(equal, minlength=CLASSES).min() > 50  # symmetric anchors: a quarter each
    only = joint.read_class(latents, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert torch.equal(only, torch.full_like(only, 2))
    many = joint.read_class(latents, torch.tensor([100.0, 1.0, 1.0, 1.0]))
    assert (many == 0).sum() > (equal == 0).sum()


def test_a_labels_latents_are_random_points_of_its_zone(joint: LZN) -> None:
    labels = torch.arange(200) % CLASSES
    latents = joint.label_latents(labels, seed=3)
    assert (joint.read_class(latents) == labels).float().mean() > 0.95
    assert latents.std() > 0.5
    assert not torch.equal(latents, joint.label_latents(labels, seed=4))


@pytest.mark.parametrize("task", ["joint", "generation"])
def test_generate_is_a_function_of_seed_and_sample_number(task: str) -> None:
    model = hand_made(task, flow={"sampler_steps": 3, "t_min": 0.1})
    # stop short of the target, so that the noise still shows
    model.networks.decoder = torch.nn.Identity()
    model.networks["image"]["decoder"].forward = lambda x, t, latents, labels=None: latents[:, :1, None, None] - 0.5 * x  # type: ignore[method-assign, assignment, return-value]
    whole = model.generate(7, seed=5)
    assert whole.shape == (7, 1, 8, 8) and whole.abs().max() <= 1
    assert torch.equal(whole, model.generate(7, seed=5))
    torch.testing.assert_close(whole, torch.cat((model.generate(3, seed=5), model.generate(4, seed=5, first=3))))
    assert not torch.allclose(whole, model.generate(7, seed=6))
    assert not torch.allclose(whole[0], whole[1])


def test_conditional_samples_are_split_independent(joint: LZN) -> None:
    labels = torch.tensor([0, 3, 1, 2, 2])
    whole = joint.generate_with_latents(5, labels, seed=2)
    end = joint.generate_with_latents(3, labels[2:], seed=2, first=2)
    torch.testing.assert_close(whole.latents[2:], end.latents)
    torch.testing.assert_close(whole.images, class_images(labels))


def test_the_prior_latents_class_is_read_and_given_to_the_decoder(joint: LZN) -> None:
    made = joint.generate_with_latents(40, seed=1)
    assert made.labels is not None
    assert torch.equal(made.labels, joint.read_class(made.latents))
    assert len(made.labels.unique()) == CLASSES
    torch.testing.assert_close(made.images, class_images(made.labels))


def test_zone_gives_the_latent_and_label_the_one_hot(joint: LZN) -> None:
    made = joint.generate_with_latents(40, labels=1, zone=3)
    assert (joint.read_class(made.latents) == 3).float().mean() > 0.95
    torch.testing.assert_close(made.images, class_images(torch.ones(40, dtype=torch.int64)))


def test_reconstruct_returns_every_image(joint: LZN) -> None:
    images = class_images(torch.arange(11) % CLASSES)
    # the decoder ends at the class's image whatever the noise; inversion of it is singular at t = 1, so start inside
    joint.encode_noise = lambda images, latents, labels=None: torch.zeros_like(images)  # type: ignore[method-assign]
    torch.testing.assert_close(joint.reconstruct(images), images)


def test_inverse_and_decode_use_the_configured_sampler() -> None:
    model = hand_made("generation", flow={"sampler": "dopri5"})
    model.networks["image"]["decoder"].forward = lambda x, t, latents, labels=None: -x + latents[:, :1, None, None]  # type: ignore[union-attr, method-assign, assignment]
    images = torch.rand(8, 1, 8, 8) - 0.5  # a whole batch
    torch.testing.assert_close(model.reconstruct(images), images, rtol=0, atol=1e-3)


def test_a_device_without_float64_is_refused(joint: LZN) -> None:
    with pytest.raises(ValueError, match="mps computes no float64, which the zones need: leave the model on the CPU"):
        joint.to("mps")
    assert joint.device.type == "cpu"


def test_latents_have_their_shape_and_scale(joint: LZN) -> None:
    images = class_images(torch.arange(4))
    assert joint.anchors(images).shape == (4, DIM) and joint.embed(images).shape == (4, 64)
    centre = joint.latents(images, 0.0)
    assert torch.equal(centre, joint.latents(images, 0.0, seed=9))
    assert not torch.equal(joint.latents(images, 1.0), joint.latents(images, 1.0, seed=9))


def test_missing_capabilities_are_one_clear_error() -> None:
    model = hand_made("representation")
    images = class_images(torch.arange(2))
    assert model.embed(images).shape == (2, 64)
    with pytest.raises(MissingCapability, match="representation model has no label anchors"):
        model.classify(images)
    with pytest.raises(MissingCapability, match="no image decoder"):
        model.generate(2)
    with pytest.raises(MissingCapability, match="no image decoder"):
        model.reconstruct(images)
    with pytest.raises(MissingCapability, match="generation model has no label anchors"):
        hand_made("generation").generate(2, labels=1)


def test_wrong_labels_are_refused(joint: LZN) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        joint.generate(2, labels=4)
    with pytest.raises(ValueError, match=r"int64 \[2\]"):
        joint.generate(2, labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="zone needs labels"):
        joint.generate(2, zone=1)


def test_load_names_a_run_that_is_not_there(tmp_path: Path) -> None:
    from lzn_dist.inference import load
    from lzn_dist.training.checkpoint import CheckpointError

    with pytest.raises(CheckpointError, match=r"nowhere"):
        load(tmp_path / "nowhere")


def baseline(*overrides: str) -> LZN:
    config = load_config(ROOT / "configs" / "digits_generation.yaml", [*SIZES, *overrides])
    torch.manual_seed(0)
    return LZN(build_networks(config), config)


def test_rectified_flow_by_class_takes_labels_in_turn_where_none_are_asked_for() -> None:
    model = baseline("objective=rectified_flow", "decode=[{class_conditional: true}]")
    found = model.generate_with_latents(5, first=8)
    assert found.latents.shape == (5, 0) and found.nfe == 2
    assert found.labels is not None and found.labels.tolist() == [8, 9, 0, 1, 2]
    assert torch.equal(model.generate(5, torch.tensor([8, 9, 0, 1, 2]), first=8), found.images)
    images = class_images(torch.arange(4))
    rebuilt = model.reconstruct(images, labels=torch.tensor([1, 2, 3, 9]))
    assert rebuilt.shape == images.shape
    with pytest.raises(ValueError, match="takes labels and has no zones"):
        model.reconstruct(images)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9, got 3\.\.10"):
        model.generate(2, torch.tensor([3, 10]))
    for missing in (lambda: model.embed(images), lambda: model.generate(1, 0, zone=1)):
        with pytest.raises(MissingCapability):
            missing()


def test_a_supervised_model_classifies_by_its_largest_logit() -> None:
    model = baseline("objective=supervised", "data.num_classes=4")
    images = class_images(torch.arange(4))
    logits = torch.eye(4)[[2, 0, 3, 3]]
    model.networks["image"]["encoder"].forward = lambda images: logits  # type: ignore[union-attr, method-assign, assignment]
    assert model.classify(images).tolist() == [2, 0, 3, 3]
    with pytest.raises(MissingCapability, match="no image decoder"):
        model.generate(1)
