"""What a trained model can do, measured and drawn; needs no trainer."""

from lzn_dist.evaluation.data import EvaluationData, ImageSet
from lzn_dist.evaluation.report import evaluate_model, write_figures
from lzn_dist.evaluation.zone_figure import toy_zone_figure, zone_figure

__all__ = ["EvaluationData", "ImageSet", "evaluate_model", "toy_zone_figure", "write_figures", "zone_figure"]
