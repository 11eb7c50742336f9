"""What a run tells: metrics.jsonl, eval.jsonl, the progress bar and wandb."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lzn_dist.config import Config, ConfigError
from lzn_dist.data import BadSample, Batch
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import all_gather_object
from lzn_dist.training.flops import peak_flops
from lzn_dist.training.run_folder import RunFolder, read_lines
from lzn_dist.training.step import Counters

WANDB_SECONDS = 15.0  # for its service to answer, and its server where it is online


def wandb_mode(asked: str) -> str:
    """What tracking.wandb=auto is: WANDB_MODE where it is set, else online where wandb knows a key of the user's."""
    if asked != "auto":
        return asked
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    try:
        import wandb  # a second: not for runs without it

        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except Exception:  # it looks for the user's files, and there may be no user, home or wandb; starting it tells
        return "offline"


class BadSamples:
    """Damaged samples that a rank had to replace, counted within an epoch, and told by the main process.

    epoch: in which a resumed run is; what bad_samples.jsonl holds of it counts too. Collective.
    """

    def __init__(self, folder: RunFolder | None, epoch: int = -1) -> None:
        self.folder, self.epoch, self.new = folder, epoch, list[BadSample]()
        lines = [] if folder is None else read_lines(folder.path / "bad_samples.jsonl", ("step", "epoch"))
        self.rows = all_gather_object({line.get("row", -1) for line in lines if line["epoch"] == epoch})[0]
        self.reported = float(len(self.rows))
        self.elsewhere = 0 if Topology.current().is_main else len(self.rows)  # the main process counts those

    def count(self, batch: Batch) -> int:
        """Take note of a batch's; returns how many samples of its epoch this rank has found damaged."""
        if batch.epoch != self.epoch:
            self.epoch, self.rows, self.reported, self.elsewhere = batch.epoch, set(), 0.0, 0
        self.new += {bad.row: bad for bad in batch.bad if bad.row not in self.rows}.values()
        self.rows |= {bad.row for bad in batch.bad}
        return len(self.rows) - self.elsewhere

    def report(self, total: float, step: int) -> bool:
        """Say which are new; returns whether any are. total: the counts' sum over ranks. Collective where it has
        grown."""
        if total <= self.reported:
            return False
        self.reported = total
        told, self.new = all_gather_object(self.new), []
        for bad in (bad for part in told for bad in part):
            if Topology.current().is_main:
                print(f"replaced a damaged sample: {bad.why}", file=sys.stderr)
            if self.folder is not None:
                row = {"step": step, "epoch": self.epoch, "row": bad.row, "sample": bad.why}
                self.folder.append("bad_samples.jsonl", row)
        return True


class Tracker:
    """Writes on the main process, into its run's folder; `log` is collective (it averages over ranks).

    flops_per_image: of one training step, for the model FLOPs utilisation on CUDA.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        folder: RunFolder | None,
        step: int,
        flops_per_image: float = 0.0,
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.told: set[tuple[str, str]] = set()
        self.flops_per_image = flops_per_image
        self.bar = tqdm(
            total=config.max_steps, initial=step, unit="step", disable=folder is None, dynamic_ncols=True,
            desc=config.task, file=sys.stderr, mininterval=1.0,
        )  # fmt: skip
        self.last_time, self.last_step = perf_counter(), step
        asked = config.tracking.wandb
        mode = "disabled" if folder is None else wandb_mode(asked)
        self.tracks = False
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        why = self._start(mode)
        if why and asked != "auto":
            raise ConfigError(
                f"wandb does not start ({why}): log in (wandb login), or set tracking.wandb=offline or disabled"
            )
        if why and mode == "online":
            print(f"wandb does not start online ({why}): going on offline", file=sys.stderr)
            why = self._start("offline")
        if why:
            print(f"wandb does not start ({why}): going on without it", file=sys.stderr)

    def _start(self, mode: str) -> str:
        """Start wandb; returns why it does not, in a line."""
        output = Path(self.config.output_dir)
        settings: dict[str, Any] = {"dir": str(output), "mode": mode, "name": output.name}
        try:
            import wandb

            settings["settings"] = wandb.Settings(init_timeout=WANDB_SECONDS)
            values = self.config.model_dump(mode="json")
            self.accelerator.init_trackers(self.config.tracking.project, values, {"wandb": settings})
        except Exception as error:
            self.accelerator.trackers = []  # one that has not started cannot be ended either
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.tracks = True
        return ""

    def log(
        self, counters: Counters, scalars: dict[str, Tensor], lr: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """One line of metrics.jsonl: scalars are averaged over ranks; seconds are a step's, averaged since the last."""
        step, batch = counters.step, self.config.data.global_batch
        values = torch.stack([value.detach().double().cpu() for value in scalars.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), "mean").cpu()
        now = perf_counter()
        steps = max(1, step - self.last_step)
        rate = steps * batch / (now - self.last_time)
        self.last_time, self.last_step = now, step
        if self.folder is None:
            return
        row: dict[str, Any] = {"step": step, "images": counters.batch * batch}
        row.update({name: float(value) for name, value in zip(scalars, values, strict=True)})
        row["lr"] = max(lr.values())
        row.update({f"lr_{name}": value for name, value in lr.items()})
        row["skipped"] = counters.batch - step
        row["images_per_second"] = round(rate, 1)
        row.update({f"seconds_{part}": round(value / steps, 5) for part, value in seconds.items()})
        row["peak_memory_mb"] = round(_peak_memory_mb(), 1)
        limit = peak_flops(self.config) * self.accelerator.num_processes
        if limit:
            row["mfu"] = round(rate * self.flops_per_image / limit, 4)
        self._write("metrics.jsonl", row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", images_s=f"{rate:.0f}")

    def evaluation(
        self, step: int, values: dict[str, float], measured_on: dict[str, Any], left_out: dict[str, str]
    ) -> None:
        """One line of eval.jsonl (main process); its random numbers are those of seed 0, as evaluate.py's. What is left
        out for the same reason every time is told once."""
        row = {"step": step, "seed": 0, **values, "measured_on": measured_on, "left_out": left_out}
        self._write("eval.jsonl", row, prefix="eval/")
        for name, why in left_out.items():
            if (name, why) not in self.told:
                self.told.add((name, why))
                self.bar.write(f"evaluation leaves out {name}: {why}", file=sys.stderr)

    def resume_clock(self, step: int) -> None:
        """Do not count what happened since the last line as training."""
        self.last_time, self.last_step = perf_counter(), step

    def _write(self, name: str, row: dict[str, Any], prefix: str = "") -> None:
        assert self.folder is not None
        self.folder.append(name, row)
        if not self.tracks:
            return
        try:
            numbers = {prefix + k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
            self.accelerator.log(numbers, step=row["step"])
        except Exception as error:  # it must not cost the run
            self.tracks = False
            print(f"wandb takes no more ({type(error).__name__}: {error}): going on without it", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
