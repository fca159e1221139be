#!/usr/bin/env bash
# Runs a study on all GPUs of this machine, or of several, with one process per GPU.
#
#   launch/multi_gpu.sh mnist paper              as many processes as nvidia-smi lists GPUs
#   GPUS=2 launch/multi_gpu.sh mnist paper       the first two
#   PER_HOST=1 launch/multi_gpu.sh mnist paper   one process for all GPUs of a host
#   HOSTS="a b" launch/multi_gpu.sh mnist paper  on these hosts, by ssh without a password
#   GPUS=2 EXTRAS= JAX_PLATFORMS=cpu launch/multi_gpu.sh mnist smoke     to try it without GPUS
#   launch/multi_gpu.sh --dry-run mnist paper    prints the commands and runs nothing
#
# All hosts see this directory under this path, on a file system that they share. The first starts JAX's
# coordinator on PORT (random if not given), which the others must reach. Process 0 prints.
#
# Ctrl-C or SIGTERM: all processes save at the same step, and the status is 75. When one process fails,
# the others are stopped, and the status is that of the first one that failed. In both cases the same
# command resumes the run. A process that does not end is killed GRACE seconds (60) later.
# Needs bash 5.1.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/arguments.sh

EXTRAS=${EXTRAS-cuda} PORT=${PORT:-$((20000 + RANDOM % 10000))}
read -ra hosts <<<"${HOSTS:-127.0.0.1}"

# Sets `command` to run the arguments after the first on the host that is the first.
at() {
  command=("${@:2}")
  [[ -z ${HOSTS:-} ]] || command=(ssh -o BatchMode=yes "$1" "cd $(quote "$PWD") && $(quote "${@:2}")")
}

places=() # HOST, or HOST GPU
for host in "${hosts[@]}"; do
  if [[ ${PER_HOST:-} ]]; then places+=("$host"); continue; fi
  at "$host" nvidia-smi -L
  gpus=${GPUS:-$("${command[@]}" | wc -l)} || {
    echo "error: nvidia-smi finds no GPU on $host; GPUS=N says how many processes to start there" >&2
    exit 1
  }
  for ((gpu = 0; gpu < gpus; gpu++)); do places+=("$host $gpu"); done
done

run launch/environment.sh ${EXTRAS:+"$EXTRAS"} >/dev/null

# The processes' input: a pipe that closes when this script closes it or ends.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec {hold}<>"$pipe"
exec {input}<"$pipe"
rm "$pipe"

declare -A running=()
for index in "${!places[@]}"; do
  read -r host gpu <<<"${places[index]}"
  at "$host" ${gpu:+env "CUDA_VISIBLE_DEVICES=$gpu"} launch/attended.sh "${GRACE:-60}" \
    .venv/bin/python "${main[@]}" "--distributed=${hosts[0]}:$PORT,${#places[@]},$index"
  if [[ $dry_run ]]; then run "${command[@]}"; continue; fi
  "${command[@]}" <&"$input" {hold}>&- &
  running[$!]=$index
done

stop() {
  stopped=1
  exec {hold}>&-
}
trap stop INT TERM HUP
stopped='' status=0
while ((${#running[@]})); do
  ended='' code=0
  wait -n -p ended "${!running[@]}" || code=$?
  [[ ${ended:-} ]] || continue # a signal ended the wait, not a process
  ((status)) || status=$code
  if ((code)) && [[ ! $stopped ]]; then
    echo "process ${running[$ended]} ended with status $code; stopping the others" >&2
    stop
  fi
  unset "running[$ended]"
done
exit "$status"
