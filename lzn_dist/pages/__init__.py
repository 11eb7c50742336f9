"""Pages for people: what runs have done, in one self-contained HTML file; a model to play with in the browser."""

from lzn_dist.pages.report import read_run, report

__all__ = ["read_run", "report"]
