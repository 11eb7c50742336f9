#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: tests (CUDA kernels, engines with nccl, exact resume), then the
# benchmark, whose table goes to tests/benchmarks/results/gpu.md. Uses the Python on PATH (PYTHON=... for another) and
# installs nothing: what is missing is named. Some eight minutes on one H100; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE=disabled OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1
"$python" - <<'P'
import importlib.util
import sys

needed = {
    "torch": "torch", "accelerate": "accelerate", "deepspeed": "deepspeed", "transformers": "transformers",
    "webdataset": "webdataset", "torchdiffeq": "torchdiffeq", "submitit": "submitit",
    "pydantic": "pydantic", "yaml": "pyyaml", "simplejpeg": "simplejpeg", "cv2": "opencv-python-headless",
    "fsspec": "fsspec", "sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "tqdm": "tqdm",
    "triton": "triton", "pytest": "pytest", "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist",
}
missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"error: missing Python packages: {' '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU here")
has_xformers = "" if importlib.util.find_spec("xformers") else " (no xformers: torch's attention)"
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}{has_xformers}")
P
status=0
"$python" -m pytest tests/gpu tests/models/test_layers.py -q -n 6 --dist worksteal -p no:cacheprovider "$@" || status=$?
"$python" tests/benchmarks/gpu.py --output tests/benchmarks/results/gpu.md || status=$?
exit "$status"
