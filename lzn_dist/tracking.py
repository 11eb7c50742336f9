"""What a run tells: metrics.jsonl, eval.jsonl, status.json, the progress bar and wandb."""

from __future__ import annotations

import json
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

from lzn_dist.config import Config


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a half-written last line is left out, a missing file is empty."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _logged_in() -> bool:
    return bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()


class Tracker:
    """Writes on the main process; `log` is collective (it averages over ranks)."""

    def __init__(self, config: Config, accelerator: Accelerator, step: int) -> None:
        self.config, self.accelerator = config, accelerator
        self.main = accelerator.is_main_process
        self.folder = Path(config.output_dir)
        self.bar = tqdm(
            total=config.max_steps, initial=step, unit="step", disable=not self.main, dynamic_ncols=True,
            desc=config.task, file=sys.stderr, mininterval=1.0,
        )  # fmt: skip
        self.last_time, self.last_step = perf_counter(), step
        if self.main:
            for name in ("metrics.jsonl", "eval.jsonl"):
                # lines past the checkpoint belong to steps that are about to be taken again
                kept = [row for row in read_lines(self.folder / name) if row["step"] <= step]
                (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
        if config.tracking.wandb != "disabled":
            mode = config.tracking.wandb
            if mode == "auto":
                mode = "online" if _logged_in() else "offline"
            os.environ.setdefault("WANDB_SILENT", "true")
            accelerator.init_trackers(
                config.tracking.project, config.model_dump(mode="json"),
                {"wandb": {"dir": str(self.folder), "mode": mode, "name": self.folder.name}},
            )  # fmt: skip

    def log(self, step: int, scalars: dict[str, Tensor], lr: dict[str, float], seconds: dict[str, float]) -> None:
        """One line of metrics.jsonl: scalars are averaged over ranks; seconds are sums since the last line."""
        names = list(scalars)
        values = torch.stack([scalars[name].detach().double().cpu() for name in names])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), "mean").cpu()
        now = perf_counter()
        steps = max(1, step - self.last_step)
        rate = steps * self.config.data.global_batch / (now - self.last_time)
        self.last_time, self.last_step = now, step
        if not self.main:
            return
        row: dict[str, Any] = {"step": step, "images": step * self.config.data.global_batch}
        row.update({name: float(value) for name, value in zip(names, values, strict=True)})
        row.update({f"lr_{name}": value for name, value in lr.items()})
        row["images_per_second"] = round(rate, 1)
        row.update({f"seconds_{part}": round(value / steps, 5) for part, value in seconds.items()})
        row["peak_memory_mb"] = round(_peak_memory_mb(), 1)
        self._write("metrics.jsonl", row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", images_s=f"{rate:.0f}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """One line of eval.jsonl (main process)."""
        self._write("eval.jsonl", {"step": step, **values}, prefix="eval/")
        self.last_time, self.last_step = perf_counter(), step

    def _write(self, name: str, row: dict[str, Any], prefix: str = "") -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.config.tracking.wandb != "disabled":
            self.accelerator.log({prefix + k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def status(self, state: str, step: int, why: str = "") -> None:
        """status.json: running, finished, preempted or failed."""
        if self.main:
            write_json(self.folder / "status.json", {"state": state, "step": step, "why": why})

    def close(self) -> None:
        self.bar.close()
        if self.config.tracking.wandb != "disabled":
            self.accelerator.end_training()


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
