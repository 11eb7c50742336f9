#!/usr/bin/env bash
# Installs what the tests need into .venv and runs everything: ruff, mypy, pytest. Arguments go to pytest.
# --fast: what starts no process and takes less than four seconds, for the inner loop.
# LZN_DIST_INSTALL_SLURM=1 also installs Debian's SLURM (as root, with apt-get) where it is missing; without it, and
# without a SLURM on this machine, tests/slurm is skipped.
. "$(dirname "$0")/../launch/setup.sh" "[test]"
# by itself, and beside the environment: the torchvision that it asks for does not fit torch's CPU build
if [ ! -d .venv/measures/torch_fidelity ]; then
    pip install --quiet --disable-pip-version-check --no-deps --target .venv/measures torch-fidelity==0.4.0
fi
if [ -n "${LZN_DIST_INSTALL_SLURM:-}" ] && ! PATH="$PATH:/usr/sbin" command -v slurmctld >/dev/null; then
    echo "installing SLURM (slurmctld, slurmd, slurm-client, munge)"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
fi
ruff check .
ruff format --check .
mypy
export WANDB_MODE=offline
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
