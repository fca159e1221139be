# shellcheck shell=bash
# Sourced by the launchers. Reads [--dry-run] [--check=MACHINE] STUDY [PRESET] [FLAGS...] and sets:
#   study, preset       as given; the preset is `default` if not
#   workdir             that of a --workdir=; else ${runs:-runs}/STUDY, with -PRESET after it unless
#                       that is `default`
#   main                the arguments of the interpreter that run the study
#   dry_run             1 or nothing
#   check               a machine such as v5e:4x4, or nothing

dry_run='' check=''
words=()
for word in "$@"; do
  case $word in
    --dry-run) dry_run=1 ;;
    --check=*) check=${word#--check=} ;;
    *) words+=("$word") ;;
  esac
done
set -- ${words[@]+"${words[@]}"} # an older bash takes an empty list for an unset one

study=${1:?usage: $0 [--dry-run] STUDY [PRESET] [FLAGS...], such as $0 mnist}
preset=default
shift
if [[ $# -gt 0 && $1 != -* ]]; then preset=$1; shift; fi
workdir=${runs:-runs}/$study
[[ $preset == default ]] || workdir+=-$preset
for word in "$@"; do
  [[ $word != --workdir=* ]] || workdir=${word#--workdir=}
done
# shellcheck disable=SC2034  # the launchers read it
main=(-m launch.main "--config=experiments/$study/config.py:$preset" "--workdir=$workdir" "$@")

# Prints its arguments quoted for a shell.
quote() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command; a dry run prints it, even where the command's output is discarded.
exec 3>&1
run() {
  if [[ $dry_run ]]; then quote "$@" >&3; else "$@"; fi
}

# With --check: compiles the study's programs for that machine, here, and ends with status 1 if one
# doesn't fit.
check_first() {
  [[ $check ]] || return 0
  local extra=aot_gpu
  [[ $check != v* ]] || extra=aot_tpu
  run launch/environment.sh "$extra" >/dev/null
  run .venv/bin/python "${main[@]}" "--compile_for=$check"
}
