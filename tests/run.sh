#!/usr/bin/env bash
# Sets up the environment (once) and runs all checks: lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(launch/environment.sh test)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy &
# In the order of the names: the files that take longest have few tests, and would come last otherwise.
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" && wait $!
