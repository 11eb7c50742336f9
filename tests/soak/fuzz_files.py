"""Flipped bits, changed bytes, cuts and zeros in every kind of file that is kept, and then the use of it.

python -m tests.soak.fuzz_files [--count N] [--seed S]

A run and its job, its checkpoints, a data set, copies of a server's shards, a preparation that was stopped, statistics
and a linear probe: of each file one copy after the other is damaged and used. It may be refused in one line, read as it
was, made anew, or, where one line of many is damaged, told. It may not end in a traceback, hang, take gigabytes, lose
what was not damaged, or be taken for something else. tests/test_damage.py does a little of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import lzn_dist
from lzn_dist import evaluate, train
from lzn_dist.cluster.job import Job, note
from lzn_dist.cluster.profile import ProfileError, load_profile
from lzn_dist.cluster.watch import look_at, table
from lzn_dist.config import ConfigError, load_config
from lzn_dist.data import ShardIndex
from lzn_dist.data import storage as storage_module
from lzn_dist.data.pixels import Exact
from lzn_dist.data.shards import ShardedDataset
from lzn_dist.engines.launch import Launch, build_accelerator
from lzn_dist.evaluation.distribution import Moments
from lzn_dist.evaluation.fid import Statistics, _kept
from lzn_dist.evaluation.linear_probe import ProbeSettings, _begin
from lzn_dist.prepare.digits import write_digits
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Options, PrepareError, check, prepare
from lzn_dist.tools.inspect import describe
from lzn_dist.training.checkpoint import CheckpointError
from lzn_dist.training.run_folder import RunFolder, read_lines
from lzn_dist.training.setup import build_state, checkpoint_to_resume
from lzn_dist.training.step import TrainState
from tests.helpers.range_server import serve
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.global_batch=24", *encoder_with(channels=4), *decoder_with(channels=4), "latent.dim=4", "latent.steps=3",
    "alignment.steps=3", *decoder_with(attention_resolutions=[]), *encoder_with(channel_multipliers=[1]),
    *decoder_with(channel_multipliers=[1]), "evaluation.samples_per_class=2", "evaluation.alignment_steps=3",
    "evaluation.batch=40", "evaluation.noise_scales=[0.5]", "flow.sampler_steps=2", "log_every=1", "checkpoint_every=2",
    "max_steps=4", "tracking.wandb=disabled", "data.embedded=none",
]  # fmt: skip
SECONDS = 60  # that the use of a damaged file may take


class Hang(BaseException):
    """Longer than SECONDS."""


@contextmanager
def bounded() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A copy with one fault, and what that is."""
    kind, place = chance.random(), chance.randrange(max(1, len(content)))
    if kind < 0.15 or not content:
        return content[:place], f"cut to {place}"
    if kind < 0.25:
        end = min(len(content), place + chance.choice((4, 512, 4096)))
        if any(content[place:end]):
            return content[:place] + bytes(end - place) + content[end:], f"zeros from {place} to {end}"
    change = 1 << chance.randrange(8) if kind < 0.7 else chance.randrange(1, 256)
    return content[:place] + bytes([content[place] ^ change]) + content[place + 1 :], f"byte {place} ^ {change:#x}"


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def refused(error: Exception) -> str:
    assert str(error).strip() and "\n" not in str(error), f"a refusal that is not one line: {error!r}"
    return "refused"


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and each use of them after damage to one; uses take turns.

    A use says what became of it, and raises AssertionError where something was lost, or became something else.
    """

    name: str
    files: list[Path]
    uses: list[Callable[[], str]]


class World:
    """Everything that is kept on disks, small."""

    def __init__(self, work: Path) -> None:
        self.work, self.run = work, work / "run"
        self.data = write_digits(work / "data")
        config = str(ROOT / "configs" / "digits_joint.yaml")
        self.overrides = [*SMALL, f"data.shards={self.data}", f"output_dir={self.run}"]
        assert train.main([config, *self.overrides]) == 0
        with (self.run / "bad_samples.jsonl").open("w") as file:
            for row in range(3):
                file.write(json.dumps({"step": 1, "epoch": 0, "row": row, "sample": f"shard {row}"}) + "\n")
        (self.run / "job").mkdir()
        Job(str(self.run), str(self.run / "job" / "1"), "ddp", 1, 1, 0, ("train",), True, "local", 1.0, "17").save()
        for event in ("start", "end", "start"):
            note(self.run, event, job="17", **({"status": 1} if event == "end" else {"restart": 0}))
        self.config = load_config(config, self.overrides)
        self.launch = Launch.asked()
        self.accelerator = build_accelerator(self.config, self.launch)
        self.model = lzn_dist.load(self.run)
        self.weights = digest(dict(self.model.networks.state_dict()))
        self.state = self._state_digest(self._resumed())
        self.settings = ProbeSettings(1, 40)
        assert evaluate.main([str(self.run), "--quick", "--no-figures", "--probe-epochs", "1", "--probe-batch", "40",
                              "--output", str(work / "measures")]) == 0  # fmt: skip
        self.probe = work / "measures" / "linear_probe.pt"
        self.began = self._probe_digest()
        self.statistics = work / "statistics.npz"
        some = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
        Statistics(Moments.of(some), Moments.of(some[:, :4]), some, np.zeros((0, 0), np.float32)).save(self.statistics)
        self.profile = work / "profile.yaml"
        shutil.copy(ROOT / "slurm" / "profiles" / "example.yaml", self.profile)
        self.samples = self._samples(self.data, "")
        storage_module.BLOCK = 1 << 15
        server = serve(self.data, 0, None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url, self.cache = f"http://127.0.0.1:{server.server_port}", work / "cache"
        assert self._samples(self.url, str(self.cache)) == self.samples
        self._stop_a_preparation()

    # ── uses ──

    def kinds(self) -> list[Kind]:
        step = self.run / "checkpoints" / "step_00000004"
        return [
            Kind("checkpoint: small files", [step / name for name in (".metadata", "run.json", "config.yaml",
                 "SHA256SUMS")] + [self.run / "checkpoints" / "latest"], [self.load, self.resume]),
            Kind("checkpoint: tensors", sorted(step.glob("*.distcp")), [self.load, self.resume]),
            Kind("run: lines", [self.run / f"{name}.jsonl" for name in ("metrics", "eval", "bad_samples")],
                 [self.lines, self.lines, self.lines, self.status]),
            Kind("run and job: state", [self.run / name for name in ("status.json", "lock.json", "config.yaml",
                 "job/job.json", "job/attempts.jsonl")], [self.status, self.take]),
            Kind("data set: manifest, index", sorted([self.data / "manifest.json", *self.data.glob("*.npz")]),
                 [self.read_data, self.inspect, self.start]),
            Kind("data set: shards", sorted(self.data.glob("*.tar")), [self.read_shards]),
            Kind("copies of a server's shards", sorted(path for path in self.cache.rglob("*") if path.is_file()),
                 [self.read_copies]),
            Kind("preparation that was stopped", sorted(path for path in self.stopped.rglob("*") if path.is_file()),
                 [self.prepare_on]),
            Kind("statistics of real images", [self.statistics], [self.measure]),
            Kind("linear probe", [self.probe], [self.go_on_with_probe]),
            Kind("profile", [self.profile], [self.read_profile]),
        ]  # fmt: skip

    def load(self) -> str:
        try:
            model = lzn_dist.load(self.run)
        except (CheckpointError, ConfigError) as error:
            return refused(error)
        assert digest(dict(model.networks.state_dict())) == self.weights, "other weights"
        return "as it was"

    def resume(self) -> str:
        try:
            state = self._resumed()
        except (CheckpointError, ConfigError) as error:
            return refused(error)
        assert self._state_digest(state) == self.state, "another state"
        return "as it was"

    def lines(self) -> str:
        """What a run that is started again does: lines up to the checkpoint stay, damaged ones too."""
        files = [self.run / f"{name}.jsonl" for name in ("metrics", "eval", "bad_samples")]
        before = [path.read_bytes().split(b"\n") for path in files]
        folder = RunFolder(self.run).take()
        folder.trim(4)
        lost = 0
        for path, lines in zip(files, before, strict=True):
            kept = path.read_bytes().split(b"\n")
            whole = [line for line in lines[:-1] if not self._past(line)]
            assert [line for line in kept if line] == [line for line in whole if line], f"{path.name} lost lines"
            needs = ("step", "epoch") if path.name == "bad_samples.jsonl" else ("step",)
            lost += len([line for line in whole if line]) - len(read_lines(path, needs))
        return "told" if lost else "as it was"

    @staticmethod
    def _past(line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] > 4)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    def status(self) -> str:
        row = look_at(self.run)
        assert table([row])
        return "told" if "damaged" in row.last_error else "as it was" if row.state == "finished" else "shown"

    def take(self) -> str:
        """A start: the folder can be taken, and nobody has it twice."""
        first, second = RunFolder(self.run).take(), RunFolder(self.run).take()
        assert second.incarnation == first.incarnation + 1
        return "made anew"

    def read_data(self) -> str:
        try:
            samples = self._samples(self.data, "")
        except (ValueError, OSError) as error:
            return refused(error)
        return "as it was" if samples == self.samples else self._found_by_check()

    def inspect(self) -> str:
        try:
            assert describe(ShardIndex.load(self.data))
        except (ValueError, OSError) as error:
            return refused(error)
        return "shown"

    def start(self) -> str:
        """Evaluation, where it refuses: the entry point's own words."""
        try:
            ShardIndex.load(self.data)
        except (ValueError, OSError):
            assert evaluate.main([str(self.run), "--quick", "--no-figures", "--output", str(self.work / "m")]) == 2
            return "refused"
        return "as it was"

    def read_shards(self) -> str:
        """Training takes shards as they are (their bytes are compared by check.py): single samples are replaced."""
        try:
            index = ShardIndex.load(self.data)
            for split in index.splits:
                dataset = ShardedDataset(index, split, 1, Exact(8), num_classes=10)
                dataset.read_or_replace(np.arange(len(dataset)))
        except (ValueError, OSError) as error:
            refused(error)
        return self._found_by_check()

    def _found_by_check(self) -> str:
        try:
            problems = check(self.data, quiet=True)
        except (ValueError, OSError) as error:
            return refused(error)
        assert problems, "check.py finds nothing"
        return "found by check.py"

    def read_copies(self) -> str:
        assert self._samples(self.url, str(self.cache)) == self.samples, "other samples"
        return "as it was, or fetched again"

    def prepare_on(self) -> str:
        try:
            prepare(self._pictures(), self._options(), quiet=True)
        except PrepareError as error:
            return refused(error)
        same = all((self.stopped / path.name).read_bytes() == path.read_bytes() for path in self.whole.iterdir())
        if same:
            return "as it was, or made anew"
        assert check(self.stopped, quiet=True), "other shards"
        return "found by check.py"

    def measure(self) -> str:
        found = _kept(self.statistics)
        if found is None:
            return "made anew"
        assert digest(self._arrays(found)) == self.kept, "other statistics"
        return "as it was"

    def go_on_with_probe(self) -> str:
        try:
            found = self._probe_digest()
        except ConfigError as error:
            return refused(error)
        assert found == self.began, "another probe"
        return "as it was"

    def read_profile(self) -> str:
        try:
            load_profile(str(self.profile))
        except ProfileError as error:
            return refused(error)
        return "read"

    # ── what they read ──

    def _resumed(self) -> TrainState:
        with ExitStack() as held:
            checkpoint = checkpoint_to_resume(self.config, held)
            return build_state(self.config, self.launch, self.accelerator, checkpoint)

    @staticmethod
    def _state_digest(state: TrainState) -> str:
        engine = state.engine
        parts = {"weights": engine.weights(), **engine.moments()}
        found = {f"{key}.{name}": piece.data for key, pieces in parts.items() for name, piece in pieces.items()}
        found |= {f"ema.{name}": value for name, value in state.ema.shadow.items()}
        return digest(found) + str(state.counters)

    def _samples(self, folder: str | Path, cache: str) -> str:
        index = ShardIndex.load(folder, cache, retry_seconds=2)
        found: dict[str, torch.Tensor] = {}
        for split in sorted(index.splits):
            dataset = ShardedDataset(index, split, 1, Exact(8), num_classes=10)
            pixels, labels = dataset.read(np.arange(len(dataset)))
            found |= {f"{split}.pixels": pixels, f"{split}.labels": labels}
        return digest(found)

    def _probe_digest(self) -> str:
        probe, optimizer, epoch = _begin(self.model, self.settings, self.probe)
        moments = {
            f"{number}.{name}": value
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return digest(dict(probe.state_dict()) | moments) + str(epoch)

    @staticmethod
    def _arrays(found: Statistics) -> dict[str, torch.Tensor]:
        arrays: dict[str, Any] = {
            "a": found.pool.mean, "b": found.pool.covariance, "c": found.spatial.mean, "d": found.spatial.covariance,
            "e": found.first, "n": np.array([found.pool.count]),
        }  # fmt: skip
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _pictures(self) -> ImageFolder:
        return ImageFolder(self.work / "pictures", True)

    def _options(self, output: Path | None = None) -> Options:
        return Options(output or self.stopped, samples_per_shard=4, processes=1)

    def _stop_a_preparation(self) -> None:
        """`whole`: as it ends; `stopped`: the same, stopped at its third shard."""
        self.stopped, self.whole = self.work / "stopped", self.work / "whole"
        for number in range(16):
            path = self.work / "pictures" / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), 10 * number, np.uint8)).save(path)
        prepare(self._pictures(), self._options(self.whole), quiet=True)
        source = self._pictures()
        read, left = source.read, iter(range(10))

        def stop_in_time(item: Any) -> bytes:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return read(item)

        source.read = stop_in_time  # type: ignore[method-assign]
        try:
            prepare(source, self._options(), quiet=True)
        except KeyboardInterrupt:
            (self.stopped / ".lock").unlink(missing_ok=True)
        self.kept = digest(self._arrays(Statistics.load(self.statistics)))

    @contextmanager
    def unchanged(self, kind: Kind) -> Iterator[None]:
        """What a use changes is put back."""
        folders = {self.run, self.stopped} & {parent for path in kind.files for parent in path.parents}
        kept = {folder: self.work / f"kept {folder.name}" for folder in folders}
        single = {path: path.read_bytes() for path in kind.files} if not folders else {}
        for folder, copy in kept.items():
            if not copy.exists():
                shutil.copytree(folder, copy)
        try:
            yield
        finally:
            for folder, copy in kept.items():
                shutil.rmtree(folder)
                shutil.copytree(copy, folder)
            for path, content in single.items():
                path.write_bytes(content)


