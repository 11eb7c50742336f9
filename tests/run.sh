#!/usr/bin/env bash
# Installs what the tests need into .venv and runs everything: ruff, mypy, pytest. Arguments go to pytest.
. "$(dirname "$0")/../launch/setup.sh" "[test]"
ruff check .
ruff format --check .
mypy
WANDB_MODE=offline python -m pytest "$@"
