"""Attention, keyed dropout, resampling, embeddings and initialisation against plain twins and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.keyed_random import make_key
from lzn_dist.models import KeyedDropout, attention, layers


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def qkv(dim: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 3, dim), (2, 5, 3, dim), (2, 5, 3, dim))
    return tuple(torch.randn(s, dtype=dtype, generator=generator).to(device).requires_grad_() for s in shapes)


def test_attention_equals_its_plain_twin() -> None:
    inputs = qkv(6, torch.float64)
    output, expected = attention(*inputs), plain_attention(*inputs)
    assert output.shape == (2, 7, 3, 6)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    layers.memory_efficient_attention is None or not torch.cuda.is_available(), reason="needs CUDA and xformers"
)
@pytest.mark.parametrize("dim", [32, 256])
def test_xformers_attention(dim: int) -> None:
    inputs = qkv(dim, torch.float32, "cuda")
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    output, expected = attention(*inputs), plain_attention(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    layers.memory_efficient_attention is None or not torch.cuda.is_available(), reason="needs CUDA and xformers"
)
@pytest.mark.parametrize("causal", [False, True])
def test_xformers_attention_of_what_is_present(causal: bool) -> None:
    """Uneven lengths: rows of the bias must begin where its kernels load them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 32, generator=generator) for _ in range(3))
    present = torch.tensor([[True] * 5, [True, True, True, False, False]])
    inputs = [x.cuda().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    output = attention(*inputs, present=present.cuda(), causal=causal)
    expected = attention(*exact, present=present, causal=causal)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double().cpu(), expected_gradient, rtol=1e-3, atol=1e-4)


def test_xformers_is_called_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("called for tensors on the CPU")

    monkeypatch.setattr(layers, "memory_efficient_attention", refuse)
    attention(*qkv(8, torch.float32))


def keys(samples: Tensor, step: int = 0) -> Tensor:
    return make_key(0, "dropout", step, samples)


@pytest.mark.parametrize("splits", [(12,), (4, 8), (1, 5, 6), (1,) * 12])
def test_dropout_does_not_depend_on_the_split_of_a_batch(splits: tuple[int, ...]) -> None:
    layer = KeyedDropout(0.3, index=2)
    x = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))
    samples = torch.arange(100, 112)
    whole = layer(x, keys(samples))
    parts = [layer(part, keys(own)) for part, own in zip(x.split(splits), samples.split(splits), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x[order], keys(samples[order])), whole[order])


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate: float) -> None:
    count = 64 * 4096
    output = KeyedDropout(rate)(torch.ones(64, 4096), keys(torch.arange(64)))
    kept = (output != 0).double().mean().item()
    assert kept == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / count))
    torch.testing.assert_close(output[output != 0], torch.full((int(kept * count + 0.5),), 1 / (1 - rate)))


def test_dropout_masks_differ_by_layer_step_and_sample() -> None:
    x, samples = torch.ones(8, 1000), torch.arange(8)
    first = KeyedDropout(0.5, index=0)(x, keys(samples)) == 0
    others = {
        "layer": KeyedDropout(0.5, index=1)(x, keys(samples)) == 0,
        "step": KeyedDropout(0.5, index=0)(x, keys(samples, step=1)) == 0,
        "sample": first.roll(1, 0),
    }
    for name, other in others.items():
        assert (first == other).double().mean().item() == pytest.approx(0.5, abs=0.03), name


def test_dropout_keeps_a_byte_an_element_for_the_backward() -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        output = KeyedDropout(0.25, index=1)(x, keys(torch.arange(3)))
    assert [saved.dtype for saved in kept] == [torch.bool]
    output.sum().backward()
    torch.testing.assert_close(x.grad, (output != 0) / 0.75)


def test_dropout_is_the_identity_in_evaluation_and_at_rate_0() -> None:
    x = torch.randn(3, 4)
    assert KeyedDropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0)(x) is x


def test_dropout_says_what_is_wrong() -> None:
    layer, x = KeyedDropout(0.5), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"key: .*make_key"):
        layer(x)
    with pytest.raises(ValueError, match=r"key: int64 of shape \[3\]"):
        layer(x, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="key: int64"):
        layer(x, torch.zeros(3))
    with pytest.raises(ValueError, match="dropout: a rate"):
        KeyedDropout(1.0)


def fir_twin(x: Tensor, factor: int, up: bool) -> Tensor:
    """Upsample by zeros, filter by [1, 3, 3, 1], downsample, one sample and channel after the other."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8.0
    kernel = torch.outer(taps, taps)
    if up:
        stuffed = x.new_zeros(*x.shape[:2], factor * x.shape[2], factor * x.shape[3])
        stuffed[..., ::factor, ::factor] = factor**2 * x
        padded = F.pad(stuffed, (2, 1, 2, 1))
    else:
        padded = F.pad(x, (1, 1, 1, 1))
    filtered = (padded.unfold(2, 4, 1).unfold(3, 4, 1) * kernel).sum(dim=(-2, -1))
    return filtered if up else filtered[..., ::factor, ::factor]


def test_fir_resampling_equals_its_twin() -> None:
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(layers.upsample(x, fir=True), fir_twin(x, 2, up=True))
    torch.testing.assert_close(layers.downsample(x, fir=True), fir_twin(x, 2, up=False))


def test_plain_resampling() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(layers.downsample(x, fir=False), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert torch.equal(layers.upsample(x, fir=False), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_embeddings_of_time() -> None:
    times = torch.tensor([0.0, 1.0, 500.0], dtype=torch.float64)
    embedded = layers.positional_embedding(times, 8)
    for i, time in enumerate(times.tolist()):
        phases = [time * 10_000 ** (-j / 3) for j in range(4)]
        expected = [math.sin(p) for p in phases] + [math.cos(p) for p in phases]
        torch.testing.assert_close(embedded[i], torch.tensor(expected, dtype=torch.float64))
    fourier = layers.FourierEmbedding(5)
    assert not fourier.W.requires_grad
    phases = 2 * math.pi * fourier.W * 0.3
    torch.testing.assert_close(fourier(torch.tensor([0.3]))[0], torch.cat((phases.sin(), phases.cos())))


def test_initialisation_has_its_variance_and_comes_from_the_global_generator() -> None:
    torch.manual_seed(0)
    weight = layers.convolution(64, 128, 3).weight
    assert weight.var().item() == pytest.approx(1 / (96 * 9), rel=0.02)
    assert layers.convolution(64, 128, 3, init_scale=0.0).weight.std().item() == pytest.approx(
        math.sqrt(1e-10 / (96 * 9)), rel=0.02
    )
    dense = layers.dense(100, 300)
    assert dense.weight.var().item() == pytest.approx(1 / 200, rel=0.03)
    assert not dense.bias.any()
    torch.manual_seed(0)
    assert torch.equal(layers.convolution(64, 128, 3).weight, weight)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (32, 8), (96, 24), (128, 32), (384, 32), (512, 32)])
def test_group_norm_groups(channels: int, groups: int) -> None:
    assert layers.group_norm(channels).num_groups == groups


@pytest.mark.parametrize("channels", [3, 9, 144])
def test_group_norm_names_the_argument(channels: int) -> None:
    with pytest.raises(ValueError, match="channels"):
        layers.group_norm(channels)


def test_dropout_layers_are_numbered_in_module_order() -> None:
    network = nn.Sequential(KeyedDropout(0.1), nn.Sequential(nn.ReLU(), KeyedDropout(0.1)), KeyedDropout(0.1))
    layers.number_dropout_layers(network)
    assert [m.index for m in network.modules() if isinstance(m, KeyedDropout)] == [0, 1, 2]
