"""The report of runs: what it reads, what it says of a damaged folder, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lzn_dist import report as report_command
from lzn_dist.pages.charts import Line, chart, thin
from lzn_dist.pages.report import differences, names_of, read_run, report, skipped, timeline
from tests.helpers.browser import open_browser


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    """A run with a past: killed, preempted, finished; steps skipped; samples damaged; a picture."""
    folder = tmp_path / "a <run> & more"
    shutil.copytree(three, folder, ignore=shutil.ignore_patterns("checkpoints"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("\nseed: 0\n", "\nseed: 5\n"))
    events = [
        (1000.0, "running", 0, 1), (1500.0, "running", 200, 2), (1900.0, "preempted", 300, 2),
        (2000.0, "running", 300, 3), (2600.0, "finished", 400, 3),
    ]  # fmt: skip
    more = {"engine": "zero2", "world_size": 2, "why": "SIGUSR1"}
    lines = [{"time": t, "state": state, "step": step, "incarnation": n, **more} for t, state, step, n in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = [
        {"step": step, "loss": 400 / step, "loss_flow": 1.0, "skipped": int(step > 100) + 2 * int(step > 250),
         "images_per_second": 90 + step % 7, "seconds_flow": 0.1, "peak_memory_mb": 500, "lr": 0.1}
        for step in range(10, 401, 10)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 41')
    evaluations = [{"step": step, "knn": 0.5 + step / 1000, "zones.mean": 0.1} for step in (100, 200, 400)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (folder / "bad_samples.jsonl").write_text(
        '{"step": 5, "epoch": 0, "row": 3, "sample": "x.tar: <b>3</b> is damaged"}\n'
    )
    (folder / "figures").mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).parents[2] / "launch" / "pictures" / "zones.png", folder / "figures" / "zones.png")
    return folder


@pytest.mark.slow
def test_what_is_read_of_a_run(run: Path) -> None:
    facts = read_run(run)
    assert skipped(facts) == [(110, 1), (260, 2)]
    starts = timeline(facts)
    assert [(s.number, s.first, s.last, s.state) for s in starts] == [
        (1, 0, 200, "killed"), (2, 200, 300, "preempted"), (3, 300, 400, "finished")
    ]  # fmt: skip
    assert starts[1].ended == 1900.0 and starts[0].ended is None
    assert facts.measures == {"knn": 0.9, "zones.mean": 0.1} and facts.measured_at == 400
    page = report([run])
    assert "a &lt;run&gt; &amp; more" in page and "<run>" not in page and "x.tar: &lt;b&gt;3" in page
    for said in (
        "SIGUSR1",
        "6 min 40 s",
        "2 before step 260",
        "Health of the zones",
        "image/png;base64,",
        "zero2 on 2",
    ):
        assert said in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_several_runs_side_by_side(run: Path, three: Path) -> None:
    page = report([run, three])
    for said in ("What differs between the configurations", "loss_flow", "–"):
        assert said in page
    assert differences([read_run(run, "a"), read_run(three, "b")]) == [("seed", ["5", "0"])]
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]


@pytest.mark.slow
def test_the_page_lives_with_what_is_missing_or_damaged(run: Path, tmp_path: Path, capsys: Any) -> None:
    (run / "config.yaml").write_text("max_steps: [")
    (run / "evaluation.json").write_text("{")
    (run / "status.json").write_text("[]")
    facts = read_run(run)
    assert len(facts.problems) == 3 and facts.config is None
    assert all(problem.split()[0] in report([run]) for problem in ("evaluation.json", "status.json"))
    for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl", "bad_samples.jsonl"):
        (run / name).unlink()
    assert "a &lt;run&gt;" in report([run])
    with pytest.raises(FileNotFoundError, match="no run in"):
        report([tmp_path])


def test_a_comparisons_tables(tmp_path: Path) -> None:
    table = {"LZN": {"knn": [0.9, 0.92]}, "SimCLR": {"knn": [0.8]}, "Left": {}}
    results = {"seeds": [0, 1], "tables": {"Digits": table}}
    (tmp_path / "comparison.json").write_text(json.dumps(results))
    page = report([tmp_path])
    assert "0.910 ± 0.014" in page and "0.800" in page and "2 seed(s)" in page
    (tmp_path / "comparison.json").write_text('{"seeds": 3}')
    with pytest.raises(ValueError, match=r"comparison\.json is damaged"):
        report([tmp_path])


def test_charts_lose_no_spike_and_no_end() -> None:
    points = [(float(x), 100.0 if x == 7777 else (x % 13) / 13) for x in range(10_000)]
    kept = thin(points, 500)
    assert len(kept) <= 2000 and (7777.0, 100.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)
    drawn = chart("a < b", [Line("x", 0, [(1.0, 2.0)]), Line("none", 1, [])])
    assert "a &lt; b" in drawn and drawn.count("<polyline") == 1 and chart("empty", []) == ""
    data = json.loads(re.search(r'json">(.*?)</script>', drawn)[1])  # type: ignore[index]
    assert data["lines"] == [{"name": "x", "colour": 0, "x": [1.0], "y": [2.0]}]


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_command.main([str(run)]) == 0
    assert (run / "report.html").is_file()
    assert report_command.main([str(run), "--out", str(tmp_path / "new folder" / "r.html")]) == 0
    assert report_command.main([str(tmp_path / "gone")]) == 2
    assert report_command.main([str(run), "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "no run in" in errors[0] and "--out names a file" in errors[1]


@pytest.fixture
def served(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of `--watch`, in a thread of this process."""
    made: list[ThreadingHTTPServer] = []
    real = ThreadingHTTPServer

    def server(*given: Any) -> ThreadingHTTPServer:
        made.append(real(*given))
        return made[0]

    monkeypatch.setattr(report_command, "ThreadingHTTPServer", server)
    thread = threading.Thread(target=report_command.main, args=([str(run), "--watch", "--port", "0"],), daemon=True)
    thread.start()
    while not made:
        pass
    yield f"http://127.0.0.1:{made[0].server_address[1]}/"
    made[0].shutdown()
    thread.join(10)


def test_watch_serves_what_is_there_now(served: str, run: Path) -> None:
    def read() -> str:
        with urllib.request.urlopen(served) as answer:
            return str(answer.read().decode())

    assert "looks for news" in read() and "step 410" not in read()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('0, "loss": 0.5, "skipped": 9}\n')
    assert "6 before step 410" in read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(served + "etc/passwd")


@pytest.mark.process
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme: str, served: str, run: Path, three: Path, tmp_path: Path) -> None:
    """No errors, nothing wider than the window, values at the pointer, and nothing fetched from elsewhere."""
    (tmp_path / "r.html").write_text(report([run, three]))
    with open_browser() as browser:
        for address in (f"file://{tmp_path / 'r.html'}", served):
            for width in (1280, 390):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                errors: list[str] = []
                asked: list[str] = []
                page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(address)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                drawing = page.locator(".chart svg").first
                drawing.hover()
                tip = page.locator(".tip:visible").inner_text()
                assert re.match(r"step \d+\n\S", tip), tip
                ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (ground == "rgb(21, 23, 26)") == (scheme == "dark")
                assert not errors and not [url for url in asked if not url.startswith((address, "data:"))]
                page.close()
