"""Encoders and decoder at small sizes: shapes, gradients, keys, independence of the batch, and clear errors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lzn_dist.keyed_random import make_key
from lzn_dist.models import ImageDecoder, ImageEncoder, KeyedDropout, LabelAnchors, ResNetEncoder

SMALL: dict[str, Any] = {
    "image_size": 8,
    "image_channels": 1,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_resolutions": (4,),
    "dropout": 0.15,
    "latent_dim": 16,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "ncsnpp": lambda: ImageEncoder(**SMALL),
    "ncsnpp_fir": lambda: ImageEncoder(**SMALL, fir=True, progressive=True, feature_resolutions=(4,)),
    "resnet": lambda: ResNetEncoder(image_channels=1, latent_dim=16, channels=32, blocks=(1, 1), stem="small"),
}
DECODERS: dict[str, Callable[[], ImageDecoder]] = {
    "plain": lambda: ImageDecoder(**SMALL),
    "labels": lambda: ImageDecoder(**SMALL, num_classes=10),
    "progressive": lambda: ImageDecoder(**SMALL, progressive=True, num_classes=10),
    "as_at_256": lambda: ImageDecoder(**SMALL, fir=True, embedding="fourier", progressive=True, scale_by_sigma=True),
}
KEY = make_key(0, "dropout", 0, torch.arange(6))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def enliven(network: nn.Module) -> nn.Module:
    """Replace what starts near zero, so that every path counts."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return network


def decoder_inputs(decoder: ImageDecoder, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    labels = torch.arange(6) if decoder.num_classes else None
    t = torch.linspace(0.1, 1.0, 6, dtype=dtype)
    return torch.randn(6, 1, 8, 8, dtype=dtype), t, torch.randn(6, 16, dtype=dtype), labels


def assert_every_gradient(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_forward_and_backward(kind: str) -> None:
    encoder = enliven(ENCODERS[kind]())
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    anchors = encoder(images, KEY)
    assert anchors.shape == (6, 16)
    assert encoder.features(images, KEY).shape == (6, encoder.feature_dim)
    assert encoder.batch_independent is True
    (anchors * torch.randn(6, 16)).sum().backward()
    assert_every_gradient(encoder)


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_forward_and_backward(kind: str) -> None:
    decoder = DECODERS[kind]()
    enliven(decoder)
    inputs = decoder_inputs(decoder)
    velocity = decoder(*inputs, KEY)
    assert velocity.shape == (6, 1, 8, 8)
    (velocity * torch.randn(6, 1, 8, 8)).sum().backward()
    assert_every_gradient(decoder)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_does_not_mix_samples(kind: str) -> None:
    """With dropout on: micro-batches give the anchors of the whole batch, values and gradients."""
    encoder = enliven(ENCODERS[kind]().double())
    images, weight = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 16).double()
    whole = encoder(images, KEY)
    (whole * weight).sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        anchors = encoder(images[part], KEY[part])
        torch.testing.assert_close(anchors, whole[part], rtol=1e-10, atol=1e-10)
        (anchors * weight[part]).sum().backward()
    for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_does_not_mix_samples(kind: str) -> None:
    decoder = DECODERS[kind]().double()
    enliven(decoder)
    inputs = decoder_inputs(decoder, torch.float64)
    whole = decoder(*inputs, KEY)
    part = slice(2, 5)
    velocity = decoder(*(None if x is None else x[part] for x in inputs), KEY[part])
    torch.testing.assert_close(velocity, whole[part], rtol=1e-10, atol=1e-10)


def test_dropout_in_the_networks() -> None:
    encoder, decoder = enliven(ImageEncoder(**SMALL)), ImageDecoder(**SMALL)
    images = torch.randn(6, 1, 8, 8)
    with pytest.raises(ValueError, match="key: dropout in training mode"):
        encoder(images)
    with pytest.raises(ValueError, match="key: dropout in training mode"):
        decoder(*decoder_inputs(decoder))
    assert torch.equal(encoder(images, KEY), encoder(images, KEY))
    assert not torch.equal(encoder(images, KEY), encoder(images, KEY + 1))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images, KEY))
    for network in (encoder, decoder):
        indices = [module.index for module in network.modules() if isinstance(module, KeyedDropout)]
        assert indices == list(range(len(indices)))
    assert len([m for m in encoder.modules() if isinstance(m, KeyedDropout)]) == 5  # 2 blocks, 1 down, 2 middle


def test_encoder_features_determine_the_anchors() -> None:
    encoder = ImageEncoder(**SMALL).eval()
    images = torch.randn(3, 1, 8, 8)
    heads = [head[2] for head in encoder.latent_transformations.values()]
    weight = torch.cat([last.weight for last in heads], dim=1)
    bias = torch.stack([last.bias for last in heads]).sum(dim=0)
    torch.testing.assert_close(encoder(images), encoder.features(images) @ weight.t() + bias, rtol=1e-4, atol=1e-5)
    assert encoder.feature_dim == 5 * 200  # conv, block | down, block, middle


def test_every_input_of_the_decoder_counts() -> None:
    decoder = DECODERS["progressive"]().eval()
    enliven(decoder)
    x_t, t, latents, labels = decoder_inputs(decoder)
    base = decoder(x_t, t, latents, labels)
    assert not torch.allclose(decoder(x_t + 1, t, latents, labels), base)
    assert not torch.allclose(decoder(x_t, t * 0.9, latents, labels), base)
    assert not torch.allclose(decoder(x_t, t, latents + 1, labels), base)
    assert not torch.allclose(decoder(x_t, t, latents, (labels + 1) % 10), base)


