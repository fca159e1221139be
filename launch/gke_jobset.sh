#!/usr/bin/env bash
# Runs a study on GKE as launch/gke_jobset.yaml: on one TPU slice, or on hosts with GPUs.
#
#   export IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/distill_jax QUEUE=default
#   ACCELERATOR=tpu TYPE=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 DEVICES=4 \
#     launch/gke_jobset.sh mnist paper
#   ACCELERATOR=gpu TYPE=nvidia-h100-80gb HOSTS=2 DEVICES=8 launch/gke_jobset.sh speech paper
#   launch/gke_jobset.sh --dry-run mnist paper       prints the commands and runs nothing
#   launch/gke_jobset.sh --check=v5e:4x4 mnist paper      compiles everything for that machine here first
#
# DEVICES are those of one host. IMAGE has the project and its dependencies; a Dockerfile that does:
#   FROM python:3.12
#   COPY . /distill_jax
#   WORKDIR /distill_jax
#   RUN pip install -e .[experiments,tpu]
# with cuda for GPUs. The cluster has JobSet and Kueue, and QUEUE is a Kueue LocalQueue. Checkpoints
# and results are on the volume of the claim CLAIM (distill-runs), which is created if it does not exist;
# a claim of your own must have the properties in that file.
#
# It returns at once. Process 0 prints; NAME is STUDY-PRESET if not given:
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
# The same command again replaces the JobSet, and resumes from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC2034  # arguments.sh reads it
runs=/runs
source launch/arguments.sh

: "${IMAGE:?}" "${QUEUE:?}" "${TYPE:?}" "${HOSTS:?}" "${DEVICES:?}" "${CLAIM:=distill-runs}"
NAME=${NAME:-$study-$preset}
# The file has the claim, the JobSet for TPU and the one for GPU.
yaml=$(<launch/gke_jobset.yaml)
between=$'\n---\n'
claim=${yaml%%"$between"*} jobsets=${yaml#*"$between"}
case ${ACCELERATOR:?tpu or gpu} in
  tpu) jobset=${jobsets%%"$between"*} TOPOLOGY=${TOPOLOGY:?} ;;
  gpu) jobset=${jobsets#*"$between"} TOPOLOGY= ;;
  *) echo "error: ACCELERATOR is $ACCELERATOR; it is tpu or gpu" >&2; exit 1 ;;
esac

# A list of strings, as YAML has them too.
COMMAND=
for word in python "${main[@]}"; do
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  COMMAND+=", \"${word//$'\n'/\\n}\""
done
COMMAND=${COMMAND#, }

yaml=$claim$between$jobset
for variable in NAME QUEUE CLAIM IMAGE TYPE TOPOLOGY HOSTS DEVICES COMMAND; do
  yaml=${yaml//"\${$variable}"/"${!variable}"}
done

check_first
run kubectl delete jobset "$NAME" --ignore-not-found
if [[ $dry_run ]]; then
  printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$yaml"
else
  kubectl apply -f - <<<"$yaml"
fi
