"""Shards on a server: read by ranges, kept in blocks, tried again; the same batches as from the folder."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from lzn_dist.data import BatchStream, Exact, SampleOrder, ShardedDataset, ShardIndex
from lzn_dist.data import index as index_module
from lzn_dist.data import storage as storage_module
from lzn_dist.data.storage import RemoteError, RemoteStorage
from tests.helpers.range_server import free_port, serve, start_server


def start_mute(folder: Path, mute: threading.Event) -> str:
    """The URL of a server that takes requests without answering them while `mute` is set."""
    running = serve(folder, 0, None)
    handler: Any = running.RequestHandlerClass
    answer = handler.answer

    def late(self: Any, head: bool) -> None:
        while mute.is_set():
            time.sleep(0.05)
        answer(self, head)

    handler.answer = late
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{running.server_port}"


@pytest.fixture
def server(digits: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The digits' URL, and the log of requests."""
    log = tmp_path / "requests.log"
    running = serve(digits, 0, log)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", log
    running.shutdown()


def stream(index: ShardIndex, workers: int = 0, rank: int = 0, world_size: int = 1) -> BatchStream:
    dataset = ShardedDataset(index, "train", 1, Exact(8))
    order = SampleOrder([shard.samples for shard in dataset.table.shards], 60, 0, streams=4, window=40)
    return BatchStream(dataset, order, rank, world_size, workers)


def requests(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(storage_module, "BLOCK", 16_384)
    return 16_384


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_the_same_batches_as_from_the_folder(
    server: tuple[str, Path], index: ShardIndex, tmp_path: Path, workers: int, small_blocks: int
) -> None:
    url, log = server
    remote = ShardIndex.load(url, tmp_path / "cache")
    assert remote.classes == index.classes and remote.identity == index.identity
    for found, expected in zip(stream(remote, workers).iterate(20, 27), stream(index).iterate(20, 27), strict=True):
        assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.labels, expected.labels)
    ranges = [line for line in requests(log) if line.startswith("bytes")]
    assert ranges and len(ranges) == len(set(ranges))  # no block twice, workers or not
    before = len(requests(log))
    for _ in stream(ShardIndex.load(url, tmp_path / "cache")).iterate(20, 27):  # all of it is there
        pass
    assert not [line for line in requests(log)[before:] if line.startswith("bytes")]


