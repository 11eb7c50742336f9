"""Rectified flow without latents (arXiv 2209.03003); with labels where a decoder is class-conditional."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.objectives.base import Needs, Objective, Related, Samples, View


class RectifiedFlow(Objective):
    """Of what `decode` names; from whose latents has no meaning."""

    @classmethod
    def declare(cls, config: Config) -> Needs:
        if not config.decode:
            raise ConfigError("objective=rectified_flow needs what is decoded: decode=[{what: image}]")
        conditional = any(decoding.class_conditional for decoding in config.decode)
        return Needs(decodes=config.decode, labels=conditional, latents=False)

    def relate(self, anchors: Mapping[View, Tensor], tables: Mapping[str, Tensor], samples: Samples) -> Related:
        none = tuple(samples.view(View(d.what)).new_zeros(len(samples), 0) for d in self.needs.decodes)
        return Related(none, None, {})
