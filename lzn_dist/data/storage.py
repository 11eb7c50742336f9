"""Bytes of shards: from a local folder, or from a server or object store through blocks kept on the local disk."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import random
import re
import stat
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lzn_dist.paths import check_url, without_secrets

BLOCK = 4 << 20  # bytes of one range request
_CONNECTIONS = 16
_REQUEST_SECONDS = 60  # a request without an answer is made again after this
_OPEN_FILES = 128  # file descriptors that are kept; a process may often have no more than 1,024
_T = TypeVar("_T")

Span = tuple[str, int, int]  # name of a shard, first byte, number of bytes


class RemoteError(OSError):
    """A server that could not be read for as long as retries go on; the message names it and what it said."""


class Storage(Protocol):
    """Files of one folder. Pickled with what reads them; opened anew in each process."""

    def read_file(self, name: str, limit: int) -> bytes:
        """A whole (small) file. Raises FileNotFoundError, ValueError for more than `limit` bytes."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def know(self, identity: str, sizes: dict[str, int]) -> None:
        """What the manifest says: its hash, and the bytes of the shards."""

    def fetch(self, spans: Iterable[Span]) -> None:
        """Bring what is about to be read, many pieces at a time; nothing to do where it is near."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it ends before."""


def is_remote(folder: str) -> bool:
    """Whether a folder is a URL."""
    return "://" in folder


def open_storage(folder: str, cache: str | Path, retry_seconds: float) -> Storage:
    """The storage of a path or a URL. cache: folder for remote bytes, by default one of the system's for such files.

    Logins are those of ~/.netrc (HTTP), of fsspec's configuration or of the cloud's own. Raises ValueError for a URL
    with a password, a query or a fragment.
    """
    if not is_remote(folder):
        return LocalStorage(Path(folder))
    check_url(folder)
    return RemoteStorage(folder.rstrip("/"), Path(cache).expanduser() if cache else _own_cache(), retry_seconds)


def _own_cache() -> Path:
    """The user's folder for remote bytes on this machine, $TMPDIR/lzn_dist-UID: its name is known to all, so that what
    stands there is taken only where nobody else can have written to it. Raises ValueError."""
    path = Path(tempfile.gettempdir()) / f"lzn_dist-{os.getuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{path}, where copies of shards go, is a link or a folder that others can write to: move it away, or set "
            "data.cache to a folder of your own"
        )
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


