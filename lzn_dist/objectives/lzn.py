"""LZN's objective: latent computation, latent alignment, decoders (arXiv 2509.15591, sections 3.1 to 3.3).

One objective for all tasks: what is aligned with what (`alignment.pairs`) and what is decoded from whose latents
(`decode`) are settings. Generation: decode the images from their latents. Representation: align two views of an image.
Joint: align the images with the labels, and decode them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lzn_dist.config import Config, ConfigError, PairConfig
from lzn_dist.keyed_random import normal
from lzn_dist.modalities import MODALITIES
from lzn_dist.networks import Networks
from lzn_dist.objectives.base import Gather, Needs, Objective, Related, Samples, View
from lzn_dist.zones import FieldFactory, align, alignment_loss, compute_latents


def _is_table(name: str) -> bool:
    return name in MODALITIES and MODALITIES[name].table


class LZN(Objective):
    """field: makes the zones' field of this rank's block of anchors, where these are not gathered (None: of all
    anchors)."""

    def __init__(self, config: Config, gather: Gather, field: FieldFactory | None = None) -> None:
        super().__init__(config, gather)
        self.field = field
        self.pairs = [(View.of(pair.latents), View.of(pair.anchors), pair) for pair in config.alignment.pairs]

    @classmethod
    def declare(cls, config: Config) -> Needs:
        used: list[View] = []
        for pair in config.alignment.pairs:
            latents, anchors = View.of(pair.latents), View.of(pair.anchors)
            if latents == anchors:
                raise ConfigError(f"alignment.pairs: {pair.latents} is in its own zones without being aligned")
            used += [latents, anchors]
        used += [View.of(decoding.latents) for decoding in config.decode]
        if not used:
            raise ConfigError("objective=lzn has nothing to learn: alignment.pairs and decode are empty")
        views = tuple(dict.fromkeys(used))
        encodes = tuple(view for view in views if not _is_table(view.modality))
        tables = tuple(dict.fromkeys(view.modality for view in views if _is_table(view.modality)))
        return Needs(
            encodes, tables, config.decode,
            labels=bool(tables) or any(decoding.class_conditional for decoding in config.decode),
            augmented=any(view.number for view in encodes),
        )  # fmt: skip

    def advice(self) -> list[str]:
        paired = any(_is_table(view.modality) for latents, zones, _ in self.pairs for view in (latents, zones))
        return [
            f"advice: {decoding.what}s are decoded from a label and a latent, and drawn from a label and any latent: "
            "of digits 68 % showed their class so. A pair with label in alignment.pairs makes the two agree; without "
            "one, latent_dropout: 0.5 in decode gave 98 %, latent.noise_scale=1 88 %"
            for decoding in self.needs.decodes
            if decoding.class_conditional
            and not decoding.latent_dropout
            and not paired
            and not _is_table(View.of(decoding.latents).modality)
        ]

    def encode(self, networks: Networks, samples: Samples, view: View) -> Tensor:
        return self.modalities[view.modality].scaled(super().encode(networks, samples, view))

    def tables(self, networks: Networks, samples: Samples) -> dict[str, Tensor]:
        return {name: self.modalities[name].scaled(table) for name, table in super().tables(networks, samples).items()}

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        everyone = {view: own if self.field is not None else self.gather(own) for view, own in anchors.items()}
        latents: dict[View, Tensor] = {}

        def latents_of(view: View) -> Tensor:
            if view not in latents:
                if view.modality in tables:
                    table = tables[view.modality]
                    latents[view] = self._latents(table[samples.labels], table, samples.labels, samples, None)
                else:
                    latents[view] = self._latents(anchors[view], everyone[view], samples.position, samples, self.field)
            return latents[view]

        losses, reached, weights = [], [], []
        for source, zones, pair in self.pairs:
            if zones.modality in tables:
                table = tables[zones.modality].to(latents_of(source).dtype)
                # every rank has all of a table's anchors: their field is never a ring
                loss, hit = self._alignment(
                    latents_of(source), table, samples.labels, self._class_weights(table, samples), None, pair
                )
            else:
                loss, hit = self._alignment(
                    latents_of(source), everyone[zones], samples.position, None, self.field, pair
                )
            losses.append(loss)
            reached.append(hit)
            weights.append(pair.weight)
        given = tuple(latents_of(View.of(decoding.latents)) for decoding in self.needs.decodes)
        if not losses:
            return Related(given, None, {})
        total = sum(
            (weight * loss for weight, loss in zip(weights[1:], losses[1:], strict=True)), weights[0] * losses[0]
        )
        parts = {"loss_alignment": torch.stack(losses).mean(), "aligned": torch.stack(reached).mean()}
        return Related(given, total, parts)

    def _latents(
        self, anchors: Tensor, everyone: Tensor, index: Tensor, samples: Samples, field: FieldFactory | None
    ) -> Tensor:
        latent = self.config.latent
        noise = normal(self._keys("latent", samples), (latent.dim,), anchors.dtype) * latent.noise_scale
        return compute_latents(
            anchors, noise, everyone, index=index, solver=latent.solver, steps=latent.steps,
            backend=self.config.backend, store_every=self.config.flow_store_every, field=field,
        )  # fmt: skip

    def _alignment(
        self, latents: Tensor, anchors: Tensor, targets: Tensor, log_weights: Tensor | None,
        field: FieldFactory | None, pair: PairConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The alignment loss, and the fraction of latents that end nearest to their target at the last step."""
        settings = self.config.alignment
        result = align(
            latents, anchors, targets, log_weights=log_weights, steps=settings.steps, backend=self.config.backend,
            store_every=self.config.flow_store_every, field=field,
        )  # fmt: skip
        loss = alignment_loss(
            result.log_probs, cutoff=settings.cutoff, kind=settings.kind, over=pair.over, temperature=pair.temperature
        )
        reached = (result.log_probs[-1].detach() > -0.6931).to(loss.dtype).mean()  # w_target > 1/2
        return loss, reached

    def _class_weights(self, table: Tensor, samples: Samples) -> Tensor | None:
        """Log-frequencies [K] of the global batch's labels, where these count."""
        if not self.config.alignment.class_weights:
            return None
        labels = self.gather(samples.labels)  # not torch.bincount, which would wait for the largest of them
        counts = table.new_zeros(len(table)).index_add_(0, labels, table.new_ones(len(labels)))
        return (counts / counts.sum()).log()
