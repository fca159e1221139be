#!/usr/bin/env bash
# Sets up the environment (once) and runs a study on this machine, whatever devices it has.
#
#   launch/local.sh mnist                        about 13 minutes on two CPU cores; report in runs/mnist
#   launch/local.sh mnist smoke                  under a minute
#   launch/local.sh speech                       under 20 minutes; sections 4 and 6 on recorded speech
#   launch/local.sh specialists                  under 20 minutes; sections 5, 6.1 and 8 on Han characters
#   launch/local.sh mnist paper --config.seeds='(0,)'
#
# Needs Python 3.11 or newer and nothing else. EXTRAS=cuda or EXTRAS=tpu installs for those devices.
set -euo pipefail
cd "$(dirname "$0")/.."

study=${1:?usage: launch/local.sh STUDY [PRESET] [FLAGS...], such as launch/local.sh mnist}
preset=default
shift
if [[ $# -gt 0 && $1 != -* ]]; then preset=$1; shift; fi
workdir=runs/$study
[[ $preset == default ]] || workdir=runs/$study-$preset

python=$(launch/environment.sh "${EXTRAS:-}")
exec "$python" -m launch.main --config="experiments/$study/config.py:$preset" --workdir="$workdir" "$@"
