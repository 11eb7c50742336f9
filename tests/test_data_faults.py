"""Training while data is damaged or goes away: nothing hangs, nothing is lost, and what was replaced is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from lzn_dist import train
from lzn_dist.config import ConfigError, load_config
from lzn_dist.data import ShardIndex
from lzn_dist.distributed import Topology
from lzn_dist.prepare.digits import write_digits
from lzn_dist.training.batches import open_stream
from lzn_dist.training.checkpoint import find_checkpoint
from lzn_dist.training.run import Run
from lzn_dist.training.run_folder import RunFolder
from lzn_dist.training.step import StepResult, TrainState
from tests.helpers.launching import ROOT, forked, launcher, ranks
from tests.helpers.messy import damage
from tests.helpers.range_server import free_port, serve, start_server
from tests.helpers.small_run import SMALL_RUN, rows, small_config

TRAIN = ROOT / "lzn_dist" / "train.py"
CONFIG = ROOT / "configs" / "digits_joint.yaml"
TIMES = ("images_per_second", "seconds", "peak_memory")


def values(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows(folder)]


@pytest.mark.slow
def test_damaged_samples_are_replaced_told_and_in_the_end_too_many(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, shards = digits, Path(shutil.copytree(digits, tmp_path / "damaged"))
    run, strict = tmp_path / "run", tmp_path / "strict"
    arguments = [*SMALL_RUN, "checkpoint_every=30", "precision=float32", "evaluate_every=0", "data.embedded=none"]
    arguments += ["max_steps=9", "data.global_batch=144"]  # an epoch
    order = open_stream(load_config(CONFIG, [*arguments, f"data.shards={shards}"]), Topology())
    names = [damage(shards, kind, int(order.indices(k)[0])) for kind, k in (("png", 1), ("cls", 3), ("png", 5))]
    arguments = [str(CONFIG), *arguments]
    damaged = [*arguments, f"data.shards={shards}"]
    assert train.main([*damaged, f"output_dir={run}"]) == 0
    told = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in told] == [(2, 0), (4, 0), (6, 0)]
    assert all(row["sample"].startswith(f"{name}: ") for row, name in zip(told, names, strict=True))
    said = capfd.readouterr().err
    assert all(f"replaced a damaged sample: {name}" in said for name in names)

    # what was counted before a stop counts after it: the same command does not get a limit of its own
    settings = [f"output_dir={strict}", "data.max_bad_samples=1"]
    for step, count in ((4, 2), (6, 3)):
        assert train.main([*damaged, *settings]) == 2
        said = f"stopped at step {step} with a checkpoint: {count} samples of this epoch are damaged"
        assert said in capfd.readouterr().err
        assert find_checkpoint(strict).name == f"step_{step:08d}"
        assert json.loads((strict / "status.json").read_text())["state"] == "failed"
        assert values(strict) == values(run)[:step]
    # mended, it goes on
    assert train.main([*arguments, *settings, f"data.shards={whole}"]) == 0
    assert [row["step"] for row in rows(strict)] == list(range(1, 10))


UNLABELLED = r"has no labels, which this task needs: use labelled shards, or task=generation"
OTHER_CLASSES = r"data\.num_classes is {}, but .* has 10 classes: set data\.num_classes=10"


@pytest.mark.parametrize(
    "shards,task,overrides,what",
    [
        ("unlabelled", "joint", [], UNLABELLED),
        ("unlabelled", "generation", ["decode=[{class_conditional: true}]"], UNLABELLED),
        ("unlabelled", "representation", ["objective=supervised"], UNLABELLED),
        ("unlabelled", "generation", [], ""),
        ("unlabelled", "representation", [], ""),
        ("digits", "joint", ["data.num_classes=5"], OTHER_CLASSES.format(5)),
        ("digits", "representation", ["objective=supervised", "data.num_classes=11"], OTHER_CLASSES.format(11)),
        ("digits", "representation", ["data.num_classes=5"], ""),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused_at_the_start(
    two_data_sets: Path, shards: str, task: str, overrides: list[str], what: str
) -> None:
    config = small_config(f"data.shards={two_data_sets / shards}", "data.embedded=none", *overrides, task=task)
    if what:
        with pytest.raises(ConfigError, match=what):
            open_stream(config, Topology())
    else:
        assert open_stream(config, Topology()).batch(0).bad == ()


@pytest.fixture(scope="module")
def two_data_sets(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits, and the same unlabelled."""
    folder = tmp_path_factory.mktemp("shards")
    shards = ShardIndex.load(shutil.copytree(digits, folder / "digits"))
    (folder / "unlabelled").mkdir()
    for split in shards.splits.values():
        for shard in split.shards:
            with (
                tarfile.open(folder / "digits" / shard.name) as old,
                tarfile.open(folder / "unlabelled" / shard.name, "w") as new,
            ):
                for member in old:
                    if not member.name.endswith(".cls"):
                        new.addfile(member, old.extractfile(member))
    return folder


