#!/usr/bin/env bash
# Slurm for real: a cluster of two nodes on the loopback of this machine. launch/slurm.sbatch runs the MNIST
# smoke preset there on two processes, and launch/sweep.py a job array of four points. Both are disturbed in
# the ways that Slurm has, and their rows are compared with those of undisturbed runs.
#
#   sudo tests/launch/slurm/run.sh      some 4 minutes on two CPU cores; status 1 if anything isn't as it should be
#
# Needs Debian or Ubuntu, and root that may make namespaces (a container: --privileged). The cluster has a
# process namespace, a /run and an /etc/hosts of its own: no daemon outlives this script, however it ends.
# What the jobs wrote stays in runs/slurm.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ ${1:-} != inside ]]; then
  if ! command -v slurmctld slurmd munged >/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge
  fi
  launch/environment.sh >/dev/null
  exec unshare --pid --fork --kill-child --mount-proc --mount --uts "$0" inside
fi

trap 'exit 130' INT TERM # the first process of a namespace ignores what it doesn't handle
export EXTRAS='' JAX_PLATFORMS=cpu SLURM_CONF=$PWD/tests/launch/slurm/slurm.conf
out=$PWD/runs/slurm failures=0
rm -rf "$out"
mkdir -p "$out"

hostname head
mount --bind tests/launch/slurm/hosts /etc/hosts
mount -t tmpfs tmpfs /run
mkdir -p /run/slurm/{head,node1,node2}
install -d -o munge -g munge /run/munge
runuser -u munge -- munged
slurmctld
slurmd -N node1
slurmd -N node2

check() { # WHAT COMMAND...
  if "${@:2}"; then echo "ok: $1"; else echo "FAILED: $1" && failures=$((failures + 1)); fi
}
await() { # COMMAND...: until it succeeds
  for ((tick = 0; tick < 1500; tick++)); do
    if "$@" &>/dev/null; then return; fi
    sleep 0.2
  done
  tail -n 30 "$out"/*.txt /run/slurm/*.log
  echo "FAILED: waited in vain: $*"
  exit 1
}
is() { # JOB FIELD VALUE
  scontrol --oneliner show job "$1" | grep -qE "\b$2=$3( |$)"
}
again() { is "$1" Restarts "$2" && is "$1" JobState RUNNING; } # JOB COUNT
ended() { [[ -z $(squeue --noheader --jobs="$1") ]]; }
submit() { # NAME FLAGS...: the smoke preset
  runs=$out/$1 sbatch --parsable --nodes=2 --output="$out/$1.txt" launch/slurm.sbatch \
    mnist smoke --config.teacher.save_every=1 "${@:2}"
}
saved() { # NAME STAGE: whether a net is halfway
  compgen -G "$out/$1/mnist-smoke/stages/$2/$2/checkpoints/[2-9]"
}
rows() { # FILE: what doesn't depend on the time it took
  .venv/bin/python -c 'import json, sys; print(*[{**row, "seconds": 0} for row in json.load(open(sys.argv[1]))], sep="\n")' "$1"
}
same_rows() { diff <(rows "$1") <(rows "$2"); }
times() { # COUNT PATTERN FILE
  [[ $(grep -cE "$2" "$3") == "$1" ]]
}

await test -n "$(sinfo --noheader --states=idle)"
sinfo --Node

echo "== two processes, undisturbed"
job=$(submit undisturbed)
await ended "$job"
check 'the job is completed' is "$job" JobState COMPLETED
check 'both processes were of one run' times 2 '^process [01] of 2 is' "$out/undisturbed.txt"

echo "== the same, disturbed"
job=$(submit disturbed)
await saved disturbed teacher
kill -9 "$(sed -nE 's/^process 1 of 2 is ([0-9]+) .*/\1/p' "$out/disturbed.txt")"
await again "$job" 1
check 'one is killed with -9: the other says so' times 1 '^process 1 of 2 was lost' "$out/disturbed.txt"

await saved disturbed baseline
sbatch --partition=urgent --output=/dev/null --wrap=true >/dev/null
await again "$job" 2
check 'preempted: both processes save' times 2 'Exited with exit code 75' "$out/disturbed.txt"

await saved disturbed distilled
scancel --signal=TERM "$job" # to the tasks alone, as when the time is nearly up
await again "$job" 3
check 'warned that the time is nearly up: both save' times 4 'Exited with exit code 75' "$out/disturbed.txt"

await ended "$job"
check 'the job is completed' is "$job" JobState COMPLETED
check 'what was trained was not trained again' times 1 '^teacher: 1/8' "$out/disturbed.txt"
check 'the rows are those of the undisturbed run' \
  same_rows "$out"/{undisturbed,disturbed}/mnist-smoke/results.json

echo "== jobs that are not to come back"
job=$(submit cancelled)
await saved cancelled teacher
scancel "$job"
await ended "$job"
check 'scancel is for good' is "$job" JobState CANCELLED
job=$(submit mistaken --stages=teachers)
await ended "$job"
check 'so is a mistake that all processes see' is "$job" ExitCode 1:0

echo "== an array of four points"
sweep() { # NAME BACKEND
  .venv/bin/python -m launch.sweep --config=experiments/mnist/config.py:smoke --stages=baseline \
    --sweep=tests/launch/slurm/points.py:four --workdir="$out/$1" --backend="$2"
}
array=$(sweep points slurm | sed -nE 's/^job ([0-9]+): lines 1-4 .*/\1/p')
await test -e "$out/points/learning_rate=0.004/stages/baseline/baseline/checkpoints"
scancel --signal=TERM "${array}_4"
await is "${array}_4" Restarts 1
await ended "$array"
check 'a task that was stopped is completed' is "${array}_4" JobState COMPLETED
check 'the others were left alone' is "${array}_2" Restarts 0
sweep points slurm >/dev/null
sweep reference local >/dev/null
check 'the rows are those of a sweep without Slurm' same_rows "$out"/{reference,points}/sweep.json

if ((failures)); then
  echo "$failures checks FAILED; the jobs' output is in $out"
  exit 1
fi
echo "all checks passed after $((SECONDS / 60)) minutes"
