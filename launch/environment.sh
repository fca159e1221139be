#!/usr/bin/env bash
# Makes the virtual environment .venv if it isn't there yet, and prints its Python. It has the project, all
# that its studies need, and the extras that are named: cuda, tpu, test. PYTHON=... picks another
# interpreter to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
stamp=.venv/installed-${extras:-base}
if [[ ! -e $stamp || setup.cfg -nt $stamp ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit("distill_jax needs Python 3.11 or newer, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
  [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
  echo "installing into $PWD/.venv ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[experiments${extras:+,$extras}]" >&2
  touch "$stamp"
fi
echo "$PWD/.venv/bin/python"