class _Descriptor:
    """An open file that closes when its last user lets go; pread has no position, so threads and forks share it."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.number = os.open(path, flags, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalStorage:
    """A folder on a file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(_Descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read_file(self, name: str, limit: int) -> bytes:
        return (self.folder / name).read_bytes()  # one's own, of whatever size

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def know(self, identity: str, sizes: dict[str, int]) -> None:
        pass

    def fetch(self, spans: Iterable[Span]) -> None:
        pass

    def read(self, name: str, offset: int, size: int) -> bytes:
        return os.pread(self._open(self.folder / name).number, size, offset)


class _CachedShard:
    """The local copy of a shard: a sparse file, and beside it one with each block's CRC-32, 0 where there is none yet.

    Processes share both. A block counts as there only once its bytes are on the disk, and, for a process that has not
    fetched it itself, if they have that checksum; whoever fetches one holds a lock on its entry, so that the others
    wait for it instead of fetching it too.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.folder, self.size, self.blocks = path.parent, size, -(-size // BLOCK)
        self.data = _Descriptor(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        self.sums = _Descriptor(path.with_name(f"{path.name}.crc32"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        if os.fstat(self.data.number).st_size != size:
            os.ftruncate(self.data.number, size)
        self.known = bytearray(self.blocks)

    def missing(self, offset: int, size: int) -> list[int]:
        """The blocks of a span that are not there yet."""
        wanted = range(offset // BLOCK, min(self.blocks, -(-(offset + size) // BLOCK)))
        for block in wanted:
            self.known[block] = self.known[block] or self._is_there(block)
        return [block for block in wanted if not self.known[block]]

    def _is_there(self, block: int) -> bool:
        entry = os.pread(self.sums.number, 4, 4 * block)
        if entry in (b"", bytes(4)):
            return False
        return entry == _crc32(os.pread(self.data.number, BLOCK, block * BLOCK))

    def fill(self, block: int, get: Callable[[int, int], bytes]) -> None:
        """Fetch a block unless another process has done it meanwhile."""
        start = block * BLOCK
        # asked again and again: threads of two processes that wait for each other's blocks look like a deadlock to
        # the system, which counts by process, and would be refused
        while True:
            try:
                fcntl.lockf(self.sums.number, fcntl.LOCK_EX | fcntl.LOCK_NB, 4, 4 * block)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                time.sleep(0.01)
        try:
            if not self.missing(start, 1):
                return
            content = get(start, min(start + BLOCK, self.size))
            try:
                os.pwrite(self.data.number, content, start)
                getattr(os, "fdatasync", os.fsync)(self.data.number)  # macOS has the latter alone
                os.pwrite(self.sums.number, _crc32(content), 4 * block)
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror}: copies of shards go to {self.folder}; free it or set data.cache"
                ) from error
            self.known[block] = 1
        finally:
            fcntl.lockf(self.sums.number, fcntl.LOCK_UN, 4, 4 * block)


def _crc32(content: bytes) -> bytes:
    return (zlib.crc32(content) or 1).to_bytes(4, "little")


@functools.cache
def _filesystem(url: str, process: int) -> Any:
    """fsspec's connections to a server, of this process and kept for its life.

    fsspec's own cache of instances is emptied in a forked process, a loader's worker for example; that closes the
    connections, and takes them from the event queue (epoll) that the worker shares with its parent: the parent's next
    request would never be told of its answer. Here nothing is closed: a worker leaves its parent's instance alone.
    """
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if url.startswith(("http://", "https://")):  # logins of ~/.netrc, and the proxy that the environment names
        own = fsspec.config.conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
        options["client_kwargs"] = {"trust_env": True, **own}
    try:
        return fsspec.core.url_to_fs(url, **options)[0]
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error  # it names the package that is missing
    except ValueError as error:
        raise ValueError(f"{url}: no protocol that fsspec knows: {error}") from error


async def _answer(system: Any, url: str, start: int, end: int, whole: bool) -> bytes:
    """fsspec's request for bytes of a file, which takes any answer for them: here it must say that it is they, and no
    more is read than was asked for."""
    options = dict(system.kwargs)  # the user's own, of fsspec's configuration: headers, authorisation
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if not whole:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as response:
        system._raise_not_found_for_status(response, url)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError(f"{url}: the server answers compressed, though it is asked not to")
        if not whole:
            said = response.headers.get("Content-Range", "")
            if response.status != 206:
                raise ValueError(
                    f"the server of {url} does not answer range requests: use one that does, or copy the shards to a "
                    "folder"
                )
            if not (match := _RANGE.fullmatch(said)) or int(match[1]) != start or int(match[2]) >= end:
                raise ValueError(
                    f"{url}: the server was asked for bytes {start}-{end - 1}, its answer is {said[:80]!r}"
                )
        found = bytearray()
        async for part in response.content.iter_any():
            found += part
            if len(found) > end - start:
                if whole:
                    break
                raise ValueError(f"{url}: the server sends more than the bytes {start}-{end - 1} it was asked for")
    return bytes(found[: end - start])


_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RemoteStorage:
    """A folder on a server (http, https) or in an object store, through fsspec, read by range requests.

    What has been read stays in `cache`, in a folder of its own for each URL and manifest. A request that fails is
    repeated, after waits that double up to 30 s, for `retry_seconds`; then RemoteError.
    """

    def __init__(self, url: str, cache: Path, retry_seconds: float) -> None:
        self.url, self.cache, self.retry_seconds = url, cache, retry_seconds
        self.sizes: dict[str, int] = {}
        self.folder = cache
        self._prepare()

    def _prepare(self) -> None:
        self._lock, self._given_up, self._said = threading.Lock(), threading.Event(), 0.0
        self._shards: dict[str, _CachedShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _cat(self, name: str, start: int, end: int, *, whole: bool = False) -> bytes:
        """Bytes from start to end, or to the file's, from one request. whole: of a file that is expected to end before,
        which a server may also answer without ranges."""
        system, url = _filesystem(self.url, os.getpid()), f"{self.url}/{name}"
        if "http" in system.protocol:
            from fsspec.asyn import sync

            return bytes(sync(system.loop, _answer, system, url, start, end, whole, timeout=_REQUEST_SECONDS))
        patience = {"timeout": _REQUEST_SECONDS} if system.async_impl else {}
        found = bytes(system.cat_file(url, start=start, end=end, **patience))
        if len(found) > end - start:
            raise ValueError(f"{url}: more than the bytes {start}-{end - 1} that were asked for")
        return found

    def know(self, identity: str, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.folder = self.cache / hashlib.sha256(f"{self.url} {identity}".encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def read_file(self, name: str, limit: int) -> bytes:
        def get() -> bytes:
            found = self._cat(name, 0, limit + 1, whole=True)
            if len(found) > limit:
                raise ValueError(f"{self.url}/{name} has more than {limit:,} bytes: it is not what it is called")
            return found

        return self._persist(name, get)

    def size(self, name: str) -> int | None:
        return self.sizes.get(name)

    def fetch(self, spans: Iterable[Span]) -> None:
        missing = {(name, block) for name, start, size in spans for block in self._shard(name).missing(start, size)}
        if len(missing) == 1:
            self._fill(*missing.pop())
        elif missing:
            self._given_up.clear()
            with ThreadPoolExecutor(min(_CONNECTIONS, len(missing)), thread_name_prefix="fetch") as pool:
                try:
                    list(pool.map(lambda item: self._fill(*item), sorted(missing)))
                except BaseException:
                    self._given_up.set()  # the others need not wait for a server any more
                    pool.shutdown(cancel_futures=True)
                    raise

    def read(self, name: str, offset: int, size: int) -> bytes:
        self.fetch([(name, offset, size)])
        return os.pread(self._shard(name).data.number, size, offset)

    def _shard(self, name: str) -> _CachedShard:
        with self._lock:
            if name not in self._shards:
                while len(self._shards) >= _OPEN_FILES // 2:  # the oldest goes
                    self._shards.pop(next(iter(self._shards)))
                self._shards[name] = _CachedShard(self.folder / name, self.sizes[name])
            return self._shards[name]

    def _fill(self, name: str, block: int) -> None:
        self._shard(name).fill(block, lambda start, stop: self._request(name, start, stop))

    def _request(self, name: str, start: int, stop: int) -> bytes:
        def get() -> bytes:
            found = self._cat(name, start, stop)
            if len(found) < stop - start:
                raise ValueError(f"{name} ends at byte {start + len(found)}, its manifest says {self.sizes[name]}")
            return found

        return self._persist(name, get)

    def _persist(self, name: str, get: Callable[[], _T]) -> _T:
        """Call until it succeeds, or is refused for good, or patience ends."""
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                return get()
            except (FileNotFoundError, PermissionError, ValueError):
                raise
            except Exception as error:  # each library behind fsspec has errors of its own
                said = f"{type(error).__name__}: {without_secrets(str(error))[:200]}"
                status = getattr(error, "status", 0)
                if 400 <= status < 500 and status not in (408, 429):  # refused: waiting does not mend it
                    short = " (it is shorter than its manifest says)" if status == 416 else ""
                    raise ValueError(f"{self.url}/{name}: the server answers {status}{short}: {said}") from error
                waited = time.monotonic() - began
                if waited + pause > self.retry_seconds:
                    raise RemoteError(
                        f"{self.url}/{name} could not be read for {waited:.0f} s: {said}; see that the server is up"
                    ) from error
                with self._lock:  # one line for all that wait
                    if time.monotonic() - self._said > 1.0:
                        print(f"{self.url}: {said}; trying again in {pause:.1f} s", file=sys.stderr, flush=True)
                        self._said = time.monotonic()
                # not all ranks at the same moment
                if self._given_up.wait(pause * random.uniform(0.75, 1.25)):
                    raise RemoteError(f"{self.url}/{name}: given up") from error
                pause = min(2 * pause, 30.0)
