"""Data: images per second and core for decoding and two views, for several libraries, and the stream beside its limits.

    python tests/benchmarks/data.py [--quick] [--output FILE]

500x375 JPEGs (quality 90, smooth colours with noise: about as many bytes as ImageNet's). One core: every choice runs
in one thread. "decode": bytes to pixels. "decode and two crops": also two random resized crops of 224x224, with the
same boxes for all. Choices that are not installed are left out and named. All choices take turns over the same images;
the figure is the best turn.

The stream: whole batches through BatchStream, against the sum of raw decoding and the arithmetic of the views, measured
alone in the same turns. The rest of a view (mirror, colours, grey, blur) is batch arithmetic on the training device;
what it costs on this CPU is a row of its own. Then tiny samples (8x8 PNG with a label) per second and core, beside
Pillow decoding alone; the stream with captions beside it without; and reading, without decoding, from shards against
the same images as loose files.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from common import machine
from PIL import Image

from lzn_dist.data import (
    BatchStream,
    CaptionReader,
    Exact,
    RandomResizedCrops,
    Reading,
    SampleOrder,
    ShardedDataset,
    ShardIndex,
    SimCLRPolicy,
    load_tokenizer,
    make_views,
    to_unit_range,
)
from lzn_dist.data.pixels import Box, crop_box, decode, resize
from lzn_dist.prepare.digits import write_digits
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Item, Options, prepare

SIZE = 224


def make_jpegs(count: int, height: int = 375, width: int = 500) -> list[bytes]:
    chance = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = chance.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + chance.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def torch_image(content: bytes) -> torch.Tensor:
    return torch.from_numpy(decode(content, 3)).permute(2, 0, 1).unsqueeze(0)


def decoders() -> dict[str, Callable[[bytes], object]]:
    return {
        "Pillow": lambda content: np.asarray(pil(content)),
        "OpenCV": lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB),
        "simplejpeg (libjpeg-turbo)": lambda content: simplejpeg.decode_jpeg(content),
        "simplejpeg at 1/2": lambda content: simplejpeg.decode_jpeg(content, min_height=188, min_width=250),
        "lzn_dist.decode": lambda content: decode(content, 3),
    }


def croppers() -> dict[str, Callable[[bytes, list[Box]], object]]:
    def with_pillow(content: bytes, boxes: list[Box]) -> object:
        image = pil(content)
        return [
            np.asarray(image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            for y, x, h, w in boxes
        ]

    def with_opencv(content: bytes, boxes: list[Box]) -> object:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        return [cv2.resize(image[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
                for y, x, h, w in boxes]  # fmt: skip

    def with_torch(content: bytes, boxes: list[Box]) -> object:
        pixels = simplejpeg.decode_jpeg(content)
        return [resize(pixels, (SIZE, SIZE), box) for box in boxes]

    def with_float_tensors(content: bytes, boxes: list[Box]) -> object:
        image = torch_image(content).float()
        return [F.interpolate(image[:, :, y : y + h, x : x + w], (SIZE, SIZE), mode="bilinear", antialias=True)
                for y, x, h, w in boxes]  # fmt: skip

    found: dict[str, Callable[[bytes, list[Box]], object]] = {
        "Pillow": with_pillow,
        "OpenCV (INTER_AREA: another filter)": with_opencv,
        "simplejpeg + torch, float": with_float_tensors,
        "simplejpeg + torch, 8-bit": with_torch,
    }
    try:
        from kornia.geometry.transform import crop_and_resize

        def with_kornia(content: bytes, boxes: list[Box]) -> object:
            image = torch_image(content).float()
            corners = [[[x, y], [x + w - 1, y], [x + w - 1, y + h - 1], [x, y + h - 1]] for y, x, h, w in boxes]
            return crop_and_resize(image.expand(len(boxes), -1, -1, -1), torch.tensor(corners).float(), (SIZE, SIZE))

        found["simplejpeg + kornia (no antialiasing)"] = with_kornia
    except ImportError:
        print("kornia is not installed: left out", file=sys.stderr)
    return found


def turns(choices: dict[str, Callable[[], object]], count: int, repeats: int) -> dict[str, float]:
    """Seconds an item of each choice: the best of several turns, in alternating order."""
    best = dict.fromkeys(choices, float("inf"))
    for turn in range(repeats):
        names = list(choices) if turn % 2 == 0 else list(choices)[::-1]
        for name in names:
            began = time.perf_counter()
            choices[name]()
            best[name] = min(best[name], (time.perf_counter() - began) / count)
    return best


def table(title: str, rows: dict[str, float], limit: str) -> list[str]:
    lines = [f"| {title} | images/s and core | time against {limit} |", "|---|---|---|"]
    lines += [f"| {name} | {1 / value:,.0f} | {value / rows[limit]:.2f} |" for name, value in rows.items()]
    return [*lines, ""]


def bench_libraries(jpegs: list[bytes], repeats: int) -> list[str]:
    numbers = np.random.default_rng(1).random((len(jpegs), 2, 10, 4))
    boxes = [[crop_box(375, 500, view, (0.08, 1.0), (3 / 4, 4 / 3)) for view in image] for image in numbers]
    decoding: dict[str, Callable[[], object]] = {
        name: lambda f=function: [f(content) for content in jpegs]  # type: ignore[misc]
        for name, function in decoders().items()
    }
    cropping: dict[str, Callable[[], object]] = {
        name: lambda f=function: [f(content, box) for content, box in zip(jpegs, boxes, strict=True)]  # type: ignore[misc]
        for name, function in croppers().items()
    }
    lines = table("decode", turns(decoding, len(jpegs), repeats), "simplejpeg (libjpeg-turbo)")
    return lines + table("decode and two crops", turns(cropping, len(jpegs), repeats), "simplejpeg + torch, 8-bit")


def bench_stream(folder: Path, jpegs: list[bytes], repeats: int) -> list[str]:
    """Whole batches: decode, two crops, and with colours; against raw decoding and the views' arithmetic alone."""
    dataset = ShardedDataset(ShardIndex.load(folder / "shards"), "train", 3, RandomResizedCrops(SIZE, 0))
    batch = min(32, len(jpegs))
    count = len(jpegs) // batch * batch
    stream = BatchStream(dataset, SampleOrder([s.samples for s in dataset.table.shards], batch, 0))
    decoded = [decode(content, 3) for content in jpegs[:count]]
    boxes = [
        [crop_box(375, 500, view, (0.08, 1.0), (3 / 4, 4 / 3)) for view in image]
        for image in np.random.default_rng(1).random((count, 2, 10, 4))
    ]
    pixels = stream.batch(0).pixels
    policy, index = SimCLRPolicy(), torch.arange(batch)

    def raw() -> None:
        for content in jpegs[:count]:
            simplejpeg.decode_jpeg(content)

    def crops() -> None:
        for image, box in zip(decoded, boxes, strict=True):
            for one in box:
                resize(image, (SIZE, SIZE), one)

    def colours() -> None:
        for _ in range(count // batch):
            make_views([to_unit_range(view) for view in pixels], index, 0, 0, policy)

    def batches(with_colours: bool) -> None:
        for k in range(count // batch):
            found = stream.batch(k)
            if with_colours:
                make_views([to_unit_range(view) for view in found.pixels], found.index, 0, 0, policy)

    found = turns(
        {"raw decode": raw, "two crops": crops, "colours": colours, "stream": lambda: batches(False),
         "stream and colours": lambda: batches(True)}, count, repeats,
    )  # fmt: skip
    limit = found["raw decode"] + found["two crops"]
    whole = limit + found["colours"]
    return [
        "| one core, an image and its two views | ms |", "|---|---|",
        f"| raw decode alone | {1e3 * found['raw decode']:.2f} |",
        f"| arithmetic of the two crops alone | {1e3 * found['two crops']:.2f} |",
        f"| mirror, colours, grey and blur of both views, as a batch | {1e3 * found['colours']:.2f} |",
        f"| stream: read, decode, two crops | {1e3 * found['stream']:.2f} |",
        f"| stream and colours | {1e3 * found['stream and colours']:.2f} |", "",
        f"- stream: {1 / found['stream']:,.0f} images/s and core, {found['stream'] / limit:.2f} times raw decode plus "
        "the crops' arithmetic (target: 1.3)",
        f"- with colours: {1 / found['stream and colours']:,.0f} images/s and core, "
        f"{found['stream and colours'] / whole:.2f} times raw decode plus all the views' arithmetic (target: 1.3)", "",
    ]  # fmt: skip


def bench_tiny(folder: Path, repeats: int) -> list[str]:
    index = ShardIndex.load(write_digits(folder / "digits"))
    dataset = ShardedDataset(index, "train", 1, Exact(8))
    stream = BatchStream(dataset, SampleOrder([s.samples for s in dataset.table.shards], 256, 0))
    rows = np.arange(1280)
    files = [content.image for content in dataset._contents(rows)]  # type: ignore[union-attr]

    def pillow() -> None:
        for content in files:
            np.asarray(Image.open(io.BytesIO(content)))  # type: ignore[arg-type]

    found = turns(
        {"Pillow, decode alone": pillow, "stream": lambda: [stream.batch(k) for k in range(5)]}, 1280, 3 * repeats
    )
    return [
        f"- tiny samples (8x8 PNG and a label) through the stream: {1 / found['stream']:,.0f} samples/s and core "
        f"(target: 20,000); Pillow decoding them from memory, and nothing else: "
        f"{1 / found['Pillow, decode alone']:,.0f}", "",
    ]  # fmt: skip


class Captioned(ImageFolder):
    """Each image with five captions of ten words."""

    def splits(self) -> dict[str, list[Item]]:
        words = np.array("a small red bird sits on the branch of an old tree in front of two houses".split())  # noqa: SIM905
        chance = np.random.default_rng(0)
        return {
            split: [
                item._replace(captions=tuple(" ".join(chance.choice(words, 10)) for _ in range(5))) for item in items
            ]
            for split, items in super().splits().items()
        }


def bench_captions(folder: Path, count: int, repeats: int) -> list[str]:
    """Images and captions through the stream, beside the images of the same shards alone."""
    prepare(Captioned(folder / "images"), Options(folder / "captioned", samples_per_shard=64), quiet=True)
    index = ShardIndex.load(folder / "captioned")
    reader = CaptionReader(load_tokenizer(index), 32, 0, partial=False)
    digits = ShardIndex.load(folder / "digits")
    tiny = CaptionReader(load_tokenizer(digits), 32, 0, partial=False)

    def stream(index: ShardIndex, reading: Reading, channels: int, reader: CaptionReader | None) -> BatchStream:
        members = {} if reader is None else {"text": reader}
        dataset = ShardedDataset(index, "train", channels, reading, members=members)
        return BatchStream(dataset, SampleOrder([s.samples for s in dataset.table.shards], 32, 0))

    crops = RandomResizedCrops(SIZE, 0)
    choices = {
        "jpeg": stream(index, crops, 3, None), "jpeg, captions": stream(index, crops, 3, reader),
        "tiny": stream(digits, Exact(8), 1, None), "tiny, captions": stream(digits, Exact(8), 1, tiny),
    }  # fmt: skip
    found = turns(
        {name: lambda own=own: [own.batch(k) for k in range(count // 32)] for name, own in choices.items()},  # type: ignore[misc]
        count // 32 * 32, repeats,
    )  # fmt: skip
    tokens = (choices["tiny, captions"].batch(0).members["text"] >= 0).sum().item() / 32
    alone = found["tiny, captions"] - found["tiny"]
    return [
        f"- with captions: {1 / found['jpeg, captions']:,.0f} images/s and core of JPEGs with two crops, "
        f"{1 / found['jpeg']:,.0f} without ({found['jpeg, captions'] / found['jpeg']:.3f} times the time); of 8x8 PNGs "
        f"{1 / found['tiny, captions']:,.0f} and {1 / found['tiny']:,.0f}: a caption is drawn, read and cut into "
        f"{tokens:.0f} tokens in {1e6 * alone:.0f} µs, {tokens / alone:,.0f} tokens/s and core", "",
    ]  # fmt: skip


def bench_shards(folder: Path, jpegs: list[bytes], repeats: int) -> list[str]:
    dataset = ShardedDataset(ShardIndex.load(folder / "shards"), "train", 3, RandomResizedCrops(SIZE, 0))
    rows = np.random.default_rng(0).permutation(len(dataset))
    paths = sorted((folder / "images").rglob("*.jpg"))
    order = np.random.default_rng(0).permutation(len(paths))
    found = turns(
        {"loose": lambda: [paths[i].read_bytes() for i in order], "shards": lambda: dataset._contents(rows)},
        len(jpegs), 3 * repeats,
    )  # fmt: skip
    return [
        f"- reading in random order, from the page cache: shards {1e6 * found['shards']:.0f} µs an image, loose files "
        f"{1e6 * found['loose']:.0f} µs: {found['loose'] / found['shards']:.2f} times", "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images: whether it runs, not what it says")
    parser.add_argument("--output", type=Path, help="write the results there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    count, repeats = (32, 1) if options.quick else (256, 5)
    jpegs = make_jpegs(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, content in enumerate(jpegs):
            path = folder / "images" / str(i % 8) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        prepare(ImageFolder(folder / "images"), Options(folder / "shards", samples_per_shard=64), quiet=True)
        size = statistics.mean(map(len, jpegs)) / 1e3
        lines = ["# Data: decoding, views, the stream", "", f"{count} JPEGs of 500x375, {size:.0f} kB each, one core "
                 f"a choice. {machine()}.", ""]  # fmt: skip
        for part in (
            bench_libraries(jpegs, repeats), bench_stream(folder, jpegs, repeats), bench_tiny(folder, repeats),
            bench_captions(folder, count, repeats), bench_shards(folder, jpegs, repeats),
        ):  # fmt: skip
            print("\n".join(part), flush=True)
            lines += part
    if options.output:
        options.output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
