"""Checkpoints: what comes back, what is never taken for one, and what is refused in one line."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch

from lzn_dist.config import Config, load_config, save_config
from lzn_dist.objectives import build_networks
from lzn_dist.training import checkpoint, format_2
from lzn_dist.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    complete_checkpoints,
    find_checkpoint,
    held_checkpoint,
    load_networks,
    load_weights,
    not_counted,
    resume_state,
    set_aside,
)
from lzn_dist.training.checkpoint_reader import write_sums
from lzn_dist.training.step import TrainState, train_step
from tests.helpers.settings import decoder_with, encoder_with
from tests.helpers.small_run import small_config, small_samples, small_state


def few(*overrides: str) -> Config:
    """A model of few tensors, where the files matter and not what is in them."""
    return small_config(*overrides, *encoder_with(blocks=[1]), task="representation")


def writer(
    folder: Path, config: Config, held: Callable[[], AbstractContextManager[None]] = nullcontext
) -> CheckpointWriter:
    return CheckpointWriter(folder / "checkpoints", config, 1, held)


def trained(config: Config, steps: int) -> TrainState:
    state = small_state(config)
    for _ in range(steps):
        train_step(state, small_samples(state.counters.batch))
    return state


def resumed(config: Config, path: Path) -> TrainState:
    state = small_state(config)
    load_weights(state.engine.networks, path)
    resume_state(state, path)
    return state


@pytest.mark.slow
def test_a_resumed_state_goes_on_bit_by_bit(tmp_path: Path) -> None:
    config = small_config()
    whole = trained(config, 3)
    saver = writer(tmp_path, config)
    saver.save(whole)
    train_step(whole, small_samples(3))  # while the copy is being written
    saver.close()
    parts = resumed(config, find_checkpoint(tmp_path))
    assert (parts.counters.step, parts.counters.batch, parts.ema.num_updates) == (3, 3, 3)
    result = train_step(parts, small_samples(3))
    again = train_step(whole, small_samples(4)), train_step(parts, small_samples(4))
    assert torch.equal(again[0].scalars["loss"], again[1].scalars["loss"]) and result.applied
    for ours, theirs in ((whole.engine.weights(), parts.engine.weights()), *_moments(whole, parts)):
        assert all(torch.equal(piece.data, theirs[name].data) for name, piece in ours.items())
    assert all(torch.equal(value, parts.ema.shadow[name]) for name, value in whole.ema.shadow.items())


def _moments(a: TrainState, b: TrainState):  # type: ignore[no-untyped-def]
    return [(a.engine.moments()[key], b.engine.moments()[key]) for key in ("exp_avg", "exp_avg_sq")]


def test_averaged_weights_and_constants_come_back(tmp_path: Path) -> None:
    config = small_config(*decoder_with(embedding="fourier"))
    state = trained(config, 3)
    saver = writer(tmp_path, config)
    saver.save(state)
    saver.close()
    torch.manual_seed(123)  # the Fourier frequencies are drawn and never trained: they must come from the checkpoint
    networks = build_networks(config)
    load_weights(networks, find_checkpoint(tmp_path), averaged=True)
    found = networks.state_dict()
    assert any(name.endswith(".W") for name in state.engine.buffers)
    assert all(torch.equal(found[name], value) for name, value in state.engine.buffers.items())
    for name, shadow in state.ema.shadow.items():
        assert torch.equal(found[name].view(-1), shadow)
        assert not torch.equal(shadow, state.engine.weights()[name].data) or not shadow.abs().sum()


def test_old_checkpoints_go_and_the_kept_ones_stay(tmp_path: Path) -> None:
    config = few("keep_last=2", "keep_every=4")
    state = small_state(config)
    saver = writer(tmp_path, config)
    for step in range(1, 8):
        state.counters.step = step
        saver.save(state)
    saver.close()
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == [
        "step_00000004", "step_00000006", "step_00000007"
    ]  # fmt: skip
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_what_a_run_does_not_go_on_from_is_set_aside(tmp_path: Path) -> None:
    config = few("keep_last=9")
    state = small_state(config)
    saver, folder = writer(tmp_path, config), tmp_path / "checkpoints"
    for step in (2, 4, 6):
        state.counters.step = step
        saver.save(state)
    saver.close()
    names = ["step_00000002", "step_00000004", "step_00000006"]
    assert set_aside(folder, folder / names[2], 2) is None  # the newest: nothing lies past it
    assert set_aside(folder, folder / names[0], 3) == folder / "superseded" / "3"
    assert [path.name for path in complete_checkpoints(folder)] == names[:1] == [find_checkpoint(tmp_path).name]
    assert (folder / "latest").read_text() == names[0]
    assert [path.name for path in complete_checkpoints(folder / "superseded" / "3")] == names[1:]
    # a start anew, or from another run's checkpoint, has no past here
    assert set_aside(folder, folder / "superseded" / "3" / names[1], 4) == folder / "superseded" / "4"
    assert complete_checkpoints(folder) == [] and not (folder / "latest").exists()


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    config = small_config()
    state = trained(config, 1)
    saver = writer(tmp_path, config)
    saver.save(state)
    saver.wait()
    (tmp_path / "checkpoints" / ".step_00000002.1.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    assert find_checkpoint(tmp_path).name == "step_00000001"
    saver.close()
    writer(tmp_path, config)
    assert not (tmp_path / "checkpoints" / ".step_00000002.1.tmp").exists()  # a new start clears it away


def test_nothing_gets_its_name_once_another_incarnation_has_the_run(tmp_path: Path) -> None:
    @contextmanager
    def refuse() -> Iterator[None]:
        raise RuntimeError("taken over")
        yield

    config = small_config()
    saver = writer(tmp_path, config, refuse)
    saver.save(trained(config, 1))
    with pytest.raises(RuntimeError, match="taken over"):
        saver.close()
    assert not complete_checkpoints(tmp_path / "checkpoints")


def test_a_write_that_fails_is_heard_of(tmp_path: Path) -> None:
    config = small_config()
    saver = writer(tmp_path, config)
    (tmp_path / "checkpoints" / ".step_00000001.1.tmp").write_text("a file where a folder must go")
    saver.save(trained(config, 1))
    with pytest.raises(BaseException, match="tmp"):
        saver.close()
    assert not complete_checkpoints(tmp_path / "checkpoints")


def saved(folder: Path) -> Path:
    config = small_config()
    saver = writer(folder, config)
    saver.save(trained(config, 1))
    saver.close()
    return find_checkpoint(folder)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"another model .* is \[20, 8, 1, 1\] there, \[20, 16, 1, 1\] here"):
        load_weights(build_networks(small_config(*encoder_with(channels=16))), path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_weights(build_networks(small_config()), path)
    (path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(build_networks(small_config()), path)


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for part in path.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"is damaged \(.*\); there is no other$") as refused:
        resumed(small_config(), path)
    assert "\n" not in str(refused.value)
    shutil.copytree(path, path.with_name("step_00000003"))
    record_step(path.with_name("step_00000003"), 3)
    for part in path.glob("*.distcp"):
        part.unlink()
    wanted = rf"\.distcp is missing\); resume=PATH or load\(PATH\) takes another: {path.parent}/step_00000003$"
    with pytest.raises(CheckpointError, match=wanted):
        resumed(small_config(), path)


# ── what a person puts beside them ──────────────────────────────────────────────────────────────────────────────────


def record_step(path: Path, step: int) -> None:
    record = json.loads((path / "run.json").read_text())
    record["counters"]["step"] = step
    (path / "run.json").write_text(json.dumps(record))
    (path / "SHA256SUMS").unlink()


def written(folder: Path, steps: list[int], *overrides: str) -> list[str]:
    """Write checkpoints of these steps; the names of those that are there then."""
    config = few(*overrides)
    state = small_state(config)
    saver = writer(folder, config)
    for step in steps:
        state.counters.step = step
        saver.save(state)
    saver.close()
    return [path.name for path in complete_checkpoints(folder / "checkpoints")]


NAMES = ["step_best", "step_00000004.bak", "step_9", "step_000000009", "step_00000099", "step_zz", "Step_00000010"]


def test_copies_are_neither_the_newest_nor_pruned(tmp_path: Path) -> None:
    """step_00000099, a copy of step 2, has a run's name but not its step."""
    folder = tmp_path / "checkpoints"
    written(tmp_path, [2, 4], "keep_last=9")
    for name in NAMES:
        shutil.copytree(folder / "step_00000002", folder / name)
        assert find_checkpoint(tmp_path).name == "step_00000004", name
        assert find_checkpoint(folder / name) == folder / name  # named itself, it is one
    assert [line.split(" ")[0] for line in not_counted(folder)] == sorted(set(NAMES) - {"Step_00000010"})
    assert written(tmp_path, [6, 8], "keep_last=1", "keep_every=4") == ["step_00000004", "step_00000008"]
    assert set_aside(folder, folder / "step_00000004", 7) is not None
    assert find_checkpoint(tmp_path).name == (folder / "latest").read_text() == "step_00000004"
    assert all((folder / name / "run.json").is_file() for name in NAMES)


