"""The stages that all objectives share.

**encode** (networks, each sample by itself) → **relate** (all samples of the global batch, no trained network) →
**decode** (networks, each sample by itself). One forward runs them one after the other; gradient caching
(`lzn_dist.training.grad_cache`) runs the outer two in micro-batches. An objective declares what it needs (`Needs`), and
says how it relates.

An objective sees this rank's samples, and what the other ranks encoded through `gather`; its losses are means over the
rank's samples (see `gather_anchors` for why that is right). It knows no process group and no engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lzn_dist.config import Config, ConfigError, DecodingConfig
from lzn_dist.keyed_random import make_key, normal, uniform
from lzn_dist.modalities import Modality, Network, modality
from lzn_dist.networks import Networks


class View(NamedTuple):
    """A view of a data type's samples, numbered from 0; written image.1 for the first, image for the only one."""

    modality: str
    number: int = 0

    @staticmethod
    def of(text: str) -> View:
        """Raises ConfigError."""
        name, dot, number = text.partition(".")
        if not name or (dot and not (number.isascii() and number.isdigit() and int(number) > 0)):
            raise ConfigError(f"{text!r} is no view: write image, or image.1, image.2")
        return View(name, int(number) - 1 if dot else 0)


@dataclass(frozen=True)
class Needs:
    """What an objective declares, from the configuration alone.

    encodes: what is encoded with gradients, in this order. tables: data types whose anchors are a table (labels).
    decodes: what is decoded. labels: of the samples. augmented: the views are augmentations. latents: the decoders are
    conditioned on latents. logits: the encoder's output are those of the classes. without_gradient: what is encoded
    besides.
    """

    encodes: tuple[View, ...] = ()
    tables: tuple[str, ...] = ()
    decodes: tuple[DecodingConfig, ...] = ()
    labels: bool = False
    augmented: bool = False
    latents: bool = True
    logits: bool = False
    without_gradient: tuple[View, ...] = ()

    @property
    def networks(self) -> list[tuple[str, str]]:
        """(modality, role) of each network, in the order in which they are made and stepped."""
        encoders = list(dict.fromkeys(view.modality for view in self.encodes))
        decoders = list(dict.fromkeys(decoding.what for decoding in self.decodes))
        names = list(dict.fromkeys([*encoders, *decoders, *self.tables]))
        roles = {"encoder": {*encoders, *self.tables}, "decoder": set(decoders)}
        return [(name, role) for name in names for role, has in roles.items() if name in has]

    @property
    def modalities(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.networks))

    def views(self, name: str) -> int:
        """How many views of a data type's samples are encoded."""
        every = (*self.encodes, *self.without_gradient)
        return max((view.number + 1 for view in every if view.modality == name), default=0)

    @property
    def twice(self) -> bool:
        """Whether a step uses a network more than once."""
        used = [("encoder", view.modality) for view in self.encodes]
        used += [("decoder", decoding.what) for decoding in self.decodes]
        return len(set(used)) < len(used)

    @property
    def class_conditional(self) -> bool:
        return any(decoding.class_conditional for decoding in self.decodes)


