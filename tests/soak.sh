#!/usr/bin/env bash
# What is real but slow: runs that are killed at random moments, again and again, and must end as if nothing had been;
# then the same on a real SLURM, where one may be started (tests/helpers/slurm_cluster.py): time limits, preemption, lost nodes.
# The tests marked so come first: a lost file server, ResNet-50 at full size, more of the engines' matrix, one kill.
# Random folders and tars are prepared, launchers get signals; the published configurations take steps at full size. Every
# kind of file that is kept is damaged 10,000 times in all, and used.
# Arguments go to tests/soak/kills.py (--runs N --engine NAME --seed N).
. "$(dirname "$0")/../launch/setup.sh" "[test]"
export WANDB_MODE=offline
python -m pytest -m soak
python -m tests.soak.signals
python -m tests.soak.fuzz_folders
python -m tests.soak.fuzz_files
python -m tests.soak.published_configs
python -m tests.soak.kills "$@"
python -m tests.soak.cluster_faults
