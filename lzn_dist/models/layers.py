"""The layers of the networks: attention, keyed dropout, resampling, time embeddings, NCSN++'s initialisation.

Sources: Song et al. 2021 (score-based SDEs, appendix H: NCSN++) and, for the names of parameters, the published
state dicts of arXiv 2509.15591.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.keyed_random import fold, uniform

memory_efficient_attention: Any = None
with suppress(ImportError, OSError):  # not installed, or built for another torch
    memory_efficient_attention = import_module("xformers.ops").memory_efficient_attention


@functools.cache
def _tell_of_torch(why: str) -> None:
    """Once a process and reason: xformers has no kernel."""
    warnings.warn(f"attention by torch instead of xformers: {why}", stacklevel=3)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, present: Tensor | None = None, causal: bool = False
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ / √dim) v over the tokens, each sample and head by itself.

    q [b, tokens, heads, dim], k and v [b, other tokens, heads, dim]; returns [b, tokens, heads, dim]. present: bool
    [b, other tokens], which of them count, one at least. causal: token i sees the others up to i, counted from the end
    where there are more of them. On CUDA by xformers where it is installed and has a kernel for the type and size, else
    by torch.
    """
    bias = _bias(q, k, present, causal)
    if (
        memory_efficient_attention is not None
        and q.is_cuda
        and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
    ):
        try:
            whole = None if bias is None else _aligned(bias.expand(len(q), q.shape[2], q.shape[1], k.shape[1]))
            attended: Tensor = memory_efficient_attention(q, k, v, attn_bias=whole)
            return attended
        except NotImplementedError as error:
            _tell_of_torch(str(error).strip().splitlines()[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # torch has the heads before the tokens
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _bias(q: Tensor, k: Tensor, present: Tensor | None, causal: bool) -> Tensor | None:
    """What is added to the scores [b, heads, tokens, other tokens], broadcast: 0 or −inf; None: nothing."""
    tokens, others = q.shape[1], k.shape[1]
    allowed: Tensor | None = None if present is None else present[:, None, None, :]
    if causal and tokens > 1:
        past = torch.ones(tokens, others, dtype=torch.bool, device=q.device).tril(others - tokens)
        allowed = past if allowed is None else allowed & past
    if allowed is None:
        return None
    return torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~allowed, -math.inf)


def _aligned(bias: Tensor) -> Tensor:
    """The same in rows of memory that begin at multiples of 8 numbers, as xformers' kernels load them."""
    others = bias.shape[-1]
    room = bias.new_empty(*bias.shape[:-1], -(-others // 8) * 8)
    room[..., :others] = bias
    return room[..., :others]


def _mask(key: Tensor, index: int, rate: float, shape: Sequence[int]) -> Tensor:
    """Bool [b, *shape]: what is kept."""
    return uniform(fold(key, index), shape) >= rate


# An operator of its own: inductor has no code for the generator's 64-bit constants.
_kept = torch.library.custom_op(
    "lzn_dist::kept", _mask, mutates_args=(), schema="(Tensor key, int index, float rate, SymInt[] shape) -> Tensor"
)


@functools.cache
def _gpus_mask() -> Callable[[Tensor, int, float, Sequence[int]], Tensor]:
    """A kernel of its own, where Triton is installed; not where this file stands alone, exported."""
    with suppress(ImportError):
        return import_module("lzn_dist.models.dropout_kernel").kept
    return _mask


@_kept.register_kernel("cuda")
def _(key: Tensor, index: int, rate: float, shape: Sequence[int]) -> Tensor:
    return _gpus_mask()(key, index, rate, shape)


@_kept.register_fake
def _(key: Tensor, index: int, rate: float, shape: Sequence[int]) -> Tensor:
    return key.new_empty((*key.shape, *shape), dtype=torch.bool)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of a key a sample and the layer's index, and of nothing else.

    So a sample meets the same mask in whatever micro-batch, on whatever rank, and when it is encoded a second
    time in the same step (gradient caching, activation checkpointing).
    """

    def __init__(self, rate: float, index: int = 0) -> None:
        """rate: share of elements set to 0, in [0, 1). index: see number_dropout_layers. Raises ValueError."""
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout: a rate in [0, 1) is needed, not {rate}")
        self.rate = rate
        self.index = index

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """x [b, ...], key int64 [b]; returns [b, ...]. Identity in evaluation mode.

        Raises ValueError in training mode with rate > 0 if key is missing or not int64 [b].
        """
        if not self.training or self.rate == 0.0:
            return x
        if key is None:
            raise ValueError(
                "key: dropout in training mode needs an int64 key a sample, [b]: "
                "pass key=make_key(seed, stream, step, sample_indices) to the network (lzn_dist.keyed_random)"
            )
        if key.dtype != torch.int64 or key.shape != x.shape[:1]:
            raise ValueError(f"key: int64 of shape [{x.shape[0]}] is needed, not {key.dtype} {list(key.shape)}")
        kept = _kept(key, self.index, self.rate, x.shape[1:])
        return (x * kept).div_(1.0 - self.rate)  # a mask of bytes is what the backward keeps

    def extra_repr(self) -> str:
        return f"rate={self.rate}, index={self.index}"


def number_dropout_layers(network: nn.Module) -> None:
    """Give the dropout layers of a network the indices 0, 1, 2, … in module order, so that their masks differ."""
    layers = (module for module in network.modules() if isinstance(module, KeyedDropout))
    for index, layer in enumerate(layers):
        layer.index = index


# ---------------------------------------------------------------- initialisation (score SDEs, as DDPM before it)


def fan_avg_uniform_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Variance scaling, in place: U(−s, s), s² = 3 scale / ((fan_in + fan_out)/2). scale 0 stands for 1e-10.

    weight [out, in, ...]: a dense layer's or a convolution's.
    """
    fan_avg = (weight.shape[0] + weight.shape[1]) / 2 * math.prod(weight.shape[2:])
    bound = math.sqrt(3.0 * (scale if scale > 0.0 else 1e-10) / fan_avg)
    return nn.init.uniform_(weight, -bound, bound)


def convolution(inputs: int, outputs: int, size: int, init_scale: float = 1.0) -> nn.Conv2d:
    """A convolution (odd size, same resolution) with NCSN++'s initialisation and zero bias."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    fan_avg_uniform_(layer.weight, init_scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # there is one
    return layer


def dense(inputs: int, outputs: int) -> nn.Linear:
    """A dense layer with NCSN++'s initialisation and zero bias."""
    layer = nn.Linear(inputs, outputs)
    fan_avg_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """GroupNorm of bfloat16 maps in bfloat16, also on a GPU under autocast; statistics are sums in float32.

    torch casts to float32 there and returns float32, which is kept for the backward and cast again by the convolution
    that follows: a step of ResNet-50 took more time and memory than all in float32 (tests/benchmarks/results/gpu.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm with min(channels // 4, 32) groups. Raises ValueError where these do not divide the channels."""
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"channels, channel_multipliers: a normalisation over {channels} channels cannot have {groups} equal "
            "groups; choose multiples of 4 up to 128 channels, of 32 above (skip connections add two levels' channels)"
        )
    return GroupNorm(groups, channels, eps=1e-6)


# ---------------------------------------------------------------- resampling by 2


def _fir_kernel(x: Tensor) -> Tensor:
    """The filter [1, 3, 3, 1] ⊗ [1, 3, 3, 1] / 64 for each channel of x: [c, 1, 4, 4].

    Computed where x is: neither a buffer to keep nor a copy from the host, which would wait for the device.
    """
    taps = 0.5 - (torch.arange(4, dtype=x.dtype, device=x.device) - 1.5).abs() * 0.25
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def downsample(x: Tensor, fir: bool) -> Tensor:
    """Halve the resolution: [b, c, h, w] → [b, c, h/2, w/2], by the FIR filter or the mean of 2×2."""
    if not fir:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _fir_kernel(x), stride=2, padding=1, groups=x.shape[1])


def upsample(x: Tensor, fir: bool) -> Tensor:
    """Double the resolution: [b, c, h, w] → [b, c, 2h, 2w], by the FIR filter or the nearest neighbour."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # the filter runs over the pixels with zeros between them; the factor 4 makes up for these
    return F.conv_transpose2d(x, 4.0 * _fir_kernel(x), stride=2, padding=1, groups=x.shape[1])


# ---------------------------------------------------------------- embeddings of the time


def positional_embedding(times: Tensor, dim: int, max_positions: float = 10_000.0) -> Tensor:
    """[sin(ω t), cos(ω t)] at dim/2 frequencies from 1 to 1/max_positions, geometrically: [b] → [b, dim], dim even."""
    half = dim // 2
    exponents = torch.arange(half, dtype=times.dtype, device=times.device) / max(half - 1, 1)
    phases = times[:, None] * torch.exp(-math.log(max_positions) * exponents)
    return torch.cat((phases.sin(), phases.cos()), dim=1)


class FourierEmbedding(nn.Module):
    """[sin(2π W s), cos(2π W s)] with fixed W ~ N(0, scale²): [b] → [b, 2 size] (Tancik et al. 2020)."""

    def __init__(self, size: int, scale: float = 16.0) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(size) * scale, requires_grad=False)

    def forward(self, s: Tensor) -> Tensor:
        phases = s[:, None] * self.W * (2.0 * math.pi)
        return torch.cat((phases.sin(), phases.cos()), dim=1)
