"""Text encoders: a transformer, and what turns cosines of a contrastive pair into logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lzn_dist.models.layers import KeyedDropout, attention, number_dropout_layers


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): a transformer's block with the norms first (GPT-2's).

    causal: a token sees those before it alone.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop_1, self.drop_2 = KeyedDropout(dropout), KeyedDropout(dropout)

    def forward(self, x: Tensor, present: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """x [b, l, width], present bool [b, l] (which tokens count) → the same shape. key int64 [b] for dropout."""
        return self._add(x, attention(*self._qkv(x), present=present, causal=self.causal), key)

    def extend(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As forward of a causal block, for tokens x [b, l, width] behind those whose keys and values past are
        [b, past, heads, dim]; returns also those of all."""
        q, k, v = self._qkv(x)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        return self._add(x, attention(q, k, v, causal=True), None), (k, v)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each [b, l, heads, dim]."""
        found: Tensor = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        return found.unbind(2)

    def _add(self, x: Tensor, attended: Tensor, key: Tensor | None) -> Tensor:
        x = x + self.drop_1(self.out(attended.flatten(2)), key)
        added: Tensor = x + self.drop_2(self.down(F.gelu(self.up(self.norm_2(x)))), key)
        return added


def initialise(network: nn.Module, depth: int) -> None:
    """GPT-2's initial weights: N(0, 0.02²), those that end a residual branch by √(2 depth) smaller; biases 0."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            last = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if last else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def check_sizes(**sizes: int) -> None:
    """ValueError, naming the first that is not positive."""
    for name, number in sizes.items():
        if number < 1:
            raise ValueError(f"{name}: a positive number is needed, not {number}")


def check_tokens(tokens: Tensor, most: int) -> Tensor:
    """Which tokens count, bool [b, l]; the first does also where a text has none, as attention over nothing has no
    value. Raises ValueError for another shape or type than int64 [b, 1 to most]."""
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not 0 < tokens.shape[1] <= most:
        raise ValueError(f"tokens: int64 [b, 1 to {most}] is needed, not {tokens.dtype} {list(tokens.shape)}")
    return (tokens >= 0) | (torch.arange(tokens.shape[1], device=tokens.device) == 0)


def pooled(states: Tensor, present: Tensor, pool: str) -> Tensor:
    """What stands for a text [b, width] of its tokens' states [b, l, width]: the mean of those present, the first or
    the last."""
    if pool == "first":
        return states[:, 0]
    if pool == "last":
        last = present.sum(1) - 1
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    counted = present[..., None].to(states.dtype)
    return (states * counted).sum(1) / counted.sum(1)