@dataclass
class Samples:
    """This rank's share of a global batch, or a part of it.

    batch: number of the global batch in the run; with index it addresses every random number. index: int64 [b], the
    samples' numbers in the data set. position: int64 [b], where they stand in the global batch. inputs: by data type
    the views, [b, …] each (an image: [b, c, h, w] in [−1, 1]; text: tokens int64 [b, l]). labels: int64 [b], negative
    without one.
    """

    batch: int
    index: Tensor
    position: Tensor
    inputs: dict[str, tuple[Tensor, ...]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def view(self, view: View) -> Tensor:
        return self.inputs[view.modality][view.number]

    def part(self, rows: slice) -> Samples:
        """Some of the samples."""
        return replace(
            self,
            index=self.index[rows],
            position=self.position[rows],
            inputs={name: tuple(view[rows] for view in views) for name, views in self.inputs.items()},
            labels=self.labels[rows],
        )

    def parts(self, size: int) -> list[Samples]:
        """All of them, ``size`` at a time (0: at once)."""
        size = size or len(self)
        return [self.part(slice(start, start + size)) for start in range(0, len(self), size)]


@dataclass
class Related:
    """What becomes of the global batch's anchors.

    latents: for each decoding those [b, D] of the rank's samples that it is conditioned on ([b, 0]: none); loss: the
    part of the objective that needs no decoder, or None; parts: what is worth watching; shares: for each decoding the
    samples' weights [b] in its loss, where not all have what is decoded.
    """

    def __post_init__(self) -> None:
        self.shares = self.shares or (None,) * len(self.latents)

    latents: tuple[Tensor, ...]
    loss: Tensor | None
    parts: dict[str, Tensor]
    shares: tuple[Tensor | None, ...] = ()

    def assembled(self, decoded: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is optimised, with the decoders' by name, and its parts (detached)."""
        parts, total = {**self.parts, **decoded}, self.loss
        for loss in decoded.values():
            total = loss if total is None else loss + total
        assert total is not None
        return total, {name: value.detach() for name, value in parts.items()}


Gather = Callable[[Tensor], Tensor]
Weights = Callable[[str], Mapping[str, Tensor]]  # of a network: whole, by name within it, the same on every rank


class Objective(ABC):
    """A loss as a function of networks and samples. gather: [b, ...] → [N, ...] over ranks, differentiable."""

    def __init__(self, config: Config, gather: Gather) -> None:
        self.config, self.gather = config, gather
        self.needs = self.declare(config)
        self.modalities: dict[str, Modality] = {name: modality(name, config) for name in self.needs.modalities}
        # where evaluation centres anchors, by data type [D]: measured for each checkpoint, and kept with it
        self.centres: dict[str, Tensor] = {}

    @classmethod
    @abstractmethod
    def declare(cls, config: Config) -> Needs:
        """What it needs. Raises ConfigError for a configuration that is not one of it."""

    def __call__(self, networks: Networks, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that is optimised, and its parts (detached); scalars, still on the device."""
        anchors = {view: self.encode(networks, samples, view) for view in self.needs.encodes}
        related = self.relate(anchors, self.tables(networks, samples), samples)
        decodes = self.needs.decodes
        given = zip(loss_names(decodes), decodes, related.latents, related.shares, strict=True)
        return related.assembled(
            {name: self.decode(networks, samples, what, latents, shares) for name, what, latents, shares in given}
        )

    def encode(self, networks: Networks, samples: Samples, view: View) -> Tensor:
        """The encoder's output [b, D] for a view, in float32 at least."""
        kind = self.modalities[view.modality]
        encoder = self._network(networks.find(view.modality, "encoder"))
        key = self._keys(kind.stream("dropout/encoder"), samples, view.number)
        anchors = kind.encode(encoder, samples.view(view), key)
        return anchors if anchors.dtype == torch.float64 else anchors.float()

    def tables(self, networks: Networks, samples: Samples) -> dict[str, Tensor]:
        """Anchors [K, D] of each data type that has a table of them; never autocast."""
        found = {}
        for name in self.needs.tables:
            encoder: Any = networks.find(name, "encoder")
            found[name] = self.modalities[name].encode(encoder, samples.labels, samples.index)
        return found

    @abstractmethod
    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        """anchors: [b, D] of each view that is encoded; tables: [K, D]. Collective where there are several ranks."""

    def decode(
        self, networks: Networks, samples: Samples, decoding: DecodingConfig, latents: Tensor,
        shares: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A decoder's weighted loss under the samples' latents [b, D], which have these shares [b] in the mean over
        samples: a scalar."""
        kind = self.modalities[decoding.what]
        labels = samples.labels if decoding.class_conditional else None
        if decoding.latent_dropout and latents.shape[1]:
            dropped = uniform(self._keys("latent_dropout", samples), (1,), latents.dtype) < decoding.latent_dropout
            drawn = normal(self._keys("latent_dropped", samples), latents.shape[1:], latents.dtype)
            latents = torch.where(dropped, drawn, latents)
        if decoding.condition_dropout:
            keys = self._keys("condition_dropout", samples)
            dropped = uniform(keys, (), latents.dtype) < decoding.condition_dropout
            latents = latents.masked_fill(dropped[:, None], 0.0)
            labels = None if labels is None else labels.masked_fill(dropped, -1)
        loss = kind.decoding_loss(
            self._network(networks.find(decoding.what, "decoder")), samples.view(View(decoding.what)), latents, labels,
            lambda stream: self._keys(kind.stream(stream), samples), shares,
        )  # fmt: skip
        return loss if decoding.weight == 1.0 else loss * decoding.weight

    def after_step(self, weights: Weights) -> None:  # noqa: B027
        """After an optimiser step that was taken; nothing for most. Collective."""

    def state(self) -> dict[str, Tensor]:
        """What an objective remembers from step to step: whole tensors, the same on every rank, written into when a
        run is resumed; nothing for most."""
        return {}

    def advice(self) -> list[str]:
        """What a user should know of these settings before a long run; a line each."""
        return []

    def present(self, samples: Samples, *names: str) -> Tensor | None:
        """Bool [b]: which samples have data of all these types; None: all have."""
        if not self.config.data.partial:
            return None
        found = [self.modalities[name].present(samples.view(View(name))) for name in dict.fromkeys(names)]
        there = [own for own in found if own is not None]
        return torch.stack(there).all(0) if there else None

    def shares(self, present: Tensor | None, like: Tensor) -> Tensor | None:
        """Weights [b], of a tensor's type, that make a mean over samples one over those that are present in the global
        batch. Collective where there are some to leave out."""
        if present is None:
            return None
        everyone = self.gather(present)
        return present * (len(everyone) / everyone.sum().clamp(min=1).to(like.dtype))

    def same(self, samples: Samples, *names: str) -> Tensor | None:
        """int64 [b], equal where samples of these data types are to have one target; None: each has its own."""
        for name in names:
            view = samples.inputs.get(name)
            found = None if view is None else self.modalities[name].same(view[0])
            if found is not None:
                present = self.present(samples, name)
                return found if present is None else torch.where(present, found, -1 - samples.position)
        return None

    def watched(self, samples: Samples) -> dict[str, Tensor]:
        """What is worth watching of the samples themselves."""
        return {
            key: value
            for view in self.needs.encodes
            for key, value in self.modalities[view.modality].watched(samples.view(view)).items()
        }

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _keys(self, stream: str, samples: Samples, *more: int) -> Tensor:
        """A key a sample: int64 [b]."""
        return make_key(self.config.seed, stream, samples.batch, samples.index, *more)

    def _network(self, network: nn.Module | None) -> Network:
        """Networks alone run in bfloat16: their weights, the zones and the losses stay in float32."""
        assert network is not None

        def forward(*inputs: Any, **more: Any) -> Tensor:
            like = next(value for value in inputs if isinstance(value, Tensor))
            with torch.autocast(like.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                output: Tensor = network(*inputs, **more)
            return output

        return forward


def loss_names(decodes: Sequence[DecodingConfig]) -> list[str]:
    """Under which each decoder's loss is watched; a data type that is decoded again is numbered."""
    found: list[str] = []
    for place, decoding in enumerate(decodes):
        before = sum(other.what == decoding.what for other in decodes[:place])
        name = "loss_flow" if decoding.what == "image" else f"loss_{decoding.what}"
        found.append(f"{name}_{before + 1}" if before else name)
    return found
