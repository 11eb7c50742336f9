"""LZN's objective: latent computation, latent alignment, decoders (arXiv 2509.15591, sections 3.1 to 3.3).

One objective for all tasks: what is aligned with what (`alignment.pairs`) and what is decoded from whose latents
(`decode`) are settings. Generation: decode the images from their latents. Representation: align two views of an image.
Joint: align the images with the labels, and decode them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lzn_dist.config import Config, ConfigError, PairConfig
from lzn_dist.keyed_random import normal
from lzn_dist.modalities import MODALITIES
from lzn_dist.modalities.base import shared_mean
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
        encoded = {view.modality for view in self.needs.encodes}
        self.centres = {
            name: torch.zeros(config.latent.dim) for name, kind in self.modalities.items()
            if kind.centred and name in encoded
        }  # fmt: skip

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
        lengths = [
            f"advice: (alignment.steps - 1) x modalities.{zones.modality}.anchor_norm is {reach:g}, an inverse "
            "temperature; with captions 3.5 to 8 could be learned, 14 and more lost all but the main word"
            for latents, zones, _ in self.pairs
            if "text" in (latents.modality, zones.modality) and not _is_table(zones.modality)
            and not 2 <= (reach := self._reach(zones)) <= 12
        ]  # fmt: skip
        paired = any(_is_table(view.modality) for latents, zones, _ in self.pairs for view in (latents, zones))
        return lengths + [
            f"advice: {decoding.what}s are decoded from a label and a latent, and drawn from a label and any latent: "
            "of digits 68 % showed their class so. A pair with label in alignment.pairs makes the two agree; without "
            "one, latent_dropout: 0.5 in decode gave 98 %, latent.noise_scale=1 88 %"
            for decoding in self.needs.decodes
            if decoding.class_conditional
            and not decoding.latent_dropout
            and not paired
            and not _is_table(View.of(decoding.latents).modality)
        ]

    def _reach(self, zones: View) -> float:
        """The largest r of alignment times the anchors' length; of encoders whose outputs are normalised, √D."""
        norm = self.modalities[zones.modality].norm or self.config.latent.dim**0.5
        return (self.config.alignment.steps - 1) * norm

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        parts = self._watch(anchors, samples)
        anchors, tables = self._placed(anchors, tables, samples)
        everyone = {view: own if self.field is not None else self.gather(own) for view, own in anchors.items()}
        latents: dict[View, Tensor] = {}

        def latents_of(view: View) -> Tensor:
            if view not in latents:
                if view.modality in tables:
                    table, labels = tables[view.modality], self._labels(samples)
                    latents[view] = self._latents(table[labels], table, labels, samples, None, None)
                else:
                    latents[view] = self._latents(
                        anchors[view], everyone[view], samples.position, samples, self.field,
                        self._absent(view.modality, samples, anchors[view]),
                    )  # fmt: skip
            return latents[view]

        losses, reached, weights = [], [], []
        for source, zones, pair in self.pairs:
            shares = self.shares(self.present(samples, source.modality, zones.modality), latents_of(source))
            if zones.modality in tables:
                table = tables[zones.modality].to(latents_of(source).dtype)
                # every rank has all of a table's anchors: their field is never a ring
                loss, hit = self._alignment(
                    latents_of(source), table, self._labels(samples), self._class_weights(table, samples), None, None,
                    shares, pair,
                )  # fmt: skip
            else:
                loss, hit = self._alignment(
                    latents_of(source), everyone[zones], samples.position,
                    self._absent(zones.modality, samples, anchors[zones]),
                    self._spread(self.same(samples, zones.modality, source.modality)), self.field, shares, pair,
                )  # fmt: skip
            losses.append(loss)
            reached.append(hit)
            weights.append(pair.weight)
        sources = [View.of(decoding.latents) for decoding in self.needs.decodes]
        given = tuple(
            latents_of(view) if decoding.point == "latent"
            else tables[view.modality][self._labels(samples)] if view.modality in tables else anchors[view]
            for view, decoding in zip(sources, self.needs.decodes, strict=True)
        )  # fmt: skip
        shared = tuple(
            self.shares(self.present(samples, view.modality, decoding.what), of)
            for view, decoding, of in zip(sources, self.needs.decodes, given, strict=True)
        )
        if not losses:
            return Related(given, None, parts, shared)
        total = sum(
            (weight * loss for weight, loss in zip(weights[1:], losses[1:], strict=True)), weights[0] * losses[0]
        )
        parts |= {"loss_alignment": torch.stack(losses).mean(), "aligned": torch.stack(reached).mean()}
        return Related(given, total, parts, shared)

    def _placed(
        self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples
    ) -> tuple[dict[View, Tensor], dict[str, Tensor]]:
        """The anchors where they are coupled: around the mean of those of their data type in the global batch (of all
        its views), and of the length that the configuration says."""
        centres: dict[str, Tensor | None] = {name: None for name, kind in self.modalities.items() if not kind.centred}
        centres |= {name: table.mean(0) for name, table in tables.items() if name not in centres}
        for name in {view.modality: None for view in anchors}:
            if name not in centres:
                centres[name] = self._centre(
                    [own for view, own in anchors.items() if view.modality == name], name, samples
                )
        return (
            {view: self.modalities[view.modality].placed(own, centres[view.modality]) for view, own in anchors.items()},
            {name: self.modalities[name].placed(table, centres[name]) for name, table in tables.items()},
        )

    def _centre(self, views: list[Tensor], name: str, samples: Samples) -> Tensor:
        """[D], of the samples that are present in the global batch. Collective, in the backward too."""
        total = torch.stack(views).sum(0)
        present = self.present(samples, name)
        if present is not None:
            total = total * present[:, None]
        sums = self.gather(total.sum(0, keepdim=True))
        if present is None:
            return sums.sum(0) / (len(sums) * len(total) * len(views))
        return sums.sum(0) / (self.gather(present).sum().clamp(min=1) * len(views))

    @torch.no_grad()
    def _watch(self, anchors: Mapping[View, Tensor], samples: Samples) -> dict[str, Tensor]:
        """Of this rank's anchors, where two data types are aligned that have encoders: how far they lie from their
        centre (a root mean square), the mean cosine between two of a type (1: all in one direction), and the mean
        cosine of true pairs around the centres."""
        parts = self.watched(samples)
        across = [(a, b) for a, b, _ in self.pairs if a.modality != b.modality and a in anchors and b in anchors]
        if not across:
            return parts
        centred = {view: own - own.mean(0) for view, own in anchors.items()}
        for view in dict.fromkeys(view for pair in across for view in pair):
            parts[f"spread_{view.modality}"] = centred[view].square().sum(1).mean().sqrt()
            parts[f"cosine_{view.modality}"] = F.normalize(anchors[view], dim=1).mean(0).square().sum()
        first, second = across[0]
        parts["cosine_pairs"] = F.cosine_similarity(centred[first], centred[second]).mean()
        return parts

    def _absent(self, name: str, samples: Samples, like: Tensor) -> Tensor | None:
        """Log-weights of the anchors that there are here: −inf for samples without data of this type."""
        present = self.present(samples, name)
        if present is None:
            return None
        return self._spread(like.new_zeros(len(present)).masked_fill(~present, -torch.inf))

    def _spread(self, own: Tensor | None) -> Tensor | None:
        """What belongs to anchors, where these are: this rank's, or everyone's."""
        return own if own is None or self.field is not None else self.gather(own)

    def _labels(self, samples: Samples) -> Tensor:
        """int64 [b], 0 where there is none."""
        return samples.labels.clamp(min=0) if self.config.data.partial else samples.labels

    def _latents(
        self, anchors: Tensor, everyone: Tensor, index: Tensor, samples: Samples, field: FieldFactory | None,
        log_weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        latent = self.config.latent
        noise = normal(self._keys("latent", samples), (latent.dim,), anchors.dtype) * latent.noise_scale
        return compute_latents(
            anchors, noise, everyone, index=index, log_weights=log_weights, solver=latent.solver, steps=latent.steps,
            backend=self.config.backend, store_every=self.config.flow_store_every, field=field,
        )  # fmt: skip

    def _alignment(
        self, latents: Tensor, anchors: Tensor, targets: Tensor, log_weights: Tensor | None, groups: Tensor | None,
        field: FieldFactory | None, shares: Tensor | None, pair: PairConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The alignment loss, and the fraction of latents that end nearest to their target at the last step."""
        settings = self.config.alignment
        result = align(
            latents, anchors, targets, log_weights=log_weights, groups=groups, steps=settings.steps,
            backend=self.config.backend, store_every=self.config.flow_store_every, field=field,
        )  # fmt: skip
        log_probs = result.log_probs
        if shares is not None:  # of those that do not count, a target may not be there
            log_probs = log_probs.masked_fill(torch.eq(shares, 0), 0.0)
        loss = alignment_loss(
            log_probs, cutoff=settings.cutoff, kind=settings.kind, over=pair.over, temperature=pair.temperature,
            weights=shares,
        )  # fmt: skip
        reached = (log_probs[-1].detach() > -0.6931).to(loss.dtype)  # w_target > 1/2
        return loss, shared_mean(reached, shares)

    def state(self) -> dict[str, Tensor]:
        return {f"centre.{name}": centre for name, centre in self.centres.items()}

    def _class_weights(self, table: Tensor, samples: Samples) -> Tensor | None:
        """Log-frequencies [K] of the global batch's labels, where these count."""
        if not self.config.alignment.class_weights:
            return None
        labels = self.gather(samples.labels)
        known = torch.ge(labels, 0) if self.config.data.partial else torch.ones_like(labels, dtype=torch.bool)
        # not torch.bincount, which would wait for the largest of them
        counts = table.new_zeros(len(table)).index_add_(0, labels.clamp(min=0), known.to(table.dtype))
        return (counts / counts.sum()).log()
