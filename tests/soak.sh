#!/usr/bin/env bash
# What is real but slow: runs that are killed at random moments, again and again, and must end as if nothing had been.
# Arguments go to tests/soak/kills.py (--runs N --engine NAME --seed N).
. "$(dirname "$0")/../launch/setup.sh" "[test]"
WANDB_MODE=offline python tests/soak/kills.py "$@"
