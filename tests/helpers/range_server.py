"""A small HTTP server with range requests, as real object stores have them: python range_server.py FOLDER PORT [LOG]

LOG gets one line a request: its range and path.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def serve(folder: Path, port: int, log: Path | None, ranges: bool = True) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = folder / self.path.lstrip("/")
            asked = self.headers.get("Range", "")
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{asked or 'all'} {self.path}\n")
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if ranges else None
            if match and int(match[1]) >= len(content):
                self.send_error(416)
                return
            first, last = (int(match[1]), min(int(match[2]), len(content) - 1)) if match else (0, len(content) - 1)
            self.send_response(206 if match else 200)
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            if match:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if not head:
                self.wfile.write(content[first : last + 1])

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_server(folder: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, __file__, str(folder), str(port), str(log)])
    while True:
        assert process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.02)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None).serve_forever()
