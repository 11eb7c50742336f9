#!/usr/bin/env bash
# Installs what the tests need into .venv and runs everything: ruff, mypy, pytest. Arguments go to pytest.
# --fast: what starts no process and takes less than two seconds, for the inner loop.
# LZN_DIST_INSTALL_SLURM=1 also installs Debian's SLURM and Chromium (as root, with apt-get) where they are missing;
# without it, and without a SLURM or a browser on this machine, what needs them is skipped.
. "$(dirname "$0")/../launch/setup.sh" "[test]"
# by themselves, and beside the environment: the torchvision that they ask for does not fit torch's CPU build
if [ ! -d .venv/measures/timm ]; then
    pip install --quiet --disable-pip-version-check --no-deps --target .venv/measures \
        torch-fidelity==0.4.0 torchvision==0.28.0 timm==1.0.31
fi
missing=()
if [ -n "${LZN_DIST_INSTALL_SLURM:-}" ]; then
    PATH="$PATH:/usr/sbin" command -v slurmctld >/dev/null || missing+=(slurmctld slurmd slurm-client munge)
    command -v chromium >/dev/null || missing+=(chromium)
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
ruff check .
ruff format --check .
mypy
export WANDB_MODE=offline
unset PYTHONDONTWRITEBYTECODE  # else each of the processes compiles the package anew
if [ "${1:-}" = --fast ]; then
    shift
    export OMP_NUM_THREADS=1
    exec python -m pytest -n 2 --dist worksteal -m "not process and not slow and not soak" "$@"
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Two at a time: many start processes and wait for them. Those of SLURM wait most of their time (for requeues, for a lost
# node to be missed): they run beside the others.
export OMP_NUM_THREADS=1
log=$(mktemp)
python -m pytest tests/slurm >"$log" 2>&1 &
status=0
python -m pytest --ignore=tests/slurm -n 2 --dist worksteal || status=$?
wait $! || status=$?
cat "$log"
rm -f "$log"
exit "$status"
