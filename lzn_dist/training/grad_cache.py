"""Gradient caching: the global batch's coupling is exact while a rank has one micro-batch of activations in memory.

Encode without a graph, couple with a graph on the anchors alone, decode micro-batch by micro-batch (collecting the
latents' gradient), go back through the coupling to the anchors' gradients, encode each micro-batch again with a graph
and feed it its anchors' gradient (Gao et al. 2021, arXiv 2101.06983, for contrastive losses). Equal to the uncached
step: networks treat samples by themselves, and dropout is a function of sample and layer. The cost is one more forward
of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lzn_dist.config import ConfigError, DecodingConfig
from lzn_dist.engines.base import Engine
from lzn_dist.networks import Networks
from lzn_dist.objectives import Objective, Samples, View
from lzn_dist.objectives.base import loss_names
from lzn_dist.training.stopwatch import Stopwatch


def check_batch_independent(networks: Networks) -> None:
    """ConfigError for networks whose output for a sample depends on the others of its (micro-)batch."""
    for name, module in networks.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm or not getattr(module, "batch_independent", True):
            raise ConfigError(
                f"micro_batch needs networks without batch statistics, and {name} ({type(module).__name__}) has them: "
                "set micro_batch=0 or use group normalisation"
            )


def cached_backward(
    engine: Engine, objective: Objective, samples: Samples, micro_batch: int, watch: Stopwatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step's loss and parts, and its gradients in the engine; as one backward of `objective` would give them."""
    chunks = samples.parts(micro_batch)
    if engine.touches_first:
        engine.backward(lambda networks: (_touch(objective, networks, samples), None), last=False)

    def encode(chunk: Samples, view: View) -> Tensor:
        return engine.forward(lambda networks: objective.encode(networks, chunk, view))

    views = objective.needs.encodes
    anchors = {view: torch.cat([encode(chunk, view) for chunk in chunks]) for view in views}
    tables = engine.forward(lambda networks: objective.tables(networks, samples))
    leaves = [*anchors.values(), *tables.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    related = objective.relate(anchors, tables, samples)

    outputs, cotangents = ([], []) if related.loss is None else ([related.loss], [torch.ones_like(related.loss)])
    decoded: dict[str, Tensor] = {}
    decodes = objective.needs.decodes
    for name, decoding, latents, shares in zip(
        loss_names(decodes), decodes, related.latents, related.shares, strict=True
    ):
        decoded[name], latent_grads = _decode(
            engine, objective, decoding, chunks, latents.detach(), shares, len(decoded) + 1 == len(decodes)
        )
        if latents.requires_grad:
            outputs, cotangents = [*outputs, latents], [*cotangents, latent_grads]
    total, parts = related.assembled(decoded)
    with watch("backward"):
        grads = (
            dict(zip([*anchors, *tables], torch.autograd.grad(outputs, leaves, cotangents), strict=True))
            if leaves
            else {}
        )

    if tables:
        engine.backward(
            lambda networks: (_inner(objective.tables(networks, samples), grads), None),
            last=not views and not engine.touches_last,
        )
    for view in views:
        for chunk, grad in zip(chunks, grads[view].split(micro_batch), strict=True):
            last = view == views[-1] and chunk is chunks[-1] and not engine.touches_last
            engine.backward(
                lambda networks, c=chunk, v=view, g=grad: (_inner({v: objective.encode(networks, c, v)}, {v: g}), None),  # type: ignore[misc]
                last=last,
            )
    if engine.touches_last:
        engine.backward(lambda networks: (_touch(objective, networks, samples), None))
    return total.detach(), parts


def _decode(
    engine: Engine,
    objective: Objective,
    decoding: DecodingConfig,
    chunks: list[Samples],
    latents: Tensor,
    shares: Tensor | None,
    last_decoding: bool,
) -> tuple[Tensor, Tensor]:
    """The decoder's loss over all samples, and its gradient by the latents [b, D]."""
    total = latents.new_zeros(())
    grads: list[Tensor] = []
    needs = objective.needs
    size = len(chunks[0])
    weights = [None] * len(chunks) if shares is None else shares.split(size)
    for chunk, part, held in zip(chunks, latents.split(size), weights, strict=True):
        own, weight = part.clone().requires_grad_(), len(chunk) / len(latents)

        def loss(
            networks: Networks, own: Tensor = own, chunk: Samples = chunk, weight: float = weight,
            held: Tensor | None = held,
        ) -> tuple[Tensor, None]:  # fmt: skip
            return objective.decode(networks, chunk, decoding, own, held) * weight, None

        # where nothing is encoded, this is the step's last backward
        alone = not needs.encodes and not needs.tables and last_decoding
        value, _ = engine.backward(loss, last=alone and chunk is chunks[-1] and not engine.touches_last)
        assert own.grad is not None
        total = total + value
        grads.append(own.grad)
    return total, torch.cat(grads)


def _inner(values: Mapping[Any, Tensor], cotangents: Mapping[Any, Tensor]) -> Tensor:
    """A scalar whose gradient by the values are the cotangents."""
    return torch.stack([(value * cotangents[name]).sum() for name, value in values.items()]).sum()


def _touch(objective: Objective, networks: Networks, samples: Samples) -> Tensor:
    """0, with a gradient of 0 for every parameter: one sample through every network."""
    one, needs = samples.part(slice(0, 1)), objective.needs
    like = torch.float64 if objective.config.precision == "float64" else torch.float32
    reached = list(objective.tables(networks, one).values())
    encoded = {view.modality: objective.encode(networks, one, view) for view in needs.encodes if view.number == 0}
    for decoding in {decoding.what: decoding for decoding in needs.decodes}.values():
        size = objective.config.latent.dim if needs.latents else 0
        latents = torch.zeros(1, size, device=one.index.device, dtype=like)
        reached.append(objective.decode(networks, one, decoding, latents))
    return torch.stack([0.0 * value.sum() for value in [*encoded.values(), *reached]]).sum()
