"""A page that shows what runs have done: lzn_dist report RUN [RUN …] --out report.html

One self-contained file with curves (loss, rates, time by part, memory, online probes), measures, pictures, starts and
ends, skipped steps, damaged samples and what differs between the runs' configurations. RUN may also be a folder of
`lzn_dist compare`, and a run that is still going; --watch serves the page on this machine and keeps it up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lzn_dist.exit_status import REFUSED, status_of, told
from lzn_dist.pages import report
from lzn_dist.paths import path_argument
from lzn_dist.terminal import command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="folders of runs or comparisons")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="where the page goes (default: report.html in the first RUN)"
    )
    parser.add_argument("--watch", action="store_true", help="serve the page instead, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8765, help="of --watch (default: 8765; 0: any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="of --watch (default: 127.0.0.1, this machine alone)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for what the user must mend, said in one line."""
    options = parse(arguments)
    try:
        page = report(options.runs)
        if options.watch:
            return serve(options.runs, options.host, options.port)
        out: Path = options.out or options.runs[0] / "report.html"
        if out.is_dir():
            raise ValueError(f"{out} is a folder: --out names a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(out)
    except (OSError, ValueError) as error:
        said = told(error, options.out or options.runs[0]) if isinstance(error, OSError) else str(error)
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return REFUSED if isinstance(error, FileNotFoundError) else status_of(error)
    print(f"written: {out}")
    return 0


def serve(runs: Sequence[Path], host: str, port: int) -> int:
    """Serve the page as it is at each request, until Ctrl-C. Raises OSError where the port is taken."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/":
                self.send_error(404)
                return
            try:
                content, status = report(runs, watch=True).encode("utf-8", "replace"), 200
            except (OSError, ValueError) as error:  # moved away meanwhile
                content, status = str(error).encode("utf-8", "replace"), 503
            self.send_response(status)
            self.send_header("Content-Type", f"text/{'html' if status == 200 else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host, port), Page)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {host}:{port}; --port 0 takes a free one") from error
    with server:
        print(f"http://{host}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
