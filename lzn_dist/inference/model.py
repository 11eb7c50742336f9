"""A trained model as one object: embed, generate, classify, caption, reconstruct (arXiv 2509.15591, section 3).

The capabilities are compositions of the networks with the zones' two operations, anchors → latents and latents →
anchors. **A latent depends on all anchors that it is computed with.** Each sample is therefore seen among the anchors
of a *reference set*, the first training samples, and its own alone (`lzn_dist.zones.latents_beside`): what is found for
it does not depend on what else is asked. An exported model brings its reference; for a run's the anchors are computed
when they are first needed. Published evaluation computes latents over fixed batches instead (`anchors_to_latents`).

Baselines are read the same way: a rectified flow is a decoder whose latents have no dimensions, a contrastive model an
encoder that embeds, a supervised one an encoder whose output is logits.

All randomness is keyed by (seed, name, sample number): results do not depend on how a set is split into calls, if each
says by `first` with which sample it begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from lzn_dist.data import Tokenizer
from lzn_dist.exchange import Loaded, card, read_export, write_export
from lzn_dist.inference.generative import GenerativeModel

PAPER = "https://arxiv.org/abs/2509.15591"


class LZN(
    GenerativeModel,
    ModelHubMixin,
    library_name="lzn_dist",
    license="mit",
    repo_url=PAPER,
    paper_url=PAPER,
    tags=["latent-zoning-networks"],
):
    """Networks with their configuration, ready to use. Puts the networks in evaluation mode. `save_pretrained`,
    `from_pretrained` and `push_to_hub` are huggingface_hub's, for folders as `lzn_dist export` writes them.

    Where a task lacks a network (a representation model cannot classify), the method raises MissingCapability.
    """

    def parts(self) -> Loaded:
        """What the model consists of, with the reference as far as it is at hand."""
        content = None if self._tokenizer is None else self._tokenizer.content
        return Loaded(
            self.networks, self.config, self.step, self.centres, content, self.reference,
            self.classes if self.config.data.num_classes > 0 else (),
        )  # fmt: skip

    def gather_reference(self, anchors: int | None = None) -> None:
        """Have the anchors of the first so many training samples at hand, of all data types that have some: a model
        that is saved after it needs no data. None: as many as it says now. Raises FileNotFoundError."""
        if anchors is not None:
            self.reference, self.reference_size = {}, anchors
        if self.has_latents:
            for name in ("image", "text"):
                if self.networks.find(name, "encoder") is not None:
                    self.reference_anchors(name)
        if self.has_text or self.has_captions:
            _ = self.tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        """As huggingface_hub's mixin calls it: the files of an exported folder. Raises FileNotFoundError where the
        reference is missing and the data is not there."""
        self.gather_reference()
        parts = self.parts()
        write_export(save_directory, parts)
        (save_directory / "README.md").write_text(card(parts), encoding="utf-8")

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, revision: str | None, cache_dir: str | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **more: Any,
    ) -> LZN:  # fmt: skip
        if not Path(model_id).is_dir():
            model_id = snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
                allow_patterns=["*.json", "*.safetensors", "SHA256SUMS"], ignore_patterns=["*/*"],
            )  # fmt: skip
        return model_of(read_export(Path(model_id)))


def model_of(found: Loaded, reference_size: int = 0) -> LZN:
    """The object that uses what a model consists of."""
    tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer, "the model's tokenizer")
    return LZN(
        found.networks, found.config, found.step, centres=found.centres, tokenizer=tokenizer,
        reference=found.reference, reference_size=reference_size, classes=found.classes,
    )  # fmt: skip
