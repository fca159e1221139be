#!/usr/bin/env bash
# Sets up the environment (once) and runs a study on this machine, whatever devices it has.
#
#   launch/local.sh mnist                        about 15 minutes on two CPU cores; report in runs/mnist
#   launch/local.sh mnist smoke                  about a minute
#   launch/local.sh speech                       under 20 minutes; sections 4 and 6 on recorded speech
#   launch/local.sh speech full                  some hours; first python -m experiments.speech.prepare --out=runs/debian
#   launch/local.sh specialists                  under 20 minutes; sections 5, 6.1 and 8 on Han characters
#   launch/local.sh mnist paper --config.seeds='(0,)'
#   launch/local.sh --dry-run mnist              prints the commands and runs nothing
#
# Needs Python 3.11 or newer and nothing else. EXTRAS=cuda or EXTRAS=tpu installs for those devices.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/arguments.sh

run launch/environment.sh ${EXTRAS:+"$EXTRAS"} >/dev/null
run exec .venv/bin/python "${main[@]}"
