"""Use a trained model on files: lzn_dist infer DO RUN … --output PATH

RUN is a run's folder, a checkpoint, or what `lzn_dist export` wrote. DO is

embed        INPUT…       vectors of images or texts → .npz or .parquet
classify     INPUT…       classes of images or texts → .csv or .jsonl; --draws N: probabilities; --texts: zero-shot
caption      INPUT…       captions of images or texts → .csv or .jsonl
reconstruct  INPUT…       images and beside each its reconstruction → a folder of PNGs and grid.png
generate     -n N         images of the prior; of --labels, --texts or --images → a folder of PNGs and grid.png
interpolate  A B          images on the way from one image or text to another → one .png

INPUT: images, folders of images (also below), a folder or URL of shards (--split), or a .txt with a text a line. What
cannot be read is passed over, named and counted. Large sets are done in parts: the same command goes on after a stop.
Several processes share the work, with the same results:

    accelerate launch --config_file launch/ddp.yaml lzn_dist/infer.py embed RUN photos --output photos.npz
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import lzn_dist  # noqa: F401  # isort: skip  (before torch: how threads wait)
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lzn_dist.config import ConfigError
from lzn_dist.data import CorruptSampleError
from lzn_dist.data.captions import captions_of
from lzn_dist.distributed import Topology
from lzn_dist.distributed.spread import once, spread
from lzn_dist.engines.start import join_world, leave_world
from lzn_dist.evaluation.figures import mosaic
from lzn_dist.exchange import ExportError
from lzn_dist.exit_status import REFUSED, status_of, told
from lzn_dist.inference import LZN, MissingCapability
from lzn_dist.inference.files import Asked, InferError, Parts, asked_for, write_table, write_vectors
from lzn_dist.inference.loading import load_everywhere
from lzn_dist.paths import path_argument
from lzn_dist.terminal import TRUST, command, printable
from lzn_dist.training.checkpoint import CheckpointError

SHOWN = 64  # pictures of a grid, at most
NAMED = 5  # files left out that are named on the terminal
TABLES, VECTORS = (".csv", ".jsonl"), (".npz", ".parquet")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist infer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True, metavar="DO")

    def add(name: str, *inputs: str, what: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=what, description=what)
        own.add_argument("run", type=path_argument, metavar="RUN", help="run, checkpoint or exported folder")
        for given in inputs:
            own.add_argument("inputs", nargs="+", metavar=given, help="images, folders, shards, or a .txt of texts")
            own.add_argument("--split", default="", help="of shards (default: test, else val, else train)")
        own.add_argument("--output", type=path_argument, required=True, metavar="PATH", help="where results go")
        own.add_argument("--overwrite", action="store_true", help="replace what is there")
        own.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
        own.add_argument("--batch", type=int, default=256, help="samples of a part (default: 256)")
        own.add_argument(
            "--anchors", default="", metavar="N", help="anchors a sample is seen among: a number, or all (see load)"
        )
        own.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
        return own

    embed = add("embed", "INPUT", what="vectors of images or texts, as .npz or .parquet")
    embed.add_argument("--what", default="features", choices=("features", "anchor", "latent", "map"))
    classify = add("classify", "INPUT", what="classes of images or texts, as .csv or .jsonl")
    classify.add_argument("--draws", type=int, default=0, metavar="N", help="probabilities, of N draws of the latent")
    classify.add_argument("--noise", type=float, default=None, help="noise scale (default: 0; 1 with --draws)")
    classify.add_argument("--texts", metavar="FILE", help="zero-shot: a class's description a line")
    caption = add("caption", "INPUT", what="captions of images or texts, as .csv or .jsonl")
    caption.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words (default)")
    caption.add_argument("--top-p", type=float, default=1.0, help="draw of the words that have so much probability")
    caption.add_argument("--beams", type=int, default=1, help="look for the likeliest caption among so many")
    add("reconstruct", "INPUT", what="images and their reconstructions, as PNGs")
    generate = add("generate", what="images, as PNGs")
    generate.add_argument("-n", type=int, default=None, help="how many (default: one each of what is given)")
    generate.add_argument("--labels", default="", help="classes, by number or name, with commas; they take turns")
    generate.add_argument("--texts", default="", metavar="TEXT|FILE", help="a text, or a .txt with one a line")
    generate.add_argument("--images", default="", metavar="INPUT", help="images whose variations are wanted")
    generate.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (default: 1, none)")
    generate.add_argument("--sampler", choices=("euler", "dopri5"), help="instead of the configuration's")
    generate.add_argument("--steps", type=int, help="of the Euler sampler")
    interpolate = add("interpolate", what="images from one image or text to another, as one PNG")
    interpolate.add_argument("ends", nargs=2, metavar="A", help="an image's path, or a text")
    interpolate.add_argument("-n", type=int, default=9, help="images, both ends included (default: 9)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 74 where data is away, 2 for what the user must mend; said in one
    line."""
    options = parse(arguments)
    main_process = True
    try:
        join_world()
        main_process = Topology.current().is_main
        _check(options)
        model = load_everywhere(options.run, options.trust, anchors=_anchors(options.anchors))
        if options.do == "interpolate":
            once(lambda: _interpolate(model, options))
        else:
            _in_parts(model, options)
    except (
        CheckpointError, ConfigError, CorruptSampleError, ExportError, InferError, MissingCapability, OSError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        if main_process:
            said = told(error, options.output) if isinstance(error, OSError) else str(error)
            print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return REFUSED if isinstance(error, FileNotFoundError) else status_of(error)
    leave_world()
    return 0


def _anchors(text: str) -> Any:
    if text in ("", "all"):
        return text or None
    if not text.isdigit() or int(text) < 1:
        raise InferError(f"--anchors {text}: a number from 1 on, or all")
    return int(text)


def _check(options: argparse.Namespace) -> None:
    """What can be refused before a model is loaded."""
    suffix, do = options.output.suffix.lower(), options.do
    wanted = {"embed": VECTORS, "classify": TABLES, "caption": TABLES, "interpolate": (".png",)}.get(do)
    if wanted is not None and suffix not in wanted:
        raise InferError(f"--output {options.output}: {do} writes {' or '.join(wanted)}")
    if suffix == ".parquet" and options.what == "map":
        raise InferError("feature maps have more dimensions than a column of parquet: name an .npz")
    if suffix == ".parquet":
        try:
            import pyarrow  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
        except ImportError as error:
            raise InferError("writing parquet needs pyarrow: pip install pyarrow; or name an .npz") from error
    if options.batch < 1:
        raise InferError("--batch must be 1 or more")
    if do == "interpolate" and options.output.exists() and not options.overwrite:
        raise InferError(f"{options.output} is there already: name another --output, or say --overwrite")


# ── one part of each ────────────────────────────────────────────────────────────────────────────────────────────────


class Work:
    """What is asked of a model, part by part. count: of samples; rows of the results are numbered as the samples."""

    def __init__(self, model: LZN, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.asked: Asked | None = None
        self.images: Asked | None = None
        if options.do != "generate":
            self.asked = asked_for(options.inputs, options.split)
            self.count = len(self.asked)
        else:
            self._prepare_generation()
        self._refuse()

    def request(self) -> dict[str, Any]:
        """What makes another command another one."""
        ignored = {"output", "overwrite", "trust"}
        given = {key: str(value) for key, value in vars(self.options).items() if key not in ignored}
        names = self.asked.names if self.asked else self.texts + (self.images.names if self.images else [])
        return given | {"step": self.model.step, "samples": self.count, "names": _digest(names)}

    def _prepare_generation(self) -> None:
        options, model = self.options, self.model
        self.labels = _labels(options.labels, model)
        self.texts = _texts(options.texts)
        self.images = asked_for([options.images]) if options.images else None
        if sum((bool(self.texts), self.images is not None)) > 1:
            raise InferError("give --texts or --images, not both")
        given = len(self.texts) or (len(self.images) if self.images else len(self.labels))
        if options.n is None and not given:
            raise InferError("-n: how many images? It may be left out where --labels, --texts or --images say so")
        self.count = given if options.n is None else options.n
        if self.count < 1:
            raise InferError("-n must be 1 or more")

    def _refuse(self) -> None:
        """What this model cannot do, before any work."""
        model, options = self.model, self.options
        text = self.asked is not None and self.asked.kind == "text"
        if text and not model.has_text:
            raise MissingCapability("this model was trained without text: it takes images")
        if self.asked is not None and not text:
            model._encoder()
        if options.do == "reconstruct" and text:
            raise InferError("reconstruct takes images; texts: lzn_dist infer caption RUN texts.txt")
        if options.do in ("reconstruct", "generate"):
            model._decoder()
        if options.do == "caption" and not model.has_captions:
            raise MissingCapability("this model has no text decoder: it cannot write captions")
        if options.do == "classify":
            self.descriptions = _texts(options.texts or "")
            if self.descriptions and (text or not model.pairs_text):
                raise MissingCapability("zero-shot classification needs a model of images and text, and images")
            if not self.descriptions and not model.has_logits:
                model.label_anchors()

    def part(self, rows: range) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """Results of these samples, an array or list each of one row a sample, and what was left out."""
        data, kept, damaged = self.model.config.data, list(rows), list[tuple[str, str]]()
        given: Any = None
        images = self.images if self.asked is None else self.asked
        if images is not None and images.kind == "image":
            given, kept, damaged = images.images(rows, data.image_channels, data.image_size, data.resize)
        elif self.asked is not None:
            given = [self.asked.texts[row] for row in rows]
        # noise is addressed by the sample's number, whatever is damaged before it: a gap makes calls of their own
        found: list[dict[str, Any]] = []
        for start, stop in _runs(kept):
            own = range(kept[start], kept[start] + stop - start) if given is None else given[start:stop]
            found.append(getattr(self, f"_{self.options.do}")(own, kept[start]))
        result = {key: _joined([each[key] for each in found]) for key in (found[0] if found else {})}
        if self.asked is None:
            return result, damaged
        result["name"] = [self.asked.names[row] for row in kept]
        labels = self.asked.labels(kept)
        return result if labels is None else result | {"label": labels}, damaged

    def _embed(self, given: Any, first: int) -> dict[str, Any]:
        model, what, seed = self.model, self.options.what, self.options.seed
        if self.asked is not None and self.asked.kind == "text":
            if what == "latent":
                return {"embedding": model.latents(None, 0.0, seed, first, texts=given).cpu().numpy()}
            return {"embedding": model.embed_text(given).cpu().numpy()}
        return {"embedding": model.embed(given, what, seed=seed, first=first).float().cpu().numpy()}

    def _classify(self, given: Any, first: int) -> dict[str, Any]:
        model, options = self.model, self.options
        names: Sequence[str] = model.classes
        if self.asked is not None and self.asked.kind == "text":
            found = model.classify_text(given, options.seed)
            return {"class": found.tolist(), "class_name": [names[k] for k in found.tolist()]}
        if not self.descriptions and not options.draws and not model.has_logits:
            found = model.classify(given, options.noise or 0.0, None, options.seed, first)
            return {"class": found.tolist(), "class_name": [names[k] for k in found.tolist()]}
        if self.descriptions:
            shares, names = model.zero_shot(given, self.descriptions), self.descriptions
        else:
            noise = 1.0 if options.noise is None else options.noise
            shares = model.class_probabilities(given, options.draws or 1, noise, None, options.seed, first)
        best = shares.argmax(1).tolist()
        shares = shares.float().cpu()
        return {
            "class": best, "class_name": [names[k] for k in best], "probability": shares.amax(1).numpy(),
            "probabilities": shares.numpy(),
        }  # fmt: skip

    def _caption(self, given: Any, first: int) -> dict[str, Any]:
        options = self.options
        by = {"texts": given} if self.asked is not None and self.asked.kind == "text" else {"images": given}
        found = self.model.caption(
            **by, seed=options.seed, first=first, temperature=options.temperature, top_p=options.top_p,
            beams=options.beams,
        )  # fmt: skip
        return {"caption": found}

    def _reconstruct(self, given: Tensor, first: int) -> dict[str, Any]:
        rebuilt = self.model.reconstruct(given, self.options.seed, first=first)
        files, pairs = [], []
        for number, (before, after) in enumerate(zip(given, rebuilt.cpu(), strict=True), first):
            assert self.asked is not None
            files.append(_file(number, Path(self.asked.names[number]).stem))
            _save(self.options.output / files[-1], after)
            pairs.append(torch.stack((before / 127.5 - 1, after.float())) if number < SHOWN else before[:0])
        shown = [pair for pair in pairs if len(pair)]
        empty = np.zeros((0, 2, *given.shape[1:]), np.float32)
        return {"picture": files, "shown": torch.stack(shown).numpy() if shown else empty}

    def _generate(self, given: Any, first: int) -> dict[str, Any]:
        model, options = self.model, self.options
        rows, more = range(first, first + len(given)), dict[str, Any]()
        if self.labels:
            more["labels"] = torch.tensor([self.labels[row % len(self.labels)] for row in rows])
        if self.texts:
            more["texts"] = [self.texts[row % len(self.texts)] for row in rows]
        if self.images is not None:
            more["images"] = given
        made = model.generate_with_latents(
            len(rows), seed=options.seed, first=first, guidance=options.guidance, sampler=options.sampler,
            steps=options.steps, **more,
        )  # fmt: skip
        images = made.images.float().cpu()
        files = [_file(row) for row in rows]
        for file, image in zip(files, images, strict=True):
            _save(options.output / file, image)
        found: dict[str, Any] = {"picture": files, "name": [str(row) for row in rows]}
        if made.labels is not None:
            found["class"] = made.labels.tolist()
            found["class_name"] = [model.classes[k] if k >= 0 else "" for k in made.labels.tolist()]
        if self.texts:
            found["text"] = more["texts"]
        if self.images is not None:
            found["of"] = [self.images.names[row % len(self.images)] for row in rows]
        found["shown"] = images[: max(0, SHOWN - first)].numpy()[:, None]
        return found


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_parts(model: LZN, options: argparse.Namespace) -> None:
    """Collective."""
    work = Work(model, options)
    pictures = options.do in ("generate", "reconstruct")
    main_process = Topology.current().is_main
    with ExitStack() as held:
        parts = Parts(options.output, work.request(), options.overwrite)
        once(lambda: held.enter_context(parts.held()))
        if pictures:
            once(lambda: options.output.mkdir(parents=True, exist_ok=True))
        count = -(-work.count // options.batch)
        todo = once(lambda: parts.missing(count))
        if main_process and len(todo) < count:
            print(f"going on: {count - len(todo)} of {count} parts are there", file=sys.stderr)
        if any(_needs_reference(model, options)) and main_process:
            print("computing the anchors that samples are seen among", file=sys.stderr)
        shown = tqdm(total=work.count, desc=options.do, unit="sample", disable=not main_process, file=sys.stderr)
        ranks = Topology.current().world_size

        def one(number: int) -> None:
            rows = range(todo[number] * options.batch, min(work.count, (todo[number] + 1) * options.batch))
            found, damaged = work.part(rows)
            found["left_out"] = [name for name, _ in damaged]
            found["left_out_why"] = [why for _, why in damaged]
            parts.keep(todo[number], found)
            shown.update(min(len(rows) * ranks, work.count - shown.n))

        shown.update(work.count - sum(len(_rows(number, options.batch, work.count)) for number in todo))
        spread(len(todo), one)
        shown.close()
        once(lambda: _finish(work, parts, count))


def _rows(part: int, size: int, count: int) -> range:
    return range(part * size, min(count, (part + 1) * size))


def _needs_reference(model: LZN, options: argparse.Namespace) -> list[bool]:
    """Whether anchors have to be computed first, of each data type."""
    wanted = options.do in ("classify", "reconstruct") or getattr(options, "what", "") == "latent"
    names = [name for name in ("image", "text") if model.networks.find(name, "encoder") is not None]
    return [wanted and model.has_latents and name not in model.reference for name in names]


def _finish(work: Work, parts: Parts, count: int) -> None:
    """From the parts to what was asked for; says what was left out."""
    options, output = work.options, work.options.output
    asked = work.asked or work.images
    left_out = list(asked.left_out) if asked else []
    own = ("left_out", "left_out_why", "shown", "probabilities")
    kept = []  # the parts with something in them: vectors may be many, and are read one part at a time
    done = 0
    for number in range(count):
        part = parts.read(number, ("name", "left_out", "left_out_why"))
        left_out += zip(part["left_out"].tolist(), part["left_out_why"].tolist(), strict=True)
        done += len(part.get("name", ()))
        kept += [number] if len(part.get("name", ())) else []
    if not done:
        for name, why in left_out[:NAMED]:
            print(f"left out: {printable(name)}: {printable(why)}", file=sys.stderr)
        parts.done()
        raise InferError("none of them can be read")
    if options.do == "embed":
        write_vectors(output, (parts.read(number, but=own) for number in kept))
        shape = parts.read(kept[0], ("embedding",))["embedding"].shape[1:]
        wrote = f"{output}: {done:,} vectors of {'×'.join(map(str, shape))} numbers"
    else:
        found = [parts.read(number) for number in kept]
        rows = [
            {key: part[key][row].item() if hasattr(part[key][row], "item") else part[key][row]
             for key in ("name", *(key for key in part if key not in (*own, "name")))}
            for part in found for row in range(len(part["name"]))
        ]  # fmt: skip
        if output.suffix == ".jsonl" and "probabilities" in found[0]:
            shares = [row.tolist() for part in found for row in part["probabilities"]]
            for row, share in zip(rows, shares, strict=True):
                row["probabilities"] = [round(value, 6) for value in share]
        if options.do in ("generate", "reconstruct"):
            write_table(output / "list.csv", rows)
            _grid(np.concatenate([part["shown"] for part in found if len(part["shown"])]), output / "grid.png")
            wrote = f"{output}: {done:,} images, list.csv, grid.png"
        else:
            write_table(output, rows)
            wrote = f"{output}: {done:,} rows"
    where = ""
    if left_out:
        listed = output.with_name(output.name + ".left_out.csv")
        write_table(listed, [{"name": name, "why": why} for name, why in left_out])
        where = f"; {len(left_out)} left out, listed in {listed}"
        for name, why in left_out[:NAMED]:
            print(f"left out: {printable(name)}: {printable(why)}", file=sys.stderr)
    parts.done()
    print(wrote + where)


def _interpolate(model: LZN, options: argparse.Namespace) -> None:
    """One picture."""
    ends: list[Any] = []
    for text in options.ends:
        path = path_argument(text)
        is_file = path.is_file()
        if not is_file and not model.has_text:
            raise InferError(f"{text}: no such file, and this model takes no text")
        ends.append(path if is_file else text)
    images = model.interpolate(ends[0], ends[1], options.n, options.seed).float().cpu()
    _grid(images[None].numpy().swapaxes(0, 1), options.output, columns=len(images))
    print(f"{options.output}: {len(images)} images")


def _labels(text: str, model: LZN) -> list[int]:
    """Classes by number or by name."""
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if part in model.classes:
            found.append(model.classes.index(part))
        elif part.isdigit() and int(part) < len(model.classes):
            found.append(int(part))
        else:
            names = ", ".join(model.classes[:10])
            raise InferError(f"--labels: there is no class {part!r}: 0 to {len(model.classes) - 1} ({names}…)")
    return found


def _texts(text: str) -> list[str]:
    """A text, or those of a file, one a line."""
    if not text:
        return []
    if re.search(r"\.txt$", text, re.IGNORECASE):
        asked = asked_for([text])
        if asked.kind != "text":
            raise InferError(f"{text} holds no texts")
        return list(asked.texts)
    return captions_of(text.encode("utf-8", "surrogateescape"))


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Where consecutive numbers begin and end."""
    cuts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [value for part in parts for value in part]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _file(number: int, name: str = "") -> str:
    plain = re.sub(r"[^\w.-]+", "_", name)[:80]
    return f"{number:06d}{'_' + plain if plain else ''}.png"


def _save(path: Path, image: Tensor) -> None:
    """One image [c, h, w] in [−1, 1] as PNG."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def _grid(shown: np.ndarray, path: Path, columns: int = 0) -> None:
    """A picture of images [n, k, c, h, w]: the k of each below one another; enlarged where they are small."""
    n, k = shown.shape[:2]
    columns = columns or min(n, 16)
    rows = [
        torch.from_numpy(shown[start : start + columns, each]) for start in range(0, n, columns) for each in range(k)
    ]
    full = [torch.cat((row, row.new_ones(columns - len(row), *row.shape[1:]))) for row in rows]
    canvas = mosaic(torch.cat(full), columns)
    image = Image.fromarray((canvas * 255).round().astype(np.uint8))
    factor = max(1, min(8, 96 // shown.shape[-1]))
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    sys.exit(command(main))