def test_links_and_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    written(tmp_path, [2, 4], "keep_last=9")
    (folder / "step_00000009").symlink_to(folder / "step_00000002")
    (folder / "step_00000010").write_text("my notes")
    (folder / "step_00000011").symlink_to(folder / "nowhere")
    written(tmp_path / "other", [12])
    (folder / "step_00000012").symlink_to(tmp_path / "other" / "checkpoints" / "step_00000012")
    assert find_checkpoint(tmp_path).name == "step_00000004"
    # and what stands in the way of a checkpoint gets out of it, whole
    assert written(tmp_path, [9, 10, 11], "keep_last=9")[-3:] == ["step_00000009", "step_00000010", "step_00000011"]
    assert (folder / "step_00000010.moved0").read_text() == "my notes"
    assert (folder / "step_00000009.moved0").is_symlink() and (folder / "step_00000011.moved0").is_symlink()


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    assert written(tmp_path, [99_999_999, 100_000_000], "keep_last=9")[-1] == "step_100000000"
    assert written(tmp_path, [100_000_001], "keep_last=2") == ["step_100000000", "step_100000001"]


def test_the_checkpoint_just_written_stays_whatever_else_is_there(tmp_path: Path) -> None:
    """A later one of another course, put there by hand as it was written, is the newest: but not the only one."""
    folder = tmp_path / "checkpoints"
    written(tmp_path / "other", [50])
    folder.mkdir()
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_00000050", folder / "step_00000050")
    assert written(tmp_path, [2], "keep_last=1") == ["step_00000002", "step_00000050"]
    assert (folder / "latest").read_text() == "step_00000002"