def fuzz(world: World, count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Name of the kind, what became of it, and the fault where it was lost, in turns over all kinds."""
    chance = random.Random(seed)
    kinds = world.kinds()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        turn = number // len(kinds)
        path, use = kind.files[turn % len(kind.files)], kind.uses[turn // len(kind.files) % len(kind.uses)]
        said = io.StringIO()
        with world.unchanged(kind):
            content, fault = damaged(path.read_bytes(), chance)
            path.write_bytes(content)
            try:
                with bounded(), redirect_stderr(said), redirect_stdout(said):
                    end, lost = use(), ""
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                end = f"LOST: {type(error).__name__}"
                lost = f"{path.relative_to(world.work)}, {fault}, {use.__name__}: {error!r:.300}"
        yield kind.name, end, lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="faults (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    ends: Counter[tuple[str, str]] = Counter()
    losses: list[str] = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        world = World(Path(work))
        for name, end, lost in tqdm(fuzz(world, options.count, options.seed), total=options.count, unit="fault"):
            ends[name, end] += 1
            if lost:
                losses.append(lost)
                tqdm.write(lost)
    for (name, end), count in sorted(ends.items()):
        print(f"{count:6,}  {name}: {end}")
    print(f"{len(losses)} of {options.count:,} faults lost something")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
