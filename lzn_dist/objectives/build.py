"""From a configuration's `objective` to the object that computes it."""

from __future__ import annotations

from lzn_dist.config import Config
from lzn_dist.networks import Networks
from lzn_dist.objectives.base import Gather, Objective
from lzn_dist.objectives.baselines import ContrastOfViews, MomentumContrast, RectifiedFlow, SupervisedClassification
from lzn_dist.objectives.zoning import Zoning
from lzn_dist.zones import FieldFactory


def build_objective(config: Config, networks: Networks, gather: Gather, field: FieldFactory | None = None) -> Objective:
    """The objective over all ranks that gather and field reach. networks: whole, with their initial weights."""
    if config.objective == "lzn":
        return Zoning(config, gather, field=field)
    if config.objective == "moco":
        return MomentumContrast(config, gather, networks)
    others: dict[str, type[RectifiedFlow | ContrastOfViews | SupervisedClassification]] = {
        "rectified_flow": RectifiedFlow,
        "simclr": ContrastOfViews,
        "supervised": SupervisedClassification,
    }
    return others[config.objective](config, gather)
