"""Every command of the README, as written, with few steps and small networks appended.

They run in a folder where the paths that they name are there. One that cannot be run here stands in ELSEWHERE with the
reason; a new one that is in no list fails.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lzn_dist.cluster.job import attempts
from tests.helpers.launching import python
from tests.helpers.published import imagenet
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

TINY = [
    "max_steps=2", "checkpoint_every=2", "tracking.wandb=disabled", "data.global_batch=8", "evaluation.batch=8",
    "evaluation.samples_per_class=1", "evaluation.alignment_steps=5", "latent.steps=3", "alignment.steps=5",
    *encoder_with(channels=8), "flow.sampler_steps=2", "cpu_threads=1",
]  # fmt: skip
IMAGENET = [*TINY, "data.image_size=32", "data.resize=36", "data.num_classes=5", "data.workers=0", "data.streams=1",
            *encoder_with(blocks=[1, 1, 1, 1]), "latent.dim=8"]  # fmt: skip
TINY = [*TINY, *decoder_with(channels=8)]
# by how a command begins, what is appended
TEXT = [
    *TINY, *decoder_with(attention_resolutions=[4]),
    *(f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")),
]  # fmt: skip
RUN = {
    "accelerate launch --config_file launch/cpu.yaml lzn_dist/train.py configs/digits_text.yaml": TEXT,
    "python data_prep/image_text.py --folder pictures": ["--processes", "1"],
    "accelerate launch --config_file launch/cpu.yaml lzn_dist/train.py configs/digits_joint.yaml": TINY,
    "accelerate launch --config_file launch/ddp.yaml lzn_dist/train.py configs/digits_joint.yaml": TINY,
    "accelerate launch --config_file launch/zero2.yaml lzn_dist/verify.py configs/digits_joint.yaml": TINY,
    "python data_prep/imagenet.py": ["--processes", "1"],
    "python data_prep/check.py data/imagenet": ["--processes", "1"],
    "python -m lzn_dist.tools.inspect data/imagenet": ["--samples", "2", "--size", "32"],
    "accelerate launch --config_file launch/zero2.yaml lzn_dist/train.py configs/imagenet_rep": IMAGENET,
    "python data_prep/image_folder.py --folder photos": ["--processes", "1"],
    "accelerate launch --config_file launch/cpu.yaml lzn_dist/train.py configs/images_joint.yaml": TINY,
    "python slurm/submit.py configs/digits_joint.yaml output_dir=runs/cluster --nodes 2 --time 30m --preflight -": [],
    "python slurm/submit.py configs/digits_joint.yaml output_dir=runs/local --local": TINY,
    "python -m lzn_dist.evaluate runs/digits_joint": ["--quick", "evaluation.samples_per_class=1"],
    "lzn_dist report runs/digits_joint runs/two": [],
    "lzn_dist infer classify runs/digits_joint photos": [],
    "lzn_dist infer generate runs/digits_joint": [],
    "lzn_dist export runs/digits_joint runs/model": [],
}  # fmt: skip
ELSEWHERE = {
    "bash launch/quickstart.sh": "installs; the first command that a fresh machine runs",
    "bash tests/run.sh": "this very suite",
    "python slurm/submit.py configs/digits_joint.yaml output_dir=runs/cluster --nodes 2 --time 30m --preflight":
        "needs a cluster: tests/slurm submits so",
    "python slurm/status.py runs/cluster": "needs a cluster: tests/slurm looks so",
    "python -m lzn_dist.tools.import_published FILE": "needs the authors' file: tests/models makes one",
    "lzn_dist playground runs/digits_joint": "serves until Ctrl-C: tests/pages/test_playground.py clicks through it",
    "lzn_dist compare digits": "an hour; tests/test_compare.py compares two rows",
}  # fmt: skip


def blocks() -> list[str]:
    """The indented blocks of the README, without their indentation."""
    found = re.findall(r"(?:^|\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)", README)
    return [textwrap.dedent(block.strip("\n")) for block in found]


def commands() -> list[str]:
    """Shell commands, one a line, without remarks."""
    lines = [line for block in blocks() for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"(bash|python|accelerate|pip|lzn_dist) ", line)]


def listed(command: str, lists: dict[str, object]) -> str:
    """The longest beginning in a list that a command has; "" for none."""
    return max((start for start in lists if command.startswith(start)), key=len, default="")


def test_every_command_is_in_a_list() -> None:
    found = commands()
    assert len(found) >= 18
    assert not [command for command in found if not listed(command, RUN | ELSEWHERE)]
    unused = [start for start in RUN | ELSEWHERE if not any(listed(c, RUN | ELSEWHERE) == start for c in found)]
    assert not unused


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"(?<![\w/.-])((?:lzn_dist|configs|launch|data_prep|slurm|tests)/[\w./-]*\w)", README)
    assert len(named) > 30
    assert not [path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's, with what the commands expect to find."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lzn_dist", "configs", "launch", "data_prep", "slurm", "tests"):
        (folder / name).symlink_to(ROOT / name)
    imagenet(folder)
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                buffer = io.BytesIO()
                pixels = random.integers(0, 256, (70 + i, 90, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                (folder / "photos" / split / name / f"IMG {i} #1.JPG").write_bytes(buffer.getvalue())
    (folder / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / "pictures" / f"red #{i}.jpg")
        (folder / "pictures" / f"red #{i}.txt").write_text(f"shade {i} of red\n")
    return folder


def shell(words: list[str], folder: Path) -> str:
    """What a shell would start, in a process in which everything is imported already."""
    entries = {"accelerate": "accelerate.commands.accelerate_cli", "lzn_dist": "lzn_dist"}
    command = words[1:] if words[0] == "python" else ["-m", entries[words[0]], *words[1:]]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "WANDB_MODE": "disabled",
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = python(*command, cwd=folder, environment=environment, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}"
    return done.stdout


def ended(run: Path) -> tuple[object, ...]:
    """How a job that had one start ended, once it has."""
    end = time.monotonic() + 200
    while [line["event"] for line in attempts(run)] != ["start", "end"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    status = json.loads((run / "status.json").read_text())
    return tuple(status[name] for name in ("state", "step", "engine", "world_size"))


@pytest.mark.process
def test_the_commands_run_in_their_order(checkout: Path) -> None:
    for command in commands():
        start = listed(command, RUN | ELSEWHERE)
        if start not in RUN:
            continue
        words = shlex.split(command)
        if words[0] == "accelerate":  # a free port: other tests run beside this one
            words[2:2] = ["--main_process_port", "0"]
        said = shell([*words, *RUN[start]], checkout)
        if "evaluate" in command:
            assert "measured on split test: 360 held-out images" in said
        if "image_text" in command:
            assert "24 files seen" not in said and "12 files seen, 12 taken, 0 left out" in said
        if "infer classify" in command:
            assert "16 rows" in said
        if "image_folder" in command:
            assert "16 files seen, 16 taken, 0 left out" in said
        if "--local" in command:  # it returns at once
            assert ended(checkout / "runs" / "local") == ("finished", 2, "ddp", 2)
    assert (checkout / "runs" / "photos" / "status.json").read_text().count("finished") == 1
    assert not (checkout / "compiled").exists()  # DeepSpeed builds nothing on the way: a machine may have no compiler
    # and what is said to follow: the model of the first command, used
    script = next(block for block in blocks() if block.startswith("import lzn_dist"))
    images = "import torch\nimages = torch.randint(0, 256, (3, 1, 8, 8)).to(torch.uint8)\n"
    shell(["python", "-c", images + script], checkout)
    shell(["python", "-c", next(block for block in blocks() if "lzn_dist.zones" in block)], checkout)
    script = next(block for block in blocks() if "runs/digits_text" in block and "zero_shot" in block)
    shell(["python", "-c", f"import lzn_dist\n{images}{script}"], checkout)
