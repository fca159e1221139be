#!/usr/bin/env bash
# Kills a study at random moments, resumes it each time, and compares its results with an undisturbed run's.
#
#   tests/drill.sh mnist              50 kills of mnist, speech or specialists, preset smoke
#   tests/drill.sh speech 20 --seed=1
#
# Takes 5 to 25 minutes, and is no part of tests/run.sh. Exit status 1 if anything differs.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "$(launch/environment.sh test)" tests/drill.py "$@"
