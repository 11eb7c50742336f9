"""What a trained model can do, measured and drawn; needs no trainer."""

from lzn_dist.evaluation.data import EvaluationData, ImageSet
from lzn_dist.evaluation.report import evaluate_model, write_figures

__all__ = ["EvaluationData", "ImageSet", "evaluate_model", "write_figures"]
