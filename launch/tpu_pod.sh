#!/usr/bin/env bash
# Runs a study on a Cloud TPU slice, with one process per worker: creates the slice if
# it does not exist, copies this directory to every worker, runs, and fetches the results to runs/.
#
#   export ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/share
#   NAME=distill launch/tpu_pod.sh mnist paper
#   NAME=distill SPOT=1 launch/tpu_pod.sh mnist paper       if preempted, it is created again and the run resumes
#   NAME=distill launch/tpu_pod.sh --dry-run mnist paper    prints the commands for a slice that
#                                                           does not exist yet, and runs nothing
#   NAME=distill launch/tpu_pod.sh --check=v5e:4x4 mnist paper
#                                                           compiles everything for that slice here first
#
# SHARE is an NFS export, such as a Filestore instance's, in the slice's network: every worker mounts it,
# and checkpoints and results are there. VERSION is the runtime, v2-alpha-tpuv6e for v6e. Needs gcloud,
# logged in, with a project set. The setup takes some minutes, once per slice.
#
# Process 0 prints. The status is that of the worker that failed; the same command resumes from the last
# checkpoint, once the old processes of the workers have ended. The slice keeps running, and costs money, until
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail
cd "$(dirname "$0")/.."
mount=/mnt/distill_jax
# shellcheck disable=SC2034  # arguments.sh reads it
runs=$mount/runs
source launch/arguments.sh
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SHARE:?}"

# tpu VERB ARGUMENTS...
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }

# The slice's state, or nothing if it isn't there.
state() {
  [[ $dry_run ]] || tpu describe "$NAME" --format='value(state)' 2>/dev/null || true
}

bring_up() {
  local state
  state=$(state)
  case $state in
    READY) return ;;
    '') ;;
    # A spot slice can't be started again.
    PREEMPTED | TERMINATED) tpu delete "$NAME" --quiet ;;
    *) echo "error: $NAME is in state $state; wait until it is READY, or delete it" >&2; return 1 ;;
  esac
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}
}

everywhere() { tpu ssh "$NAME" --worker=all --command "$1"; }

copy() {
  local archive=${TMPDIR:-/tmp}/$NAME-tree.tgz
  run tar --exclude-vcs --exclude=./.venv --exclude=./runs -czf "$archive" . &&
    tpu scp "$archive" "$NAME:tree.tgz" --worker=all &&
    run rm "$archive" &&
    everywhere 'mkdir -p distill_jax && tar -xzf tree.tgz -C distill_jax'
}

# The Python of the runtimes is too old.
set_up() {
  local apt='sudo apt-get -q -o DPkg::Lock::Timeout=300'
  everywhere "$apt update && $apt -y install nfs-common python3.11-venv && \
sudo mkdir -p $mount && { mountpoint -q $mount || sudo mount -t nfs $SHARE $mount; } && \
sudo mkdir -p $runs && sudo chmod a+rwx $runs && \
cd distill_jax && PYTHON=python3.11 launch/environment.sh tpu"
}

# The lock: the TPUs serve only one run at a time, and an earlier one may not have ended yet.
run_study() {
  everywhere "cd distill_jax && exec flock -F ../lock .venv/bin/python $(quote "${main[@]}") --distributed=auto"
}

check_first
while :; do
  code=0
  { bring_up && copy && set_up && run_study; } || code=$?
  ((code)) || break
  [[ ${SPOT:-} ]] || exit "$code"
  sleep 60 # until another is free; and a preemption shows in the state a little later
  [[ $code == 7[56] || $(state) != READY ]] || exit "$code"
done
run mkdir -p runs
tpu scp --recurse "$NAME:$workdir" runs --worker=0
