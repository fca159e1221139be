#!/usr/bin/env bash
# Runs a command for as long as this script's input stays open. Launchers use it so that their processes,
# on this machine or over ssh, stop with them, however they end.
#
#   launch/attended.sh SECONDS COMMAND...
#
# At the end of the input the command gets a SIGTERM, and a SIGKILL if it is still there SECONDS later.
# The exit status is the command's.
set -uo pipefail

grace=$1
shift
# A signal to the process group reaches the command too; wait for its status.
trap : TERM HUP
"$@" </dev/null &
command=$!

while kill -0 "$command" 2>/dev/null; do
  read -rt 0.2 && continue
  (($? > 128)) || break # over 128: the time ran out; 1: the input has ended
done
kill -TERM "$command" 2>/dev/null
for ((waited = 0; waited < grace * 5; waited++)); do
  kill -0 "$command" 2>/dev/null || break
  sleep 0.2
done
kill -KILL "$command" 2>/dev/null
wait "$command"