def test_only_what_is_needed_is_fetched(server: tuple[str, Path], tmp_path: Path, small_blocks: int) -> None:
    """Resuming in the middle: the blocks of the samples of that batch, nothing of what went before."""
    url, log = server
    remote = ShardIndex.load(url, tmp_path / "cache")
    batches = stream(remote)
    batches.batch(20)
    rows = batches.indices(20)
    table = remote.split("train")
    wanted = set()
    for row in rows.tolist():
        for offset, size in (table.images[row].tolist(), table.labels[row].tolist()):  # type: ignore[index]
            for block in range(offset // small_blocks, (offset + size - 1) // small_blocks + 1):
                wanted.add((f"/{table.shard_of(row).name}", block))
    found = set()
    for line in requests(log):
        if line.startswith("bytes="):
            asked, path = line.removeprefix("bytes=").split()
            found.add((path, int(asked.split("-")[0]) // small_blocks))
    assert found == wanted
    assert len(found) < sum(-(-shard.bytes // small_blocks) for shard in table.shards)


@pytest.mark.process
def test_a_server_that_dies_and_comes_back(
    digits: Path, index: ShardIndex, tmp_path: Path, small_blocks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    log, port = tmp_path / "requests.log", free_port()
    process = start_server(digits, port, log)
    remote = ShardIndex.load(f"http://127.0.0.1:{port}", tmp_path / "cache", retry_seconds=60)
    found = stream(remote).iterate(0, 20)
    seen = [next(found)]
    process.kill()
    process.wait()
    again: list[subprocess.Popen[bytes]] = []
    threading.Timer(1.5, lambda: again.append(start_server(digits, port, log))).start()
    seen += list(found)
    again[0].kill()
    again[0].wait()
    assert "trying again" in capfd.readouterr().err
    for batch, expected in zip(seen, stream(index).iterate(0, 20), strict=True):
        assert torch.equal(batch.pixels, expected.pixels) and batch.bad == ()


def test_patience_ends_with_the_servers_name(server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    remote = ShardIndex.load(url, tmp_path / "cache", retry_seconds=1.0)
    lost = f"http://127.0.0.1:{free_port()}"
    assert isinstance(remote.storage, RemoteStorage)
    remote.storage.url = lost
    with pytest.raises(RemoteError, match=rf"{lost}/train-00000\d.tar could not be read for \d s: .*server is up"):
        stream(remote).batch(0)
    with pytest.raises(RemoteError, match=r"manifest\.json could not be read"):
        ShardIndex.load(lost, tmp_path / "cache", retry_seconds=0.1)


def test_what_waiting_does_not_mend_is_refused_at_once(
    server: tuple[str, Path], digits: Path, tmp_path: Path, small_blocks: int
) -> None:
    url, _ = server
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: write the shards"):
        ShardIndex.load(f"{url}/nowhere", tmp_path / "cache")
    with pytest.raises(ValueError, match="no protocol that fsspec knows"):
        ShardIndex.load("gopher://here/there", tmp_path / "cache")
    plain = serve(digits, 0, None, ranges=False)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with pytest.raises(ValueError, match="does not answer range requests: use one that does, or copy"):
        stream(ShardIndex.load(f"http://127.0.0.1:{plain.server_port}", tmp_path / "plain")).batch(0)
    plain.shutdown()
    short = Path(shutil.copytree(digits, tmp_path / "short"))
    for path in short.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:9000])
    truncated = serve(short, 0, None)
    threading.Thread(target=truncated.serve_forever, daemon=True).start()
    with pytest.raises(ValueError, match=r"ends at byte 9000, its manifest says \d+|shorter than its manifest says"):
        stream(ShardIndex.load(f"http://127.0.0.1:{truncated.server_port}", tmp_path / "cut")).batch(0)
    truncated.shutdown()


def test_half_a_block_is_no_block(server: tuple[str, Path], index: ShardIndex, tmp_path: Path) -> None:
    """Killed between the bytes and the checksum, or before: the block is fetched again."""
    url, _ = server
    expected = stream(index).batch(0).pixels
    assert torch.equal(stream(ShardIndex.load(url, tmp_path / "cache")).batch(0).pixels, expected)
    folder = next((tmp_path / "cache").iterdir())
    for path in folder.glob("*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    for path in folder.glob("*.crc32"):
        path.write_bytes(b"")
    assert torch.equal(stream(ShardIndex.load(url, tmp_path / "cache")).batch(0).pixels, expected)


@pytest.mark.parametrize("suffix", ["tar", "crc32"])
def test_a_damaged_block_is_fetched_again(
    server: tuple[str, Path], index: ShardIndex, tmp_path: Path, small_blocks: int, suffix: str
) -> None:
    """And it alone."""
    url, log = server
    expected = stream(index).batch(0).pixels
    assert torch.equal(stream(ShardIndex.load(url, tmp_path / "cache")).batch(0).pixels, expected)
    path = max(next((tmp_path / "cache").iterdir()).glob(f"*.{suffix}"))
    content = bytearray(path.read_bytes())
    sums = path.with_suffix(".tar.crc32") if suffix == "tar" else path
    block = next(n for n in range(sums.stat().st_size // 4) if sums.read_bytes()[4 * n : 4 * n + 4] != bytes(4))
    content[block * small_blocks + 1000 if suffix == "tar" else 4 * block + 1] ^= 4
    path.write_bytes(content)
    before = log.read_text().splitlines()
    assert torch.equal(stream(ShardIndex.load(url, tmp_path / "cache")).batch(0).pixels, expected)
    again = [line for line in log.read_text().splitlines()[len(before) :] if line.endswith(".tar")]
    assert len(again) == 1 and again[0].startswith(f"bytes={block * small_blocks}-")


def test_a_full_disk_is_no_lost_server(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It surfaces at once, as itself."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    remote = ShardIndex.load(server[0], tmp_path / "cache", retry_seconds=60)
    monkeypatch.setattr(os, "pwrite", full)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"No space left.*copies of shards go to .*set data\.cache"):
        stream(remote).batch(0)
    assert time.monotonic() - began < 30


@pytest.mark.process
def test_a_forked_worker_leaves_its_parents_connections_alone(server: tuple[str, Path], tmp_path: Path) -> None:
    """A worker that closed them would take them from the event queue which it shares with its parent."""
    storage = ShardIndex.load(server[0], tmp_path / "cache").storage
    worker = multiprocessing.get_context("fork").Process(target=storage.read_file, args=("manifest.json", 1 << 20))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    found = threading.Thread(target=storage.read_file, args=("manifest.json", 1 << 20), daemon=True)
    found.start()
    found.join(20)
    assert not found.is_alive(), "the parent's request was never answered"


@pytest.mark.slow
def test_a_request_without_an_answer_is_made_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that died without closing its connections, as a lost node does."""
    storage = ShardIndex.load(start_mute(digits, mute := threading.Event()), tmp_path / "cache").storage
    monkeypatch.setattr(storage_module, "_REQUEST_SECONDS", 1)
    mute.set()
    threading.Timer(2.5, mute.clear).start()
    assert storage.read_file("manifest.json", 1 << 20) == (digits / "manifest.json").read_bytes()
    assert "trying again" in capfd.readouterr().err


def test_object_stores_go_the_same_way(digits: Path, index: ShardIndex, tmp_path: Path) -> None:
    """fsspec's memory file system stands for s3, gs and the like, which need their own packages."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in digits.iterdir():
        memory.pipe(f"/bucket/digits/{path.name}", path.read_bytes())
    found = stream(ShardIndex.load("memory://bucket/digits", tmp_path / "cache")).batch(3)
    assert torch.equal(found.pixels, stream(index).batch(3).pixels)


@pytest.mark.slow
def test_rows_of_another_manifest_do_not_mix(digits: Path, tmp_path: Path) -> None:
    """The same URL with other shards behind it: another folder in the cache."""
    from lzn_dist.prepare.digits import write_digits

    other = write_digits(tmp_path / "other", samples_per_shard=100)
    served = tmp_path / "served"
    pixels: list[torch.Tensor] = []
    port = 0
    for folder in (digits, other):
        shutil.copytree(folder, served, dirs_exist_ok=True)
        running = serve(served, port, None)
        port = running.server_port
        threading.Thread(target=running.serve_forever, daemon=True).start()
        dataset = ShardedDataset(ShardIndex.load(f"http://127.0.0.1:{port}", tmp_path / "cache"), "train", 1, Exact(8))
        rows = np.argsort(dataset.table.keys)
        pixels.append(dataset.read(rows[:50])[0])
        running.shutdown()
        running.server_close()
    assert torch.equal(*pixels) and len(list((tmp_path / "cache").iterdir())) == 2


# ── answers that are not what was asked for ─────────────────────────────────────────────────────────────────────────


def start_other(folder: Path, answer: Callable[[Any, bytes], None]) -> str:
    """The URL of a server that answers with `answer(handler, content)` where a shard is asked for by range, or, where
    the folder has a file `all`, anything."""
    running = serve(folder, 0, None)
    handler: Any = running.RequestHandlerClass
    proper = handler.answer

    def other(self: Any, head: bool) -> None:
        path = folder / self.path.partition("?")[0].lstrip("/")
        if head or not path.is_file() or not (path.suffix == ".tar" or (folder / "all").exists()):
            proper(self, head)
            return
        self.close_connection = True
        with suppress(ConnectionError):
            answer(self, path.read_bytes())

    handler.answer = other
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{running.server_port}"


def respond(handler: Any, status: int, headers: dict[str, str], *parts: bytes) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    for part in parts:
        handler.wfile.write(part)


def ranged(handler: Any, content: bytes) -> None:
    """The right answer."""
    first, last = 0, len(content) - 1
    if asked := handler.headers.get("Range"):
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
    span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if asked else {}
    respond(handler, 206 if asked else 200, span, content[first : last + 1])


def shifted(handler: Any, content: bytes) -> None:
    respond(handler, 206, {"Content-Range": f"bytes 512-{len(content) - 1}/{len(content)}"}, content[512:])


def endless(handler: Any, content: bytes) -> None:
    stop = len(content) - 1
    respond(
        handler, 206, {"Content-Range": f"bytes 0-{stop}/{len(content)}"}, *itertools.repeat(bytes(1 << 16), 16_000)
    )


def compressed(handler: Any, content: bytes) -> None:
    respond(handler, 206, {"Content-Encoding": "gzip"}, gzip.compress(content))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (shifted, r"asked for bytes 0-\d+, its answer is 'bytes 512-"),
        (lambda handler, content: respond(handler, 206, {}, content), "its answer is ''"),
        (lambda handler, content: respond(handler, 200, {}, content), "does not answer range requests"),
        (endless, r"the server sends more than the bytes 0-\d+ it was asked for"),
        (compressed, "answers compressed"),
    ],
)
def test_an_answer_that_is_another_one_is_refused(
    digits: Path, tmp_path: Path, answer: Callable[[Any, bytes], None], says: str
) -> None:
    remote = ShardIndex.load(start_other(digits, answer), tmp_path / "cache", retry_seconds=1)
    with pytest.raises(ValueError, match=says):
        stream(remote).batch(0)


def test_a_manifest_without_end_is_refused(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_MANIFEST_BYTES", 1 << 20)
    shutil.copytree(digits, folder := tmp_path / "digits")
    (folder / "all").touch()
    sent: list[int] = []

    def answer(handler: Any, content: bytes) -> None:
        respond(handler, 200, {})
        for _ in range(1_000):
            handler.wfile.write(b" " * (1 << 16))
            sent.append(1 << 16)

    with pytest.raises(ValueError, match=r"manifest\.json has more than 1,048,576 bytes"):
        ShardIndex.load(start_other(folder, answer), tmp_path / "cache", retry_seconds=1)
    time.sleep(0.2)
    assert sum(sent) < 30 << 20  # what the system's own buffers take is not read


@pytest.mark.parametrize(
    "name", ["../../home/thesis.txt", "/etc/passwd", "..", "", ".hidden", "a\\b", "a\nb", "x" * 300, 5]
)
@pytest.mark.parametrize("place", ["shard", "index", "split"])
def test_names_in_a_manifest_stay_inside_its_folder(digits: Path, tmp_path: Path, name: object, place: str) -> None:
    """A server's would be written to where the name says, outside the cache."""
    shutil.copytree(digits, folder := tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    if place == "shard":
        manifest["splits"]["train"]["shards"][0]["name"] = name
    elif place == "index":
        manifest["splits"]["train"]["index"]["name"] = name
    else:
        manifest["splits"] = {str(name): manifest["splits"]["train"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if place == "split" and name == 5:
        assert set(ShardIndex.load(folder).splits) == {"5"}
        return
    says = "manifest.json is damaged, .* should be text" if name == 5 else f"an? {place} is called "
    with pytest.raises(ValueError, match=rf"manifest\.json: not a manifest of shards \({says}"):
        ShardIndex.load(folder)


def _index(samples: int, **changes: Any) -> bytes:
    """An index file of samples of 10 bytes each; changes: other tables, None for none."""
    offsets = np.stack([np.arange(samples) * 10, np.full(samples, 10)], axis=1)
    tables = {"keys": np.array([b"%d" % row for row in range(samples)]), "offsets.png": offsets} | changes
    np.savez_compressed(file := io.BytesIO(), **{name: value for name, value in tables.items() if value is not None})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda n: b"no zip", "is not an index"),
        (lambda n: _index(n, keys=None), "is not an index"),
        (lambda n: _index(n - 1), "has not the"),
        (lambda n: _index(n, keys=np.arange(n)), "has not the"),
        (lambda n: _index(n, keys=np.array(b"x")), "has not the"),
        (lambda n: _index(n, keys=np.array(["x"] * n, dtype=object)), "is not an index"),  # a pickle
        (lambda n: _index(n, **{"offsets.png": np.zeros((n, 3), np.int64)}), "no first byte and size"),
        (lambda n: _index(n, **{"offsets.png": np.zeros((n, 2))}), "no first byte and size"),
        (lambda n: _index(n, **{"offsets.png": np.full((n, 2), -2)}), "outside of its shard"),
        (lambda n: _index(n, **{"offsets.png": np.full((n, 2), 1 << 62)}), "outside of its shard"),
        (lambda n: _index(n, **{"offsets.png": np.full((n, 2), [0, 1 << 40])}), "outside of its shard"),
        (lambda n: _index(n, more=np.zeros(64 << 20, np.uint8)), "unpacks to far more"),
    ],
)
def test_an_index_that_is_none_is_refused(
    digits: Path, tmp_path: Path, content: Callable[[int], bytes], says: str
) -> None:
    """Whoever wrote it wrote its digest too."""
    shutil.copytree(digits, folder := tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["splits"]["train"]

    def write(content: bytes) -> None:
        (folder / entry["index"]["name"]).write_bytes(content)
        entry["index"]["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))

    write(_index(entry["samples"]))
    assert len(ShardIndex.load(folder).split("train")) == entry["samples"]
    write(content(entry["samples"]))
    with pytest.raises(ValueError, match=rf"manifest\.json: not a manifest of shards \(train\.index\.npz.* {says}"):
        ShardIndex.load(folder)


def test_the_default_cache_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is known to everybody on the machine, who may have been there before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / f"lzn_dist-{os.getuid()}"
    old = os.umask(0)
    try:
        assert storage_module._own_cache() == path
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)  # readable by all, as it was made once
    storage_module._own_cache()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    refused = pytest.raises(ValueError, match=r"a link or a folder that others can write to.*data\.cache")
    path.chmod(0o777)
    with refused:
        storage_module._own_cache()
    path.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere")
    with refused:
        storage_module._own_cache()
    somebody = os.getuid() + 1
    (tmp_path / f"lzn_dist-{somebody}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    with refused:
        storage_module._own_cache()


def test_links_in_a_cache_are_not_followed(server: tuple[str, Path], tmp_path: Path) -> None:
    """Their targets were cut to a shard's size."""
    (thesis := tmp_path / "thesis").write_text("my thesis")
    remote = ShardIndex.load(server[0], tmp_path / "cache").storage
    assert isinstance(remote, RemoteStorage)
    for name in ("train-000000.tar", "train-000000.tar.crc32"):
        (remote.folder / name).symlink_to(thesis)
        with pytest.raises(OSError, match="symbolic links"):
            remote.read("train-000000.tar", 0, 512)
        (remote.folder / name).unlink()
    assert thesis.read_text() == "my thesis"


def test_requests_carry_what_fsspec_is_configured_with(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token for a server, say: manifest and shards alike."""
    (shutil.copytree(digits, tmp_path / "digits") / "all").touch()
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}})

    def answer(handler: Any, content: bytes) -> None:
        if handler.headers.get("Authorization") != "Bearer x":
            handler.send_error(403)
            return
        ranged(handler, content)

    remote = ShardIndex.load(start_other(tmp_path / "digits", answer), tmp_path / "cache", retry_seconds=1)
    assert len(stream(remote).batch(0).labels) == 60


def test_logins_come_from_netrc(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shutil.copytree(digits, tmp_path / "digits") / "all").touch()
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login alice password s3cr3t\n")
    (tmp_path / "netrc").chmod(0o600)
    expected = "Basic " + base64.b64encode(b"alice:s3cr3t").decode()

    def answer(handler: Any, content: bytes) -> None:
        if handler.headers.get("Authorization") != expected:
            handler.send_error(401)
            return
        ranged(handler, content)

    url = start_other(tmp_path / "digits", answer)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="401"):
        ShardIndex.load(url, tmp_path / "cache", retry_seconds=1)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(stream(ShardIndex.load(url, tmp_path / "cache", retry_seconds=1)).batch(0).labels) == 60
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()][1:]


@pytest.mark.parametrize(("status", "kind"), [(403, ValueError), (500, RemoteError)])
def test_the_signature_of_a_redirection_is_not_said(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int, kind: type[Exception]
) -> None:
    (shutil.copytree(digits, tmp_path / "digits") / "all").touch()

    def answer(handler: Any, content: bytes) -> None:
        if "Signature" in handler.path:
            handler.send_error(status)
        else:
            respond(handler, 302, {"Location": f"{handler.path}?Signature=s3cr3t"}, b"")

    with pytest.raises(kind) as error:
        ShardIndex.load(start_other(tmp_path / "digits", answer), tmp_path / "cache", retry_seconds=1)
    assert f"{status}" in str(error.value)
    assert "s3cr3t" not in str(error.value) + "".join(capfd.readouterr())
