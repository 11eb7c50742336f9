"""Trained models in formats for others: one folder that needs neither the run nor its data, for lzn_dist itself, for
transformers, and as programs without Python (ONNX, torch.export)."""

from lzn_dist.exchange.card import card
from lzn_dist.exchange.folder import ExportError, Loaded, is_export, read_export, write_export

__all__ = ["ExportError", "Loaded", "card", "is_export", "read_export", "write_export"]
