"""Captions and what becomes of them: one a line of a sample's ``KEY.txt``, one of them drawn anew in each epoch, its
tokens by a tokenizer of the `tokenizers` library (a ``tokenizer.json``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lzn_dist.data.index import ShardIndex
from lzn_dist.keyed_random import make_key, uniform
from lzn_dist.paths import expand_path

TOKENIZER = "tokenizer.json"
NO_TOKEN = -1  # behind a caption's end, and everywhere where there is none
MOST_CHARACTERS = 20_000  # of a caption that are read; far more than any network takes
_TOKENIZER_BYTES = 64 << 20
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not outlive a fork, as loaders make


def captions_of(content: bytes) -> list[str]:
    """The captions in a ``KEY.txt``: its lines that are not blank, spaces made single. Raises ValueError where it is
    not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8 (byte {error.start})") from error
    lines = (" ".join(line[:MOST_CHARACTERS].split()) for line in text.splitlines())
    return [line for line in lines if line]


class Tokenizer:
    """Text to numbers and back. sha256: of its file; vocabulary: numbers are below it."""

    def __init__(self, content: str, name: str) -> None:
        """content: of a tokenizer.json. Raises ValueError, naming `name`."""
        import tokenizers  # a library that images alone do not need

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{name} is no tokenizer of the tokenizers library ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.content = content
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.vocabulary: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 [b, length]: the first tokens of each text, NO_TOKEN behind its end."""
        found = np.full((len(texts), length), NO_TOKEN, dtype=np.int64)
        for row, encoding in zip(found, self._tokenizer.encode_batch_fast(list(texts)), strict=True):
            numbers = encoding.ids[:length]
            row[: len(numbers)] = numbers
        return torch.from_numpy(found)

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of tokens int64 [b, length]; special ones and NO_TOKEN are left out."""
        rows = [[number for number in row if number >= 0] for row in tokens.tolist()]
        return [text.strip() for text in self._tokenizer.decode_batch(rows, skip_special_tokens=True)]


def load_tokenizer(index: ShardIndex, path: str = "") -> Tokenizer:
    """The tokenizer in a file, or the one that is kept with the shards. Raises ValueError and OSError."""
    if path:
        name = path
        try:
            content = Path(expand_path(path)).read_bytes()
        except OSError as error:
            raise ValueError(f"data.tokenizer: {path} cannot be read ({error.strerror})") from error
    else:
        name = f"{index.folder}/{TOKENIZER}"
        try:
            content = index.storage.read_file(TOKENIZER, _TOKENIZER_BYTES)
        except FileNotFoundError as error:
            raise ValueError(
                f"{index.folder} has no {TOKENIZER}: python data_prep/tokenizer.py {index.folder} trains one on its "
                "captions, or set data.tokenizer to the file of another"
            ) from error
    try:
        return Tokenizer(content.decode(), name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: it is no tokenizer") from error


class CaptionReader:
    """What a model of text sees of a sample: one of its captions as tokens int64 [length + 1], of which the last says
    that there were more than fit. partial: samples without a caption have no tokens, instead of being bad."""

    extension = "txt"

    def __init__(self, tokenizer: Tokenizer, length: int, seed: int, partial: bool) -> None:
        self.tokenizer, self.length, self.seed, self.partial = tokenizer, length, seed, partial

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length + 1,)

    def __call__(self, contents: Sequence[bytes | None], rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        """contents: of the samples' members, None where there is none. Which caption it is, is a function of seed,
        epoch and the sample's number."""
        draws = uniform(make_key(self.seed, "caption", epoch, rows), (), torch.float64).tolist()
        chosen: list[str | ValueError] = []
        for content, draw in zip(contents, draws, strict=True):
            try:
                captions = [] if content is None else captions_of(content)
                if not captions and not self.partial:
                    raise ValueError("has no caption" if content is None else "its caption is empty")
                chosen.append(captions[int(draw * len(captions))] if captions else "")
            except ValueError as error:
                chosen.append(error)
        encoded = self.tokenizer.encode([text for text in chosen if isinstance(text, str)], self.length + 1)
        some = encoded[:, 0].ge(0).tolist()
        tokens = iter(zip(encoded, some, strict=True))
        found: list[Tensor | ValueError] = []
        for text in chosen:
            if isinstance(text, ValueError):
                found.append(text)
                continue
            numbers, there = next(tokens)
            if not text:
                numbers = torch.full_like(numbers, NO_TOKEN)  # without those that a tokenizer adds
            found.append(ValueError("its caption has no tokens") if text and not there else numbers)
        return found
