"""The run's folder: incarnations, lines, status."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lzn_dist.training import run_folder
from lzn_dist.training.run_folder import RunFolder, SupersededError, read_lines


def test_an_older_incarnation_writes_nothing_more(tmp_path: Path) -> None:
    old = RunFolder(tmp_path).take()
    old.append("metrics.jsonl", {"step": 1})
    old.status("running", 1)
    new = RunFolder(tmp_path).take()
    assert new.incarnation == old.incarnation + 1
    with pytest.raises(SupersededError, match=f"incarnation {new.incarnation}"):
        old.append("metrics.jsonl", {"step": 2})
    with pytest.raises(SupersededError):
        old.status("finished", 2)
    with pytest.raises(SupersededError):
        old.trim(0)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    new.status("running", 1, engine="ddp")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "running", "step": 1, "why": "", "incarnation": new.incarnation, "engine": "ddp"
    }  # fmt: skip


def test_nobody_takes_the_folder_between_a_check_and_its_write(tmp_path: Path) -> None:
    """An older incarnation that has checked and is about to write keeps a newer one waiting until it has written."""
    old = RunFolder(tmp_path).take()
    taken = threading.Event()

    def take() -> None:
        RunFolder(tmp_path).take()
        taken.set()

    with old.held():
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.3)
    assert taken.wait(10.0)
    thread.join()
    with pytest.raises(SupersededError), old.held():
        pytest.fail("entered")


def test_nobody_writes_or_takes_between_choosing_and_taking(tmp_path: Path) -> None:
    """A start that chooses its checkpoint keeps the older incarnation from pruning it, and another start waiting."""
    old, new = RunFolder(tmp_path).take(), RunFolder(tmp_path)
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(RunFolder(tmp_path).take().incarnation))
    refused: list[BaseException] = []

    def write() -> None:
        try:
            old.append("metrics.jsonl", {"step": 1})
        except SupersededError as error:
            refused.append(error)

    writing = threading.Thread(target=write)
    with new.unchanging():
        thread.start()
        writing.start()
        time.sleep(0.3)
        assert not other and not (tmp_path / "metrics.jsonl").exists()
        new.take()  # the same thread has the lock already
    thread.join()
    writing.join()
    assert refused and new.incarnation == 2 and other == [3]


def test_nothing_is_made_before_the_folder_is_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.unchanging():
        assert not folder.path.exists()


@pytest.mark.process
def test_who_holds_the_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process that was halted while it wrote keeps the next start waiting: that one says for whom it waits."""
    monkeypatch.setattr("lzn_dist.training.run_folder.PATIENCE", 0.2)
    script = (
        "import pathlib, sys\nfrom lzn_dist.training.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).take().held():\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    threading.Timer(1.0, holder.kill).start()
    assert RunFolder(tmp_path).take().incarnation == 2
    holder.communicate()
    said = capfd.readouterr().err
    assert f'"pid": {holder.pid}' in said and "waiting for the lock" in said


def test_starts_at_the_same_moment_get_different_numbers(tmp_path: Path) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(RunFolder(tmp_path).take().incarnation)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 17))


def test_lines_past_the_checkpoint_and_half_lines_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).take()
    for step in (1, 2, 3):
        folder.append("metrics.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    folder.trim(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not (tmp_path / "eval.jsonl").exists()
    folder.append("metrics.jsonl", {"step": 3})
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_half_line_goes_where_no_whole_one_does(tmp_path: Path) -> None:
    """Killed while it wrote the line right after the checkpoint: the next line must not be glued to the half."""
    folder = RunFolder(tmp_path).take()
    folder.append("metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    folder.trim(1)
    folder.append("metrics.jsonl", {"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_status_is_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader at any moment, and whatever comes after a kill, see the old status or the new one."""
    folder = RunFolder(tmp_path).take()
    path, half = tmp_path / "status.json", []
    folder.status("running", 0)
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            text = path.read_text()
            if not text.endswith("}\n"):
                half.append(text)

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(1, 301):
        folder.status("running", step, "x" * 200_000)
    ended.set()
    thread.join()
    assert half == [] and json.loads(path.read_text())["step"] == 300

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)  # after the new one is written, before it has its name
    with pytest.raises(Killed):
        folder.status("finished", 301)
    assert json.loads(path.read_text())["step"] == 300


def test_a_damaged_lock_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{")
    assert RunFolder(tmp_path).take().incarnation == 1


def test_one_damaged_line_loses_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle: before, all that followed it were dropped as a run went on, unsaid."""
    folder = RunFolder(tmp_path).take()
    lines = [f'{{"step": {step}, "loss": 1.0}}' for step in range(1, 7)]
    damaged = [
        b'x"step": 2}',
        b'{"step"\r 2}',
        b"\xff\x00",
        b"[1]",
        b'{"loss": 1.0}',
        b'{"step": "2"}',
        b"[" * 100_000,
        b"",
    ]
    for line in damaged:
        content = [text.encode() for text in lines]
        content[1] = line
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"\n".join([*content, b'{"step": 7, "lo']))  # and one that was being written
        run_folder._told.clear()
        assert [row["step"] for row in read_lines(path)] == [1, 3, 4, 5, 6]
        assert capsys.readouterr().err.count("line 2 cannot be read: it stays") == 1
        folder.trim(5)
        assert path.read_bytes().split(b"\n") == [*content[:5], b""]
        folder.append("metrics.jsonl", {"step": 6})
        assert [row["step"] for row in read_lines(path)] == [1, 3, 4, 5, 6]