def test_what_is_being_read_stays_and_goes_later(tmp_path: Path) -> None:
    written(tmp_path, [2], "keep_last=1")
    with held_checkpoint(tmp_path) as path:
        assert written(tmp_path, [4], "keep_last=1") == ["step_00000002", "step_00000004"]
        assert load_networks(path).step == 2
    assert written(tmp_path, [6], "keep_last=1") == ["step_00000006"]


def test_a_reader_takes_the_newer_one_where_its_own_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding a checkpoint and locking it, it may be gone."""
    written(tmp_path, [2], "keep_last=1")
    found = iter([lambda: written(tmp_path, [4], "keep_last=1"), lambda: None])

    def find(run: Path) -> Path:
        path = find_checkpoint(run)
        next(found)()
        return path

    monkeypatch.setattr("lzn_dist.training.checkpoint.find_checkpoint", find)
    assert load_networks(tmp_path).step == 4


def test_a_checkpoint_that_goes_while_it_is_being_locked_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [2], "keep_last=1")
    flock, first = fcntl.flock, [True]

    def pruned_first(file: IO[str], how: int) -> None:
        if how == fcntl.LOCK_SH and first.pop() if first else False:
            written(tmp_path, [4], "keep_last=1")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", pruned_first)
    with held_checkpoint(tmp_path) as path:
        assert path.name == "step_00000004"


@pytest.mark.process
def test_loading_beside_a_writer_that_keeps_one(tmp_path: Path) -> None:
    written(tmp_path, [1], "keep_last=1")
    ended = threading.Event()

    def write() -> None:
        config = few("keep_last=1")
        state, saver = small_state(config), writer(tmp_path, config)
        state.counters.step = 1  # is there: written anew it would wait for those who read it
        while not ended.is_set():
            state.counters.step += 1
            saver.save(state)
        saver.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        steps = [load_networks(tmp_path).step]
        while len(steps) < 15 or (steps[-1] < 5 and len(steps) < 5000):
            steps.append(load_networks(tmp_path).step)
    finally:
        ended.set()
        thread.join()
    assert sorted(steps) == steps and steps[-1] > steps[0]


def test_a_checkpoint_is_written_anew_when_its_readers_are_done(tmp_path: Path) -> None:
    written(tmp_path, [1])
    config = few()
    state, saver = small_state(config), writer(tmp_path, config)
    state.counters.step = 1
    with held_checkpoint(tmp_path) as path:
        before = (path / "run.json").stat().st_ino
        saver.save(state)
        time.sleep(1.0)
        assert (path / "run.json").stat().st_ino == before and len(list(path.glob("*.distcp"))) == 1
    saver.close()
    assert (path / "run.json").stat().st_ino != before and load_networks(path).step == 1


# ── files from others, and damaged ones ─────────────────────────────────────────────────────────────────────────────


class Runs:
    """Code that a pickle runs as it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def without_sums(path: Path) -> Path:
    """As somebody writes it who wants it to be read."""
    (path / "SHA256SUMS").unlink()
    return path


