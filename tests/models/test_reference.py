"""The four published networks: names, shapes and order of their parameters, and outputs under a stated filling.

The recipe: sort the state dict's names (n = index); v = sin(0.01 · arange(numel) + n) in float64, row-major.
Two or more dimensions: v · sqrt(2 / prod(shape[1:])). One: names ending in ".W" 16 v, in "weight" 1 + 0.1 v, others
0.1 v. ``sigmas`` stays. Inputs are wave(shape, φ) = sin(0.37 · arange + φ): encoder φ 0, latents 1, x_t 2.
"""

from typing import Any

import pytest
import torch
from torch import nn

from lzn_dist.models import ImageDecoder, ImageEncoder, LabelAnchors, ResNetEncoder
from tests.helpers.reference import assert_same_output, fill, read, wave

AFHQ: dict[str, Any] = {
    "image_size": 256,
    "channel_multipliers": (1, 1, 2, 2, 2, 2, 2),
    "residual_blocks": 2,
    "dropout": 0.0,
    "fir": True,
    "progressive": True,
}
MAPS = {"feature_resolutions": (64, 32, 16, 8, 4)}
ENCODERS = {"case_study_1_cifar10": {}, "case_study_3": {}, "case_study_1_afhqcat": {**AFHQ, **MAPS}}
DECODERS = {
    "case_study_1_cifar10": {},
    "case_study_3": {"num_classes": 10},
    "case_study_1_afhqcat": {**AFHQ, "embedding": "fourier", "scale_by_sigma": True},
}

pytestmark = pytest.mark.slow


def assert_same_parameters(network: nn.Module, expected: dict[str, list[int]], not_trainable: list[str]) -> None:
    found = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert list(found.items()) == list(expected.items())  # names, shapes and order
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trainable == [name for name in expected if name not in not_trainable]


@pytest.mark.parametrize(
    ("case", "parameters"),
    [("case_study_1_cifar10", 49_790_260), ("case_study_3", 49_790_260), ("case_study_1_afhqcat", 87_768_896)],
)
@torch.no_grad()
def test_image_encoder(case: str, parameters: int) -> None:
    reference = read(case)
    encoder = ImageEncoder(**ENCODERS[case]).eval()
    assert_same_parameters(encoder, reference["encoder"], reference["encoder_not_trainable"])
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    fill(encoder)
    images = wave((len(reference["t"]), 3, encoder.image_size, encoder.image_size), 0.0)
    assert_same_output(encoder(images), reference["encoder_output"])


@pytest.mark.parametrize(
    ("case", "parameters"),
    [("case_study_1_cifar10", 61_906_819), ("case_study_3", 61_911_939), ("case_study_1_afhqcat", 65_676_821)],
)
@torch.no_grad()
def test_image_decoder(case: str, parameters: int) -> None:
    reference = read(case)
    decoder = ImageDecoder(**DECODERS[case]).eval()
    assert_same_parameters(decoder, reference["decoder"], reference["decoder_not_trainable"])
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == parameters
    fill(decoder)
    t = torch.tensor(reference["t"])
    x_t = wave((len(t), 3, decoder.image_size, decoder.image_size), 2.0)
    labels = torch.tensor([3, 7]) if decoder.num_classes else None
    velocity = decoder(x_t, t, wave((len(t), 200), 1.0), labels)
    assert_same_output(velocity, reference["decoder_output"])


@torch.no_grad()
def test_resnet_encoder() -> None:
    reference = read("case_study_2")
    encoder = ResNetEncoder().eval()
    assert_same_parameters(encoder, reference["encoder"], reference["encoder_not_trainable"])
    assert sum(p.numel() for p in encoder.parameters()) == 28_231_232
    fill(encoder)
    images = wave((2, 3, 64, 64), 0.0)
    assert_same_output(encoder.features(images), reference["features"])
    assert_same_output(encoder(images), reference["encoder_output"])


def test_label_anchors() -> None:
    assert_same_parameters(LabelAnchors(10, 200), read("case_study_3")["label_anchor"], [])