@pytest.mark.soak
@pytest.mark.process
def test_a_lost_server_stops_all_ranks_with_a_checkpoint_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    """Two ranks stream over http; the server dies for longer than they wait, and comes back: as if it never had."""
    shards = write_digits(tmp_path / "digits", samples_per_shard=20)
    for row in (1, 700, 1400):
        damage(shards, "png", row)
    port, log = free_port(), tmp_path / "requests.log"
    common = [CONFIG, *SMALL_RUN, "precision=float32", "data.embedded=none", "max_steps=55", "checkpoint_every=40",
              "data.streams=2", "data.shuffle_window=30", "data.cache_decoded=false"]  # fmt: skip
    reference, run = tmp_path / "reference", tmp_path / "run"
    done = ranks("ddp", TRAIN, *common, f"data.shards={shards}", f"output_dir={reference}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]

    remote = [*common, f"data.shards=http://127.0.0.1:{port}", f"data.cache={tmp_path / 'cache'}",
              f"output_dir={run}", "data.retry_seconds=2"]  # fmt: skip
    server = start_server(shards, port, log)
    process = forked(launcher("ddp", TRAIN, *remote), cwd=tmp_path, said=tmp_path / "run.log")
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 5:
        assert process.exitcode is None and time.monotonic() < end
        time.sleep(0.01)
    server.kill()
    server.wait()
    process.join(timeout=120)
    assert process.exitcode not in (None, 0)
    output = (tmp_path / "run.log").read_text()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and 5 <= status["step"] < 55
    assert f"error: stopped at step {status['step']} with a checkpoint: rank " in output
    assert "could not be read" in output and "server is up" in output
    assert find_checkpoint(run).name == f"step_{status['step']:08d}"

    server = start_server(shards, port, log)
    done = ranks("ddp", TRAIN, *remote, cwd=tmp_path)
    server.kill()
    server.wait()
    assert done.returncode == 0, done.stdout[-3000:]
    assert values(run) == values(reference)
    told = [[(row["step"], row["row"]) for row in rows(folder, "bad_samples.jsonl")] for folder in (run, reference)]
    assert told[0] == told[1] and sorted(row for _, row in told[0]) == [1, 700, 1400]  # both ranks' samples


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that a run goes on asking for more."""
    return write_digits(tmp_path_factory.mktemp("small") / "digits", samples_per_shard=10)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["cache", "cache and checkpoints", "run"])
def test_a_full_disk_stops_the_run_in_one_line_that_names_the_folder(
    small_shards: Path, tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once there is space again, it goes on."""
    shards = serve(small_shards, 0, None)
    threading.Thread(target=shards.serve_forever, daemon=True).start()
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = [*remote_arguments(shards.server_port, run, cache), "max_steps=7", "checkpoint_every=3"]
    train_step = train.train_step

    def no_space(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_up(state: TrainState, *rest: Any) -> StepResult:
        if state.counters.step == 3:
            while not (run / "checkpoints" / "step_00000003").exists():
                time.sleep(0.01)
            if full == "run":
                patched.setattr(RunFolder, "append", no_space)
            else:
                patched.setattr(os, "pwrite", no_space)
            if full == "cache and checkpoints":
                patched.setattr(FileSystemWriter, "write_data", no_space)
        return train_step(state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", fill_up)
        assert train.main(arguments) == 2
    (said,) = errors(capfd.readouterr().err)
    newest = find_checkpoint(run)
    if full == "run":
        assert said == f"error: No space left on device: {run}; free some and start again from the newest checkpoint"
    else:
        assert f": rank 0: [Errno 28] No space left on device: copies of shards go to {cache}" in said
        assert ("with a checkpoint: " in said) == (full == "cache")
        unwritten = (
            f"without a new checkpoint, the newest checkpoint is {newest} (OSError(28, 'No space left on device'))"
        )
        assert (unwritten in said) == (full != "cache")
    assert (newest.name == "step_00000003") == (full != "cache")
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert train.main(arguments) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 8))
    shards.shutdown()


@pytest.mark.soak
@pytest.mark.process
def test_a_server_lost_in_the_evaluation_ends_the_run_as_in_training(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint of that step, from which it goes on with the evaluation that is missing."""
    port, log = free_port(), tmp_path / "requests.log"
    server = start_server(digits, port, log)
    run = tmp_path / "run"
    arguments = remote_arguments(port, run, tmp_path / "cache")
    arguments += ["max_steps=2", "evaluate_every=1", "checkpoint_every=100", "data.retry_seconds=0.6"]
    evaluate = train.evaluate

    def lose(run: Run) -> None:
        if run.state.counters.step == lost_at:
            server.kill()
            server.wait()
            shutil.rmtree(tmp_path / "cache")
        evaluate(run)

    monkeypatch.setattr(train, "evaluate", lose)
    for lost_at in (1, 2):
        assert train.main(arguments) == 74
        (said,) = errors(capfd.readouterr().err)
        newest = run / "checkpoints" / f"step_{lost_at:08d}"
        assert f"stopped in the evaluation at step {lost_at}, the newest checkpoint is {newest}: rank 0: http" in said
        assert "could not be read" in said and json.loads((run / "status.json").read_text())["state"] == "failed"
        server = start_server(digits, port, log)
    lost_at = 0
    assert train.main(arguments) == 0
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(run, "eval.jsonl")] == [1, 2]
    assert train.main(arguments) == 0  # nothing is left to do
    assert len(rows(run, "eval.jsonl")) == 2
    server.kill()
    server.wait()


def remote_arguments(port: int, run: Path, cache: Path) -> list[str]:
    return [str(CONFIG), *SMALL_RUN, "precision=float32", "data.embedded=none", "data.streams=2",
            "data.shuffle_window=10", "data.cache_decoded=false", f"data.shards=http://127.0.0.1:{port}",
            f"data.cache={cache}", f"output_dir={run}"]  # fmt: skip
