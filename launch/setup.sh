# Sourced by launch/quickstart.sh and tests/run.sh: the project's .venv, made and filled if it is not yet.
# Argument: the extras to install, for example "" or "[test]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
# threads that wait by spinning make small networks many times slower on a busy machine
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
stamp=".venv/installed${1:-}"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "installing lzn_dist${1:-} into .venv"
    # torch first and pinned: a bare requirement would pull the build with several GB of CUDA libraries on a laptop
    pip install --quiet --disable-pip-version-check -c constraints.txt torch
    pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:-}"
    touch "$stamp"
fi