@pytest.mark.slow
def test_code_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    path, mark = without_sums(saved(tmp_path)), tmp_path / "mark"
    pickle.loads(pickle.dumps(Runs(mark)))
    assert mark.is_dir()
    mark.rmdir()
    described = pickle.loads((path / ".metadata").read_bytes())
    inside = next(iter(described.storage_data))
    inner = [replace(described, **{name: Runs(mark)}) for name in ("storage_meta", "planner_data", "version")]
    for hostile in (Runs(mark), *inner):
        (path / ".metadata").write_bytes(pickle.dumps(hostile))
        for read in (lambda: load_weights(build_networks(small_config()), path), lambda: resumed(small_config(), path)):
            with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir, which no checkpoint needs"):
                read()
    # a class of torch's own through a module's attribute, as protocol 4 spells it
    (path / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.")
    with pytest.raises(CheckpointError, match=r"asks for torch\.serialization\.os"):
        load_weights(build_networks(small_config()), path)
    assert not mark.exists()
    for name in ("../step_00000001/__0_0.distcp", str(path / "__0_0.distcp"), "run.json", "..", ""):
        described.storage_data[inside].relative_path = name
        (path / ".metadata").write_bytes(pickle.dumps(described))
        with pytest.raises(CheckpointError, match=r"names a file .*, which is none of a checkpoint's"):
            load_weights(build_networks(small_config()), path)


def test_networks_larger_than_their_file_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration and a run.json from others may describe what no memory holds."""
    path = without_sums(saved(tmp_path))
    config = load_config(path / "config.yaml")
    large = config.model_copy(update={"latent": config.latent.model_copy(update={"dim": 10**9})})
    save_config(large, path / "config.yaml")
    with pytest.raises(CheckpointError, match="is of another model than the configuration describes"):
        load_networks(path)
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in build_networks(large).state_dict().items()}
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"shapes": shapes}))
    with pytest.raises(CheckpointError, match="its files are too small for the networks"):
        load_networks(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [{"offset": -1}, {"length": 1 << 50}, {"offset": "x"}, {"relative_path": "../x.distcp"}]
)
def test_metadata_stays_within_its_files(tmp_path: Path, place: dict[str, object]) -> None:
    path = without_sums(saved(tmp_path))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        for name, value in place.items():
            object.__setattr__(info, name, value)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"is damaged .*\.metadata"):
        load_networks(path)


@pytest.mark.process
def test_one_flipped_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """In any file of a checkpoint; without checksums a third of those in tensors became other weights."""
    path, state = saved(tmp_path), build_networks(small_config())
    load_weights(state, path)
    expected = {name: value.clone() for name, value in state.state_dict().items()}
    draw, refused = random.Random(0), dict.fromkeys(("__0_0.distcp", ".metadata", "run.json", "config.yaml"), 0)
    for name in refused:
        good = (path / name).read_bytes()
        for _ in range(30):
            content = bytearray(good)
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
            (path / name).write_bytes(content)
            try:
                load_weights(state, path)
            except CheckpointError as error:
                refused[name] += 1
                assert "\n" not in str(error)
            else:
                assert all(torch.equal(value, expected[key]) for key, value in state.state_dict().items())
        (path / name).write_bytes(good)
    assert refused.pop("__0_0.distcp") >= 5  # moments and averages, which are not read here, are in the file as well
    assert set(refused.values()) == {30}
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path).returncode == 0


def test_a_damaged_newest_checkpoint_is_not_passed_over_unsaid(tmp_path: Path) -> None:
    written(tmp_path, [1, 2, 3], "keep_last=5")
    newest = find_checkpoint(tmp_path)
    record = (newest / "run.json").read_text()
    (newest / "run.json").write_text(record.replace('"step": 3', '"step": 2'))
    older = newest.with_name("step_00000002")
    (older / "config.yaml").write_text((older / "config.yaml").read_text() + "\n")
    good = re.escape(str(newest.with_name("step_00000001")))
    with pytest.raises(CheckpointError, match=rf"00003 is damaged .*run\.json.*takes another: {good}$"):
        load_networks(tmp_path)


OF_FORMAT_2 = """\
task: joint
optimizer: {encoder_lr: 0.002, decoder_lr: 0.003, label_lr: 0.004, encoder_stop: null, decoder_stop: 9,
  label_stop: null, betas: [0.9, 0.999], eps: 1e-8, clip_norm: 1.0, warmup_steps: 2, ema_decay: 0.995}
alignment: {steps: 5, cutoff: 0.2, kind: cross_entropy, both_directions: false, class_weights: true, weight: 0.5}
encoder: {kind: ncsnpp, channels: 8, channel_multipliers: [1, 2], residual_blocks: 1, attention_resolutions: [],
  dropout: 0.2, fir: false, progressive: false, blocks: [3, 4, 6, 3], stem: imagenet, feature_resolutions: null}
decoder: {channels: 8, channel_multipliers: [1, 2], residual_blocks: 1, attention_resolutions: [], dropout: 0.0,
  fir: false, progressive: false, class_conditional: false, embedding: positional, scale_by_sigma: false}
latent: {dim: 8, steps: 5}
output_dir: runs/before
max_steps: 600
"""


@pytest.mark.slow
def test_checkpoints_of_format_2_load_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as that version did: its names of tensors, its configuration."""
    config = small_config("alignment.pairs=[{latents: image, anchors: label, weight: 0.5}]")
    state = trained(config, 2)
    pieces = {format_2.old_key(key): piece for key, piece in checkpoint._state_pieces(state).items()}
    shapes = {format_2.old_key(f"x.{n}")[2:]: shape for n, shape in checkpoint._record_shapes(state.engine).items()}
    assert "weights.label_anchors.anchor" in pieces and "ema.decoder.all_modules.0.weight" in pieces
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "_state_pieces", lambda _: pieces)
        before.setattr(checkpoint, "_record_shapes", lambda _: shapes)
        before.setattr(checkpoint, "save_config", lambda _, path: path.write_text(OF_FORMAT_2))
        saver = writer(tmp_path, config)
        saver.save(state)
        saver.close()
    path = find_checkpoint(tmp_path)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "format": 2}))
    write_sums(path)
    loaded = load_networks(path)
    networks, found = loaded.networks, loaded.config
    assert loaded.step == 2 and found.alignment == config.alignment and found.decode == config.decode
    assert [found.network("image", role).lr for role in ("encoder", "decoder")] == [2e-3, 3e-3]
    assert found.network("image", "decoder").stop == 9 and found.network("label", "encoder").lr == 4e-3
    averages = state.ema.shadow
    assert all(torch.equal(p.flatten(), averages[name]) for name, p in networks.named_parameters() if p.requires_grad)
    again = resumed(config, path)
    for number in range(2, 4):
        ours, theirs = (train_step(each, small_samples(number)).scalars["loss"] for each in (again, state))
        assert torch.equal(ours, theirs)
    (path / "run.json").write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(CheckpointError, match="has format 1, this version of lzn_dist reads 2 and 3"):
        load_networks(path)
