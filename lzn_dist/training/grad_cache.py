"""Gradient caching: the global batch's coupling is exact while a rank has one micro-batch of activations in memory.

Encode without a graph, couple with a graph on the anchors alone, decode micro-batch by micro-batch (collecting the
latents' gradient), go back through the coupling to the anchors' gradients, encode each micro-batch again with a graph
and feed it its anchors' gradient (Gao et al. 2021, arXiv 2101.06983, for contrastive losses). Equal to the uncached
step: networks treat samples by themselves, and dropout is a function of sample and layer. The cost is one more forward
of the encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lzn_dist.config import ConfigError
from lzn_dist.engines.base import Engine
from lzn_dist.networks import Networks
from lzn_dist.objectives import Objective, Samples
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

    def encode(chunk: Samples, view: int) -> Tensor:
        return engine.forward(lambda networks: objective.encode(networks, chunk, view))

    anchors = [torch.cat([encode(chunk, view) for chunk in chunks]) for view in range(objective.views)]
    labels = engine.forward(objective.label_anchors)
    leaves = [*anchors] if labels is None else [*anchors, labels]
    for leaf in leaves:
        leaf.requires_grad_()
    coupling = objective.couple(anchors, labels, samples)

    outputs, cotangents = ([], []) if coupling.loss is None else ([coupling.loss], [torch.ones_like(coupling.loss)])
    flow = None
    if objective.decodes:
        flow, latent_grads = _decode(engine, objective, chunks, coupling.latents.detach())
        outputs, cotangents = [*outputs, coupling.latents], [*cotangents, latent_grads]
    total, parts = coupling.assembled(flow)
    with watch("backward"):
        grads = torch.autograd.grad(outputs, leaves, cotangents) if leaves else ()

    if labels is not None:
        engine.backward(lambda networks: (_inner(objective.label_anchors(networks), grads[-1]), None), last=False)
    for view in range(objective.views):
        for chunk, grad in zip(chunks, grads[view].split(micro_batch), strict=True):
            last = view == objective.views - 1 and chunk is chunks[-1] and not engine.touches_last
            engine.backward(
                lambda networks, c=chunk, v=view, g=grad: (_inner(objective.encode(networks, c, v), g), None),  # type: ignore[misc]
                last=last,
            )
    if engine.touches_last:
        engine.backward(lambda networks: (_touch(objective, networks, samples), None))
    return total.detach(), parts


def _decode(engine: Engine, objective: Objective, chunks: list[Samples], latents: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's loss over all samples, and its gradient by the latents [b, D]."""
    total = latents.new_zeros(())
    grads: list[Tensor] = []
    for chunk, part in zip(chunks, latents.split(len(chunks[0])), strict=True):
        own, weight = part.clone().requires_grad_(), len(chunk) / len(latents)

        def loss(
            networks: Networks, own: Tensor = own, chunk: Samples = chunk, weight: float = weight
        ) -> tuple[Tensor, None]:
            return objective.decode(networks, chunk, own) * weight, None

        # where nothing is encoded, this is the step's last backward
        last = not objective.views and chunk is chunks[-1] and not engine.touches_last
        value, _ = engine.backward(loss, last=last)
        assert own.grad is not None
        total = total + value
        grads.append(own.grad)
    return total, torch.cat(grads)


def _inner(value: Tensor | None, cotangent: Tensor) -> Tensor:
    """A scalar whose gradient by value is the cotangent."""
    assert value is not None
    return (value * cotangent).sum()


def _touch(objective: Objective, networks: Networks, samples: Samples) -> Tensor:
    """0, with a gradient of 0 for every parameter: one sample through every network."""
    one = samples.part(slice(0, 1))
    reached = [objective.encode(networks, one, 0)] if objective.views else []
    if (labels := objective.label_anchors(networks)) is not None:
        reached.append(labels)
    if objective.decodes:
        latents = reached[0].detach() if objective.views else one.views[0].new_zeros(1, 0)
        reached.append(objective.decode(networks, one, latents))
    return torch.stack([0.0 * value.sum() for value in reached]).sum()
