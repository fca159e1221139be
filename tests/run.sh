#!/usr/bin/env bash
# Sets up the environment (once) and runs all checks: lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(launch/environment.sh test)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest -n 2 --dist loadfile "$@"
