"""A trained model in the browser: lzn_dist playground RUN

Draw, upload or type: the class with its probabilities over the latent's noise, the caption, the place among the zones,
the nearest training images, the reconstruction. Click into the latent space and see what is generated there; mix two
inputs. RUN is a run's folder, a checkpoint, or what `lzn_dist export` wrote. Needs `pip install lzn_dist[playground]`.

The page is served to this machine alone (--host says otherwise: then everybody who reaches it can use it), asks nothing
of any other, and takes uploads of 10 MB at most.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from PIL import Image

from lzn_dist.config import ConfigError
from lzn_dist.data import CorruptSampleError
from lzn_dist.exchange import ExportError
from lzn_dist.exit_status import REFUSED, status_of, told
from lzn_dist.inference import MissingCapability
from lzn_dist.inference.loading import load_everywhere
from lzn_dist.pages.playground import SCALES, Playground, Seen, Unclear
from lzn_dist.paths import path_argument
from lzn_dist.terminal import TRUST, command
from lzn_dist.training.checkpoint import CheckpointError

UPLOAD = "10mb"
CANVAS = 320  # pixels
COLOURS = ("#ffffff", "#999999", "#ff5544", "#44aa55", "#4477ee")  # to draw with
FROM: list[Any] = ["upload", "clipboard"]  # images come
STEPS = 7  # images of a mixture


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist playground", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run, checkpoint or exported folder")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any free one")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for what the user must mend, said in one line."""
    options = parse(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if find_spec("gradio") is None:
            raise ConfigError('the playground needs gradio: pip install "lzn_dist[playground]"')
        playground = Playground(load_everywhere(options.run, options.trust))
        if playground.model.has_latents and playground.model.has_encoder:
            playground.model.reference_anchors("image")  # what is missing is told now, not at the first click
        page = build(playground)
        where = page.launch(
            server_name=options.host, server_port=options.port or None, max_file_size=UPLOAD, quiet=True, share=False,
            prevent_thread_lock=True, show_error=True, footer_links=[], ssr_mode=False, pwa=False, theme=_theme(),
        )[1]  # fmt: skip
    except (
        CheckpointError, ConfigError, CorruptSampleError, ExportError, MissingCapability, OSError, ValueError,
    ) as error:  # fmt: skip
        said = told(error, options.run) if isinstance(error, OSError) else str(error)
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return REFUSED if isinstance(error, FileNotFoundError) else status_of(error)
    print(f"{where} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
    return 0


def _theme() -> Any:
    """Fonts of the machine: none is fetched."""
    import gradio

    return gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(playground: Playground) -> Any:
    """The page of a model: what it cannot do is not on it."""
    import gradio as gr

    model = playground.model

    def refused(function: Any) -> Any:
        """Unclear as a word on the page."""

        def wrapped(*given: Any) -> Any:
            try:
                return function(*given)
            except (Unclear, MissingCapability, FileNotFoundError) as error:
                raise gr.Error(str(error)) from error

        return wrapped

    def drawn(value: Any) -> Image.Image | None:
        return value["composite"] if isinstance(value, dict) else value

    def shown(seen: Seen) -> list[Any]:
        best: Any = None
        table: Any = None
        if seen.probabilities is not None:
            names = model.classes
            best = {name: float(p) for name, p in zip(names, seen.probabilities[-1].tolist(), strict=True)}
            if len(seen.probabilities) == len(SCALES):
                order = seen.probabilities.mean(0).argsort(descending=True)[:5].tolist()
                rows = [
                    [f"{scale:g}", *(f"{seen.probabilities[row, k]:.2f}" for k in order)]
                    for row, scale in enumerate(SCALES)
                ]
                table = gr.Dataframe(value=rows, headers=["noise", *(names[k] for k in order)])
        marks = [] if seen.place is None else [seen.place]
        found: list[Any] = [seen.words or "–"]
        found += [best, table] if classes else []
        found += [seen.caption] if model.has_captions else []
        found += [seen.reconstruction] if rebuilds else []
        found += [seen.neighbours]
        found += [playground.map(marks)] if playground.plane is not None else []
        return found

    classes = model.has_logits or (model.has_labels and model.has_latents)
    rebuilds = model.has_decoder and model.draws_prior and model.has_encoder
    with gr.Blocks(title=f"lzn_dist · {model.config.task}", analytics_enabled=False) as page:
        config = model.config
        size, colours = config.data.image_size, "grey" if config.data.image_channels == 1 else "RGB"
        gr.Markdown(
            f"## Latent Zoning Network: {config.task}, step {model.step:,}\n"
            f"{size}×{size} {colours}, {config.latent.dim} latent dimensions"
        )
        outputs: list[Any] = []
        with gr.Row():
            with gr.Column():
                if model.has_encoder:
                    with gr.Tab("Draw"):
                        canvas = gr.ImageEditor(
                            value=Image.new("RGB", (CANVAS, CANVAS), "black"), type="pil", sources=["upload"],
                            brush=gr.Brush(CANVAS // 12, list(COLOURS), COLOURS[0]), canvas_size=(CANVAS, CANVAS),
                            height=440, layers=False, transforms=(), label="white on black", elem_id="canvas",
                        )  # fmt: skip
                        look_drawn = gr.Button("Look", variant="primary", elem_id="look-drawn")
                    with gr.Tab("Upload"):
                        upload = gr.Image(type="pil", image_mode=None, sources=FROM, elem_id="upload")
                        look_uploaded = gr.Button("Look", variant="primary", elem_id="look-uploaded")
                if model.has_text:
                    with gr.Tab("Type"):
                        text = gr.Textbox(label="text", max_length=2000, elem_id="text")
                        look_text = gr.Button("Read", variant="primary", elem_id="read")
                if playground.plane is not None:
                    plane = gr.Image(
                        playground.map([]), label="latent space: click into it", interactive=False, elem_id="map",
                        buttons=[],
                    )  # fmt: skip
            with gr.Column():
                outputs.append(gr.Textbox(label="what it is", interactive=False, elem_id="words"))
                if classes:
                    outputs.append(
                        gr.Label(label="probabilities, all of the zone", num_top_classes=5, elem_id="classes")
                    )
                    outputs.append(gr.Dataframe(label="probabilities over the latent's noise", headers=["noise"]))
                if model.has_captions:
                    outputs.append(gr.Textbox(label="caption", interactive=False, elem_id="caption"))
                if rebuilds:
                    outputs.append(gr.Image(label="reconstruction", height=150, interactive=False, elem_id="rebuilt"))
                outputs.append(gr.Gallery(label="nearest training images", columns=4, height=290, preview=False))
                if playground.plane is not None:
                    outputs.append(plane)
                if model.has_decoder:
                    place = gr.Textbox(label="generated", value="", interactive=False, elem_id="place")
                    made = gr.Gallery(label="images", columns=4, height=290, elem_id="made")
                    seed = gr.Number(0, label="seed", precision=0, elem_id="seed")
                    if model.takes_labels or model.has_labels:
                        label = gr.Dropdown([*model.classes], label="class", elem_id="class")
                        by_class = gr.Button("Generate the class", elem_id="by-class")
                    if model.draws_prior:
                        of_prior = gr.Button("Generate from the prior", elem_id="of-prior")
                    if model.has_text:
                        by_text = gr.Button("Generate what is typed", elem_id="by-text")
        if model.has_decoder and model.has_encoder and model.has_latents:
            gr.Markdown("### Mix two inputs")
            with gr.Row():
                first, second = (
                    gr.Image(label=name, type="pil", image_mode=None, sources=FROM, height=180, elem_id=name)
                    for name in ("first", "second")
                )
                mixed = gr.Gallery(label="from one to the other", columns=STEPS, height=180, elem_id="mixed")
            mix = gr.Button("Mix", elem_id="mix")

            def mixing(a: Any, b: Any) -> Any:
                return playground.mix(playground.image(a), playground.image(b), STEPS)

            mix.click(refused(mixing), [first, second], [mixed])

        if model.has_encoder:

            def look(value: Any) -> list[Any]:
                return shown(playground.look(playground.image(drawn(value))))

            look_drawn.click(refused(look), [canvas], outputs)
            look_uploaded.click(refused(look), [upload], outputs)
        if model.has_text:
            look_text.click(refused(lambda given: shown(playground.read(playground.text(given)))), [text], outputs)
        if model.has_decoder:
            if playground.plane is not None:

                def clicked(number: float, event: gr.SelectData) -> list[Any]:
                    images, where, words = playground.at(event.index[0], event.index[1], 8, int(number or 0))
                    return [words, images, playground.map([where])]

                # gradio finds the event by its annotation, whose name is not one of this module
                clicked.__annotations__["event"] = gr.SelectData
                plane.select(clicked, [seed], [place, made, plane])
            if model.takes_labels or model.has_labels:

                def of_class(name: str, number: float) -> list[Any]:
                    if name not in model.classes:
                        raise Unclear("choose a class")
                    chosen = model.classes.index(name)
                    return [f"class {name}", playground.generate(8, int(number or 0), label=chosen)]

                by_class.click(refused(of_class), [label, seed], [place, made])
            if model.draws_prior:
                of_prior.click(
                    refused(lambda number: ["of the prior", playground.generate(8, int(number or 0))]), [seed],
                    [place, made],
                )  # fmt: skip
            if model.has_text:

                def of_text(given: str, number: float) -> list[Any]:
                    words = playground.text(given)
                    return [words, playground.generate(8, int(number or 0), text=words)]

                by_text.click(refused(of_text), [text, seed], [place, made])
    return page


if __name__ == "__main__":
    sys.exit(command(main))
