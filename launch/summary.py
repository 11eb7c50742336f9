"""The quickstart's last page: one table from the runs' evaluations, summary.json, all figures in one folder, and the
report of both runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lzn_dist.evaluation.zone_figure import toy_zone_figure
from lzn_dist.pages import report

ROWS = {
    "joint.accuracy_centre": "test accuracy at the zones' centres",
    "joint.recognised": "conditional samples recognised as their class",
    "joint.recognised_prior": "  the same, class read from a prior latent",
    "joint.frechet": "Fréchet distance in digit-classifier features",
    "representation.linear_probe": "linear probe, LZN representation",
    "untrained.linear_probe": "  untrained encoder",
    "pixels.linear_probe": "  raw pixels",
    "representation.knn": "nearest neighbours, LZN representation",
    "untrained.knn": "  untrained encoder",
    "pixels.knn": "  raw pixels",
}


def main(folder: Path) -> None:
    """Read FOLDER/{joint,representation}/evaluation.json; write FOLDER/summary.json and FOLDER/figures."""
    joint, representation = (
        json.loads((folder / task / "evaluation.json").read_text()) for task in ("joint", "representation")
    )
    summary = {}
    for name in ROWS:
        group, key = name.split(".")
        summary[name] = joint[key] if group == "joint" else representation[key if group == "representation" else name]
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for task in ("joint", "representation"):
        for picture in sorted((folder / task / "figures").glob("*.png")):
            shutil.copy(picture, figures / f"{task}_{picture.name}")
    toy_zone_figure(figures / "zones_in_two_dimensions.png")  # the picture that explains the method
    print()
    for name, text in ROWS.items():
        value = summary[name]
        note = ""
        if name == "joint.accuracy_centre":
            note = f"   (95 % interval {joint['accuracy_centre_low']:.1%} to {joint['accuracy_centre_high']:.1%})"
        print(f"  {text:<48} {value:8.3f}" if name.endswith("frechet") else f"  {text:<48} {value:8.1%}{note}")
    print(f"\n  table: {folder / 'summary.json'}\n  figures:")
    for picture in sorted(figures.glob("*.png")):
        print(f"    {picture}")
    page = folder / "report.html"
    page.write_text(report([folder / "joint", folder / "representation"]), encoding="utf-8")
    print(f"  report, for a browser: {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