class TextEncoder(nn.Module):
    """Tokens → anchors, by a transformer whose tokens see each other and whose last layer's are averaged."""

    batch_independent: bool = True
    takes_tokens: bool = True

    def __init__(
        self,
        *,
        vocabulary: int,
        text_length: int = 32,
        latent_dim: int = 256,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        pool: Literal["mean", "first", "last"] = "mean",
        dropout: float = 0.0,
    ) -> None:
        """vocabulary: tokens are below it. text_length: most tokens. width: of a token's vector; depth: blocks. pool:
        what stands for a text, its tokens' mean or one of them. Raises ValueError, naming the argument."""
        super().__init__()
        check_sizes(vocabulary=vocabulary, text_length=text_length, latent_dim=latent_dim, depth=depth, heads=heads)
        if width < 1 or width % heads:
            raise ValueError(f"width: a multiple of heads ({heads}) is needed, not {width}")
        if pool not in ("mean", "first", "last"):
            raise ValueError(f"pool: 'mean', 'first' or 'last' is needed, not {pool!r}")
        self.vocabulary, self.pool, self.feature_dim = vocabulary, pool, width
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(text_length, width)
        self.layers = nn.ModuleList([TransformerBlock(width, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        # as the images' head it ends with a normalisation: anchors have a length of √D
        self.head = nn.Sequential(nn.Linear(width, latent_dim, bias=False), nn.LayerNorm(latent_dim))
        initialise(self, depth)
        number_dropout_layers(self)

    def features(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l], negative behind a text's end → [b, width]; key int64 [b] for dropout.

        What stands behind a text's end makes no difference; one without any token has some finite features. Raises
        ValueError for another shape or type, or more tokens than text_length.
        """
        present = check_tokens(tokens, self.places.num_embeddings)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens.clamp(min=0)) + self.places(places)
        for layer in self.layers:
            x = layer(x, present, key)
        return pooled(self.norm(x), present, self.pool)

    def forward(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l] → anchors [b, latent_dim]; as `features`."""
        anchors: Tensor = self.head(self.features(tokens, key))
        return anchors

    def blocks(self) -> list[nn.Module]:
        """The units of sharding and recomputation."""
        return list(self.layers)


Past = list[tuple[Tensor, Tensor]]


class TextDecoder(nn.Module):
    """Latents → captions: a causal transformer that reads the latent as its first tokens.

    Its own vocabulary has one token more than the text's, the end: number ``vocabulary``.
    """

    batch_independent: bool = True

    def __init__(
        self,
        *,
        vocabulary: int,
        text_length: int = 32,
        latent_dim: int = 256,
        num_classes: int = 0,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        prefix: int = 2,
        dropout: float = 0.0,
    ) -> None:
        """prefix: tokens that the latent becomes. num_classes: labels are given besides the latent; 0: none. Raises
        ValueError, naming the argument."""
        super().__init__()
        check_sizes(vocabulary=vocabulary, text_length=text_length, latent_dim=latent_dim, depth=depth, heads=heads,
                    prefix=prefix)  # fmt: skip
        if width < 1 or width % heads:
            raise ValueError(f"width: a multiple of heads ({heads}) is needed, not {width}")
        self.vocabulary, self.text_length, self.num_classes, self.width = vocabulary, text_length, num_classes, width
        self.prefix = nn.Linear(latent_dim + num_classes, prefix * width)
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(prefix + text_length, width)
        self.layers = nn.ModuleList([TransformerBlock(width, heads, dropout, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary + 1)
        initialise(self, depth)
        nn.init.normal_(self.prefix.weight, std=(latent_dim + num_classes) ** -0.5)
        number_dropout_layers(self)

    def forward(
        self, tokens: Tensor, latents: Tensor, labels: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """tokens int64 [b, l], latents [b, latent_dim], labels int64 [b] where num_classes > 0 (negative: none), key
        int64 [b] for dropout → logits [b, l + 1, vocabulary + 1] of the first token, and of that behind each."""
        read = self._read(latents, labels)
        x = torch.cat((read, self.tokens(tokens.clamp(min=0)).to(read.dtype)), 1)
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            x = layer(x, None, key)
        logits: Tensor = self.head(self.norm(x[:, read.shape[1] - 1 :]))
        return logits

    def begin(self, latents: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Past]:
        """Logits [b, vocabulary + 1] of the first token, and what `extend` needs of what was read."""
        return self._extend(self._read(latents, labels), [None] * len(self.layers), 0)

    def extend(self, tokens: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Logits [b, vocabulary + 1] of what stands behind tokens int64 [b], each behind its own past."""
        return self._extend(self.tokens(tokens)[:, None], list(past), past[0][0].shape[1])

    def _read(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """[b, prefix, width]. Raises ValueError for labels that are missing or superfluous."""
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(f"labels: this decoder has num_classes={self.num_classes}")
        if labels is not None:
            given = F.one_hot(labels.clamp(min=0), self.num_classes) * (labels >= 0)[:, None]
            latents = torch.cat((latents, given.to(latents.dtype)), 1)
        read: Tensor = self.prefix(latents).unflatten(1, (-1, self.width))
        return read

    def _extend(self, x: Tensor, past: list[tuple[Tensor, Tensor] | None], start: int) -> tuple[Tensor, Past]:
        x = x + self.places(torch.arange(start, start + x.shape[1], device=x.device))
        kept = []
        for layer, own in zip(self.layers, past, strict=True):
            x, new = layer.extend(x, own)  # type: ignore[operator]
            kept.append(new)
        logits: Tensor = self.head(self.norm(x[:, -1]))
        return logits, kept

    def blocks(self) -> list[nn.Module]:
        """The units of sharding and recomputation."""
        return list(self.layers)


class LogitScale(nn.Module):
    """Logarithm of a scale and a bias, both learned: [2]. CLIP starts at scale 1/0.07 (arXiv 2103.00020, section 2.5),
    SigLIP at scale 10, bias −10 (arXiv 2303.15343, section 3.2)."""

    def __init__(self, scale: float = 1 / 0.07, bias: float = 0.0) -> None:
        """Raises ValueError for a scale that is not positive."""
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: a positive number is needed, not {scale}")
        self.values = nn.Parameter(torch.tensor([math.log(scale), bias]))

    def forward(self) -> Tensor:
        # not the parameter itself: sharded engines take its storage away when the forward has ended
        return self.values.clone()

    def blocks(self) -> list[nn.Module]:
        return []
