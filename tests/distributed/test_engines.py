"""Every engine on several ranks against one process: losses, gradients and weights over three optimiser steps.

Cells cover all pairs of (task, activation checkpointing, gradient caching, anchors), under DDP here and under ZeRO-2,
ZeRO-3 and FSDP2 in the soak; of these, each way of checkpointing and caching here. Micro-batches are uneven. DDP and
FSDP2 are compared in float64, ZeRO in float32 (see `lzn_dist.verify`, whose rows and tolerances these are).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.captioned import write_partial_digits
from tests.helpers.launching import ROOT, SMALL, ranks
from tests.helpers.settings import BOTH_DIRECTIONS, OWN, encoder_with

pytestmark = pytest.mark.process

WORKER = Path(__file__).with_name("verify_worker.py")
Cell = dict[str, Any]
TO_AND_FRO = (
    "alignment.pairs=[{latents: image, anchors: label, weight: 0.7, over: mean}, "
    "{latents: label, anchors: image, weight: 0.3, over: softmax, temperature: 0.5}]"
)


def cell(task: str, checkpointing: str, caching: bool, anchors: str, *more: str, fault: str | None = None) -> Cell:
    overrides = [f"activation_checkpointing={checkpointing}", f"micro_batch={5 if caching else 0}"]
    overrides += [f"anchors={anchors}", f"flow_store_every={1 if checkpointing == 'none' else 4}", *more]
    return {"config": task, "overrides": overrides, "fault": fault}


PAIRS = [
    cell("generation", "none", True, "ring", "decode=[{latent_dropout: 0.3}]"),
    cell("generation", "selective", False, "gathered"),
    cell("generation", "full", False, "ring"),
    cell("representation", "none", False, "gathered", BOTH_DIRECTIONS),
    cell("representation", "selective", True, "ring", "modalities.image.anchor_norm=2"),
    cell("representation", "full", True, "gathered"),
    cell("joint", "none", True, "gathered"),
    cell("joint", "selective", False, "ring"),
    cell("joint", "full", True, "ring"),
]
BASELINES = [
    cell("generation", "selective", True, "gathered", "objective=rectified_flow", "decode=[{class_conditional: true}]"),
    cell("representation", "none", False, "gathered", "objective=simclr"),
    cell("representation", "none", True, "gathered", "objective=moco", "contrast.queue=48", "contrast.momentum=0.9"),
    cell("representation", "full", True, "gathered", "objective=supervised"),
]
# a network is used twice, and recomputed: under ZeRO-3 that is two backwards
TWICE = cell("representation", "selective", False, "gathered")
# networks that no engine has seen, and pairs that no task of the paper has: images to labels and back
OWN_CELLS = [
    cell("joint", "selective", True, "gathered", *OWN),
    cell("joint", "full", False, "gathered", *OWN, TO_AND_FRO, "modalities.label.anchor_norm=3"),
]
# images and captions in both directions, with labels beside; some samples lack a caption, a label or both
SMALL_TEXT = [
    *(
        f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2, dropout: 0.1}}"
        for role in ("encoder", "decoder")
    ),
    *encoder_with(dropout=0.1),
]
WITH_LABELS = (
    "alignment.pairs=[{latents: image, anchors: text, over: mean}, {latents: text, anchors: image, over: mean}, "
    "{latents: image, anchors: label}]"
)
DECODED = (
    "decode=[{what: image, latents: text, class_conditional: true, condition_dropout: 0.3}, "
    "{what: text, latents: image, class_conditional: true}, "
    "{what: text, latents: label, class_conditional: true, point: anchor, weight: 0.5}]"
)
PARTIAL = [WITH_LABELS, "data.partial=true", "data.embedded=none", "data.shards=PARTIAL", "data.global_batch=16"]
TEXTS = [
    cell("text", "none", False, "gathered", *SMALL_TEXT),
    cell("text", "selective", True, "ring", *SMALL_TEXT, *PARTIAL),
    cell("text", "full", True, "gathered", *SMALL_TEXT, *PARTIAL, DECODED),
    cell("text", "none", True, "gathered", *SMALL_TEXT, "objective=clip"),
    cell("text", "selective", False, "gathered", *SMALL_TEXT, *PARTIAL[1:], "objective=siglip", "decode=[]"),
]
# Adam hides a constant factor in the encoder's gradients from the loss of the first steps; verify must not
GATHER = cell("joint", "none", False, "gathered", fault="gather")
STALE = cell("joint", "none", True, "gathered", fault="stale")  # buffers of ZeRO-3
FEW = [PAIRS[3], PAIRS[6], PAIRS[8]]
SOME = [PAIRS[0], PAIRS[4], PAIRS[5], PAIRS[7]]


def verify(
    engine: str, cells: list[Cell], shards: Path, folder: Path, processes: int = 2
) -> list[list[dict[str, Any]]]:
    """The rows of each cell."""
    output = folder / "rows.json"
    if any("data.shards=PARTIAL" in described["overrides"] for described in cells):
        partial = write_partial_digits(folder / "partial")
        cells = [
            {**own, "overrides": [word.replace("=PARTIAL", f"={partial}") for word in own["overrides"]]}
            for own in cells
        ]
    done = ranks(engine, WORKER, output, shards, json.dumps(cells), processes=processes, cwd=folder)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"engine {engine} on {processes} process(es)" in done.stdout
    found: list[list[dict[str, Any]]] = json.loads(output.read_text())
    assert len(found) == len(cells)
    return found


@pytest.mark.parametrize(
    "engine,cells,processes",
    [
        ("ddp", [GATHER, *PAIRS, *OWN_CELLS, TEXTS[0], TEXTS[3]], 2),
        ("fsdp", [PAIRS[4], PAIRS[7], OWN_CELLS[0], TEXTS[2]], 2),
        ("zero1", FEW[2:], 2),
        pytest.param("zero1", FEW, 2, marks=pytest.mark.soak),
        ("zero2", [*SOME, OWN_CELLS[0], TEXTS[1]], 2),
        ("zero3", [STALE, TWICE, PAIRS[8], TEXTS[2]], 2),
        pytest.param("fsdp", [*PAIRS, OWN_CELLS[1], BASELINES[2], *TEXTS], 2, marks=pytest.mark.soak),
        pytest.param("zero2", [*PAIRS, OWN_CELLS[1], *TEXTS], 2, marks=pytest.mark.soak),
        pytest.param("zero3", [*PAIRS, *OWN_CELLS, BASELINES[0], BASELINES[2], *TEXTS], 2, marks=pytest.mark.soak),
        ("zero3_offload", FEW[1:2], 2),
        pytest.param("zero3_offload", FEW, 2, marks=pytest.mark.soak),
        ("ddp", [*BASELINES, TEXTS[1], TEXTS[4]], 4),
    ],
)
def test_equals_one_process_and_a_fault_does_not(
    engine: str, cells: list[Cell], processes: int, digits: Path, tmp_path: Path
) -> None:
    for described, rows in zip(cells, verify(engine, cells, digits, tmp_path, processes), strict=True):
        kinds = {row["what"].split(" ")[0] for row in rows}
        assert kinds == {"loss", "gradient", "change"}
        if described["fault"]:
            assert any(not row["passed"] and row["what"].startswith("gradient of image.encoder") for row in rows)
        else:
            assert all(row["passed"] for row in rows), (described, [row for row in rows if not row["passed"]])


def test_the_command_line(digits: Path, tmp_path: Path) -> None:
    arguments = [ROOT / "configs" / "digits_joint.yaml", *SMALL, f"data.shards={digits}"]
    done = ranks("ddp", ROOT / "lzn_dist" / "verify.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "verify: everything agrees" in done.stdout and "gradient of image.decoder Conv2d" in done.stdout
    done = ranks("zero2", ROOT / "lzn_dist" / "verify.py", *arguments, "precision=float64", cwd=tmp_path)
    assert done.returncode != 0 and "error: precision=float64 is for DDP and FSDP" in done.stdout
