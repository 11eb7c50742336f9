"""lzn_dist COMMAND …: all commands by one name, from any folder; `lzn_dist COMMAND --help` says more.

train      train a configuration; --launch NAME --processes N starts it under a launch configuration
evaluate   measure a run and draw its figures
infer      use a trained model on files: embed, classify, caption, reconstruct, generate, interpolate
export     a folder that needs neither the run nor its data; for transformers, ONNX and torch.export
verify     compare a launch with a single process
report     a page that shows what runs have done; --watch: while they are going
playground draw, upload or type into a trained model in the browser
compare    train and measure several configurations over seeds
prepare    write a data set as shards: digits, imagenet, image_folder, image_text, …; check; tokenizer
inspect    look at a data set
submit     train on a SLURM cluster
status     what runs are doing
config     configurations: --list, --show NAME, --keys

A configuration is a path, or the name of one that comes with lzn_dist (digits_joint).
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from lzn_dist.shipped import find, shipped
from lzn_dist.terminal import command

MODULES = {
    "train": "lzn_dist.train", "evaluate": "lzn_dist.evaluate", "verify": "lzn_dist.verify",
    "infer": "lzn_dist.infer", "export": "lzn_dist.export", "report": "lzn_dist.report",
    "playground": "lzn_dist.playground", "compare": "lzn_dist.compare",
    "inspect": "lzn_dist.tools.inspect", "config": "lzn_dist.tools.show_config",
}  # fmt: skip
SCRIPTS = {"submit": "slurm/submit.py", "status": "slurm/status.py"}
LAUNCHED = ("train", "evaluate", "verify", "infer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name == "--version":
        from lzn_dist import __version__

        print(__version__)
        return 0
    if name == "prepare":
        return _prepare(rest)
    if name in SCRIPTS:
        folder, script = SCRIPTS[name].split("/")
        return _run(str(shipped(folder) / script), f"lzn_dist {name}", rest)
    if name not in MODULES:
        print(f"error: no command {name!r}: {', '.join([*MODULES, *SCRIPTS, 'prepare'])}", file=sys.stderr)
        return 2
    if name in LAUNCHED:
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        own.add_argument("--launch", default="")
        own.add_argument("--processes", type=int, default=0)
        launch, rest = own.parse_known_args(rest)
        if launch.launch or launch.processes:
            return _launch(name, launch.launch or "ddp", launch.processes, rest)
    return _run(MODULES[name], f"lzn_dist {name}", rest)


def console() -> int:
    """As a console script calls it."""
    return command(main)


def _launch(name: str, launch: str, processes: int, rest: list[str]) -> int:
    """Under accelerate, which takes this process's place: signals reach it as they would have reached this one."""
    try:
        file = find(launch, "launch")
    except FileNotFoundError as error:
        print(f"error: --launch {launch}: {error}", file=sys.stderr)
        return 2
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    words += [f"--num_processes={processes}"] if processes else []
    sys.stdout.flush()
    os.execv(sys.executable, [*words, "-m", MODULES[name], *rest])


def _prepare(rest: list[str]) -> int:
    known = sorted(path.stem for path in shipped("data_prep").glob("*.py") if not path.stem.startswith("_"))
    if not rest or rest[0] not in known:
        asked = rest and rest[0] not in ("-h", "--help")
        print(f"{'error: no data set ' + repr(rest[0]) + '; ' if asked else ''}lzn_dist prepare {'|'.join(known)} …",
              file=sys.stderr if asked else sys.stdout)  # fmt: skip
        return 2 if asked or not rest else 0
    return _run(str(shipped("data_prep") / f"{rest[0]}.py"), f"lzn_dist prepare {rest[0]}", rest[1:])


def _run(target: str, shown: str, rest: list[str]) -> int:
    """A module or script as its own command line would run it."""
    sys.argv = [shown, *rest]
    try:
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        raise
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
