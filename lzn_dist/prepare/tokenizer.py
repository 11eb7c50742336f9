"""A tokenizer for a data set's own captions: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lzn_dist.data.captions import TOKENIZER, captions_of
from lzn_dist.data.index import ABSENT, ShardIndex

VOCABULARY = 8192
SEEN = 1_000_000  # captions that it is trained on, at most


def train_tokenizer(captions: Iterable[str], vocabulary: int = VOCABULARY) -> str:
    """The tokenizer.json of a byte-level BPE with at most ``vocabulary`` tokens, 256 of them single bytes: it has no
    text that it cannot write. Lower and upper case are told apart. Deterministic."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    model.train_from_iterator((caption for _, caption in zip(range(SEEN), captions, strict=False)), trainer)
    text: str = model.to_str()
    return text


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY, *, replace: bool = False) -> Path:
    """Train one on the training captions of a folder of shards and keep it there. Raises FileExistsError where there is
    one, FileNotFoundError and ValueError for what is no folder of shards with captions."""
    path = folder / TOKENIZER
    if path.exists() and not replace:
        raise FileExistsError(f"{path} is there already; models that were trained with it need it: --replace if not")
    if vocabulary < 256:
        raise ValueError(f"--vocabulary: 256 at least, one for each byte, not {vocabulary}")
    index = ShardIndex.load(folder)
    text = train_tokenizer(all_captions(index, "train"), vocabulary)
    temporary = path.with_name(f".{TOKENIZER}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def all_captions(index: ShardIndex, split: str) -> Iterator[str]:
    """Of a split's samples, in their order; texts that are damaged are passed over. Raises ValueError without any."""
    table = index.split(split)
    if "txt" not in table.offsets:
        raise ValueError(f"{index.folder}: split {split!r} has no captions (KEY.txt)")
    offsets = table.offsets["txt"]
    shards = np.searchsorted(table.ends, np.arange(len(table)), side="right")
    for shard, (offset, size) in zip(shards.tolist(), offsets.tolist(), strict=True):
        if offset != ABSENT:
            try:
                yield from captions_of(index.storage.read(table.shards[shard].name, offset, size))
            except ValueError:
                continue
