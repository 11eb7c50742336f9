"""Text encoders that others have trained, from a local folder: Hugging Face's, and tables of static embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lzn_dist.models.text import check_sizes, check_tokens, pooled


def _head(inputs: int, latent_dim: int) -> nn.Sequential:
    """As `TextEncoder`'s: anchors of length √D."""
    return nn.Sequential(nn.Linear(inputs, latent_dim, bias=False), nn.LayerNorm(latent_dim))


class PretrainedTextEncoder(nn.Module):
    """A Hugging Face model from a local folder (config.json and its weights), and a head on it. The run's tokenizer is
    to be the model's own: data.tokenizer=FOLDER/tokenizer.json.

    Its dropout is off: it would not be a function of the sample alone.
    """

    batch_independent: bool = True
    takes_tokens: bool = True

    def __init__(
        self,
        *,
        folder: str,
        vocabulary: int,
        text_length: int = 32,
        latent_dim: int = 256,
        trained: bool = False,
        pool: Literal["mean", "first", "last"] = "mean",
    ) -> None:
        """trained: whether the model itself is trained further, or the head alone. Raises ValueError, naming the
        argument, for a folder that holds no such model, or one of fewer tokens."""
        super().__init__()
        from transformers import AutoConfig, AutoModel  # seconds

        check_sizes(vocabulary=vocabulary, text_length=text_length, latent_dim=latent_dim)
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise ValueError(f"folder: {path} has no config.json: give a folder of a Hugging Face model")
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            if torch.empty(0).is_meta:  # shapes alone are wanted
                self.model: Any = AutoModel.from_config(config)
            else:
                self.model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"folder: {path} cannot be loaded ({str(error).splitlines()[0]})") from error
        if config.vocab_size < vocabulary:
            raise ValueError(
                f"folder: its model has {config.vocab_size} tokens, the tokenizer {vocabulary}: set data.tokenizer to "
                f"{path / 'tokenizer.json'}"
            )
        most = getattr(config, "max_position_embeddings", text_length)
        if text_length > most:
            raise ValueError(f"text_length: the model in {path} takes at most {most} tokens: set data.text_length")
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model.requires_grad_(trained)
        self.text_length, self.pool, self.feature_dim = text_length, pool, int(config.hidden_size)
        self.head = _head(self.feature_dim, latent_dim)

    def features(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l], negative behind a text's end → [b, feature_dim]; as `TextEncoder.features`."""
        present = check_tokens(tokens, self.text_length)
        states = self.model(input_ids=tokens.clamp(min=0), attention_mask=present.long()).last_hidden_state
        return pooled(states, present, self.pool)

    def forward(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l] → anchors [b, latent_dim]."""
        anchors: Tensor = self.head(self.features(tokens, key))
        return anchors

    def blocks(self) -> list[nn.Module]:
        """What the model itself says must not be split."""
        names = set(getattr(self.model, "_no_split_modules", None) or [])
        return [module for module in self.model.modules() if type(module).__name__ in names]


class StaticTextEncoder(nn.Module):
    """The mean of a text's token embeddings, from a table in a local folder (``model.safetensors`` with a matrix
    ``embeddings`` [tokens, dim], as model2vec writes it), and a head on it."""

    batch_independent: bool = True
    takes_tokens: bool = True

    def __init__(
        self, *, folder: str, vocabulary: int, text_length: int = 32, latent_dim: int = 256, trained: bool = False
    ) -> None:
        """As `PretrainedTextEncoder`."""
        super().__init__()
        from safetensors import SafetensorError, safe_open

        check_sizes(vocabulary=vocabulary, text_length=text_length, latent_dim=latent_dim)
        path = Path(folder).expanduser() / "model.safetensors"
        try:
            with safe_open(path, "pt") as file:
                shape = file.get_slice("embeddings").get_shape()
                table = torch.empty(shape) if torch.empty(0).is_meta else file.get_tensor("embeddings").float()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"folder: {path} has no matrix of embeddings ({str(error).splitlines()[0]})") from error
        if len(shape) != 2 or shape[0] < vocabulary:
            raise ValueError(f"folder: its table is {shape}, the tokenizer has {vocabulary} tokens: set data.tokenizer")
        self.table = nn.Parameter(table, requires_grad=trained)
        self.text_length, self.feature_dim = text_length, int(shape[1])
        self.head = _head(self.feature_dim, latent_dim)

    def features(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l], negative behind a text's end → [b, dim]."""
        present = check_tokens(tokens, self.text_length)
        return pooled(nn.functional.embedding(tokens.clamp(min=0), self.table), present, "mean")

    def forward(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
        """tokens int64 [b, l] → anchors [b, latent_dim]."""
        anchors: Tensor = self.head(self.features(tokens, key))
        return anchors

    def blocks(self) -> list[nn.Module]:
        """None: a table and a layer."""
        return []
