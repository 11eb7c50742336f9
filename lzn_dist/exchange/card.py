"""The model card of an exported folder: README.md, as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from tabulate import tabulate

from lzn_dist import __version__
from lzn_dist.exchange.folder import Loaded


def card(
    model: Loaded, measures: Mapping[str, float] | None = None, measured_on: str = "", figures: Sequence[str] = (),
    license: str = "mit",
) -> str:  # fmt: skip
    """Markdown with the Hub's metadata. measures: by name, of this very step; measured_on: in words; figures: paths
    beside the card."""
    config, data = model.config, model.config.data
    pairs = [f"{pair.latents} → {pair.anchors}" for pair in config.alignment.pairs]
    names = model.networks.named()
    meta = ModelCardData(
        license=license, library_name="lzn_dist", pipeline_tag=pipeline(model), tags=["latent-zoning-networks"]
    )
    rows = [(name, type(network).__name__, _count(network)) for name, network in names.items()]
    lines = [
        "---", meta.to_yaml(), "---", "",
        f"# A Latent Zoning Network, {config.task}", "",
        "Encoders and decoders that share one Gaussian latent space, partitioned into zones by an analytic flow "
        "([arXiv 2509.15591](https://arxiv.org/abs/2509.15591)), trained with lzn_dist "
        f"{__version__} for {model.step:,} steps (objective {config.objective}).", "",
        tabulate(rows, ("network", "class", "parameters"), tablefmt="github", intfmt=","), "",
        f"Images are {data.image_size}×{data.image_size}, {'grey' if data.image_channels == 1 else 'RGB'}; the latent "
        f"space has {config.latent.dim} dimensions." + (f" Aligned: {', '.join(pairs)}." if pairs else ""), "",
    ]  # fmt: skip
    if model.classes:
        shown = ", ".join(model.classes[:20]) + (", …" if len(model.classes) > 20 else "")
        lines += [f"Classes ({len(model.classes)}): {shown}.", ""]
    if model.reference:
        each = ", ".join(f"{len(anchors):,} of {name}" for name, anchors in model.reference.items())
        lines += [
            f"The anchors of the first training samples come with the model ({each}): a latent depends on the anchors "
            "that it is seen among.", "",
        ]  # fmt: skip
    lines += [
        "## Use",
        "",
        "```python",
        "import lzn_dist",
        "",
        'model = lzn_dist.load("FOLDER")',
        *_calls(model),
        "```",
        "",
    ]
    if measures:
        lines += ["## Measures", "", *([measured_on, ""] if measured_on else [])]
        lines += [tabulate([(k, f"{v:.4f}") for k, v in measures.items()], ("measure", "value"), tablefmt="github"), ""]
    if figures:
        lines += ["## Pictures", "", *(f"![{path.rsplit('/', 1)[-1].split('.')[0]}]({path})\n" for path in figures)]
    return "\n".join(lines)


def pipeline(model: Loaded) -> str:
    """The Hub's word for what the model does first of all."""
    names = model.networks.named()
    if "text.encoder" in names and "image.decoder" in names:
        return "text-to-image"
    if "text.encoder" in names:
        return "zero-shot-image-classification"
    if model.config.objective == "supervised":
        return "image-classification"
    if "image.decoder" in names:
        return "unconditional-image-generation"
    return "image-feature-extraction"


def _calls(model: Loaded) -> list[str]:
    names, lines = model.networks.named(), []
    if "image.encoder" in names:
        lines.append('model.embed(["photo.jpg"])')
    if "label.encoder" in names:
        lines.append('model.classify(["photo.jpg"])')
    if "image.decoder" in names:
        lines.append('model.generate(texts=["…"], seed=0)' if "text.encoder" in names else "model.generate(8, seed=0)")
    if "text.decoder" in names:
        lines.append('model.caption(["photo.jpg"])')
    return lines


def _count(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
