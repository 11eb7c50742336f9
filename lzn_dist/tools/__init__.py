"""Commands beside training: looking at data sets, importing published checkpoints."""
