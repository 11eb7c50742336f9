"""Write a trained model as one folder that needs neither the run nor its data: lzn_dist export RUN DIR

DIR then holds the averaged weights (safetensors), the configuration, the anchors of the first training samples, among
which others are seen, the tokenizer of a model of text, a model card with the run's measures and pictures, and the
encoders for transformers (DIR/encoder, DIR/text_encoder). lzn_dist.load(DIR) uses it as it would use the run, with the
same results; LZN.from_pretrained and push_to_hub are huggingface_hub's. --onnx and --programs write encoder,
classifier, decoder step and a sampling loop as ONNX graphs and as torch.export programs. ResNets also come under the
names that torchvision and timm give them (DIR/encoder/torchvision.safetensors), where the layers are theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lzn_dist.config import ConfigError
from lzn_dist.data import CorruptSampleError
from lzn_dist.exchange import ExportError, Loaded, card, write_export
from lzn_dist.exchange.folder import save_tensors
from lzn_dist.exchange.for_transformers import can_be_written, torchvision_weights, write_encoder
from lzn_dist.exit_status import REFUSED, status_of, told
from lzn_dist.inference import LZN, load
from lzn_dist.inference.loading import ALL
from lzn_dist.pages.report import PICTURES, numbers
from lzn_dist.paths import path_argument
from lzn_dist.terminal import TRUST, command
from lzn_dist.training.checkpoint import CheckpointError


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--checkpoint", type=path_argument, metavar="PATH", help="instead of RUN's newest")
    parser.add_argument(
        "--anchors", default="10000", metavar="N",
        help="of how many training samples the anchors come along: a number, all, or 0 (default: 10000)",
    )  # fmt: skip
    parser.add_argument("--license", default="mit", help="of the weights, as the Hub names it (default: mit)")
    parser.add_argument("--onnx", action="store_true", help="also ONNX graphs (needs onnx and onnxscript)")
    parser.add_argument("--programs", action="store_true", help="also torch.export programs")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 74 where data is away, 2 for what the user must mend; said in one
    line."""
    options = parse(arguments)
    folder: Path = options.folder
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or next(folder.iterdir(), None)):
            raise ExportError(f"{folder} is there already: name another folder, or remove it")
        if options.anchors != "all" and not options.anchors.isdigit():
            raise ExportError(f"--anchors {options.anchors}: a number, or all")
        if not options.run.is_dir():
            raise FileNotFoundError(f"no run in {options.run}: give the output_dir of a training run")
        if options.onnx:
            _need("onnx", "onnxscript")
        model = load(options.checkpoint or options.run, options.trust)
        wanted = ALL if options.anchors == "all" else int(options.anchors)
        if wanted:
            _gather(model, wanted)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            lines = write(model, beside, options)
            if folder.is_dir():
                folder.rmdir()
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (CheckpointError, ConfigError, CorruptSampleError, ExportError, OSError, ValueError) as error:
        said = told(error, folder) if isinstance(error, OSError) else str(error)
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return REFUSED if isinstance(error, FileNotFoundError) else status_of(error)
    for line in lines:
        print(line)
    print(f"written: {folder} (lzn_dist.load({str(folder)!r}))")
    return 0


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ExportError(f"--onnx needs {' and '.join(missing)}: pip install 'lzn_dist[export]'")


def _gather(model: LZN, wanted: int) -> None:
    """The reference's anchors, with progress."""
    with tqdm(desc="anchors", unit="sample", file=sys.stderr, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model._show = show
        try:
            model.gather_reference(wanted)
        except FileNotFoundError as error:
            raise ExportError(f"{error}; --anchors 0 leaves them out") from error


def write(model: LZN, folder: Path, options: argparse.Namespace) -> list[str]:
    """Everything, into a folder that is there; returns lines that say what there is."""
    parts = model.parts()
    write_export(folder, parts)
    lines = [f"{name}: {len(anchors):,} anchors" for name, anchors in parts.reference.items()]
    if model.has_latents and not parts.reference:
        lines.append("no anchors: where the training data is not, latents and classes cannot be computed")
    for name, place in (("image", "encoder"), ("text", "text_encoder")):
        network = parts.networks.find(name, "encoder")
        if network is None:
            continue
        if not can_be_written(network):
            lines.append(f"not for transformers: {name}.encoder is a {type(network).__name__}, which is not of ours")
            continue
        (folder / place).mkdir()
        write_encoder(folder / place, parts, name)
        weights = torchvision_weights(network)
        if weights is not None:
            save_tensors(weights, folder / place / "torchvision.safetensors")
        lines.append(f"{place}: for transformers" + (", and under torchvision's and timm's names" if weights else ""))
    for kind, wanted in (("onnx", options.onnx), ("pt2", options.programs)):
        if wanted:
            lines.append(f"{kind}: {', '.join(_programs(parts, folder / kind, kind))}")
    source: Path = (options.checkpoint or options.run).resolve()
    # of a checkpoint, the run that it stands in; a copy elsewhere has none
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    measures, measured_on = _measures(run, parts.step)
    if not measures:
        lines.append(f"no measures on the card: lzn_dist evaluate {run} takes those of step {parts.step}")
    pictures = []
    for name in PICTURES:
        picture = run / "figures" / f"{name}.png"
        if picture.is_file():
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / "figures" / picture.name)
            pictures.append(f"figures/{picture.name}")
    text = card(parts, measures, measured_on, pictures, options.license)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return lines


def _programs(parts: Loaded, folder: Path, kind: str) -> list[str]:
    from lzn_dist.exchange.programs import write_programs

    folder.mkdir()
    return list(
        tqdm(write_programs(folder, parts, kind), desc=kind, unit="file", file=sys.stderr, disable=None, leave=False)
    )


def _measures(run: Path, step: int) -> tuple[dict[str, float], str]:
    """Those of this very step, of evaluation.json, and on what they were taken."""
    try:
        found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    except (OSError, ValueError):
        return {}, ""
    if found.get("step") != step:
        return {}, ""
    on = found.get("measured_on", {})
    kind = "held-out" if on.get("held_out") else "training"
    said = f"On split {on.get('split')}: {on.get('images', 0):,} {kind} images."
    return numbers(found), said if on else ""


if __name__ == "__main__":
    sys.exit(command(main))