def test_scale_by_sigma_divides_by_999_t() -> None:
    decoder = ImageDecoder(**SMALL, scale_by_sigma=True).eval()
    enliven(decoder)
    inputs = decoder_inputs(decoder)
    scaled = decoder(*inputs)
    decoder.scale_by_sigma = False
    torch.testing.assert_close(scaled * (999 * inputs[1])[:, None, None, None], decoder(*inputs))


def test_networks_start_as_published() -> None:
    """The decoder near zero (last convolution), the ResNet's blocks as their shortcuts."""
    decoder = ImageDecoder(**SMALL)
    assert decoder(*decoder_inputs(decoder), KEY).abs().max() < 1e-3
    block = ResNetEncoder(channels=32, blocks=(1, 2), stem="small").net[2].blocks[1]
    x = torch.rand(2, 256, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("make", [*ENCODERS.values(), *DECODERS.values()])
def test_initial_weights_come_from_the_global_generator(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    first = make().state_dict()
    torch.manual_seed(3)
    second = make().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = make().state_dict()
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.slow
def test_networks_can_be_copied_and_compiled_without_graph_breaks() -> None:
    encoder = ImageEncoder(**SMALL)
    images = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(copy.deepcopy(encoder)(images, KEY), encoder(images, KEY))
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, KEY), encoder(images, KEY))
    decoder = DECODERS["as_at_256"]()
    inputs = decoder_inputs(decoder)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, KEY), decoder(*inputs, KEY))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("image_size", 7, "image_size: 7 is not divisible by 2"),
        ("image_size", 0, "image_size: a positive"),
        ("image_channels", 0, "image_channels"),
        ("channels", 9, "channels"),
        ("channels", 0, "channels: a positive"),
        ("channel_multipliers", (), "channel_multipliers"),
        ("channel_multipliers", (1, 0), r"channel_multipliers\[1\]"),
        ("residual_blocks", 0, "residual_blocks"),
        ("attention_resolutions", (16,), r"attention_resolutions: \[16\]"),
        ("dropout", 1.0, "dropout"),
        ("latent_dim", -1, "latent_dim"),
    ],
)
@pytest.mark.parametrize("network", [ImageEncoder, ImageDecoder])
def test_impossible_sizes_name_the_argument(network: Any, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**{**SMALL, argument: value})


def test_impossible_arguments_of_one_network() -> None:
    with pytest.raises(ValueError, match="feature_resolutions"):
        ImageEncoder(**SMALL, feature_resolutions=(5,))
    with pytest.raises(ValueError, match="feature_resolutions"):
        ImageEncoder(**SMALL, feature_resolutions=())
    with pytest.raises(ValueError, match="hidden_dim"):
        ImageEncoder(**SMALL, hidden_dim=0)
    with pytest.raises(ValueError, match="embedding"):
        ImageDecoder(**SMALL, embedding="sinus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes"):
        ImageDecoder(**SMALL, num_classes=-1)
    with pytest.raises(ValueError, match="stem"):
        ResNetEncoder(stem="large")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks"):
        ResNetEncoder(blocks=(1, 0))
    with pytest.raises(ValueError, match="channels"):
        ResNetEncoder(channels=33)
    with pytest.raises(ValueError, match="latent_dim: 300"):
        ResNetEncoder(channels=32, blocks=(1,), latent_dim=300)
    with pytest.raises(ValueError, match="latent_dim"):
        ResNetEncoder(channels=32, blocks=(1,), latent_dim=4)
    with pytest.raises(ValueError, match="groups"):
        ResNetEncoder(groups=0)
    with pytest.raises(ValueError, match="dim"):
        LabelAnchors(3, 0)
    with pytest.raises(ValueError, match="seed_key"):
        LabelAnchors(3, 4, torch.zeros(2, dtype=torch.int64))


def test_inputs_of_the_wrong_shape_are_named() -> None:
    encoder, decoder = ImageEncoder(**SMALL), ImageDecoder(**SMALL, num_classes=10)
    x_t, t, latents, labels = decoder_inputs(decoder)
    with pytest.raises(ValueError, match="images: shape"):
        encoder(torch.zeros(2, 3, 8, 8), KEY[:2])
    with pytest.raises(ValueError, match="images: shape"):
        ENCODERS["resnet"]()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="x_t: shape"):
        decoder(torch.zeros(6, 1, 4, 4), t, latents, labels)
    with pytest.raises(ValueError, match="t: shape"):
        decoder(x_t, t[:1], latents, labels)
    with pytest.raises(ValueError, match="latents: shape"):
        decoder(x_t, t, latents[:, :3], labels)
    with pytest.raises(ValueError, match="labels: this decoder has num_classes=10"):
        decoder(x_t, t, latents)
    with pytest.raises(ValueError, match="labels: int64"):
        decoder(x_t, t, latents, labels.float())
    with pytest.raises(ValueError, match="takes none"):
        ImageDecoder(**SMALL)(x_t, t, latents, labels)


def test_resnet_head_keeps_what_it_normalises() -> None:
    """As many groups as numbers would make all anchors equal; a group has 8 or more."""
    encoder = ResNetEncoder(image_channels=1, latent_dim=32, channels=32, blocks=(1, 1), stem="small")
    assert encoder.head.layers[4].num_groups == 4
    assert encoder(torch.randn(4, 1, 8, 8)).std(dim=0).min() > 0.01
    assert ResNetEncoder(blocks=(1,) * 4).head.layers[4].num_groups == 32


def test_label_anchors_are_standard_normal_and_follow_their_key() -> None:
    anchors = LabelAnchors(100, 200)()
    assert anchors.requires_grad
    assert anchors.mean().item() == pytest.approx(0.0, abs=0.03)
    assert anchors.std().item() == pytest.approx(1.0, abs=0.03)
    key = make_key(5, "label_anchors")
    assert torch.equal(LabelAnchors(3, 4, key)(), LabelAnchors(3, 4, key)())
