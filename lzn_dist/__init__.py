"""Large-scale distributed training of Latent Zoning Networks (arXiv 2509.15591)."""

__version__ = "0.1.0"
