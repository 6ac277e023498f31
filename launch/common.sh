# shellcheck shell=bash
# What all launchers share; sourced, never run.
# Environment of every launcher:
#   PYTHON     interpreter; default .venv/bin/python of this checkout (made by `make install`)
#   DRY_RUN=1  print the exact commands and change nothing
#   WORKERS, TRAIN_RANKS  processes of this start instead of rollout.workers and reward.workers, train.ranks:
#              a run goes on with any number of them
#   FOLLOW=1   reward runs beside its rollout and scores the shards as they come; FOLLOW_TIMEOUT: seconds that it waits
#              while nothing is heard of the rollout
#   PREFETCH=0 a stage of the loop starts when the one before has ended, not at its first shard
#   STOP_SECONDS  time that a stage gets to end after INT or TERM before it is killed; default 120
# Exit codes: those of the stage (0 done, 1 failed, 2 wrong arguments, 75 stopped: the same command continues).

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH_ENV=() # NAME=VALUE set for every command, and shown by DRY_RUN
FOLLOWING=() # arguments of reward that FOLLOW asks for
# shellcheck disable=SC2034 # used by the launchers
[[ ${FOLLOW:-} != 1 ]] || FOLLOWING=(--follow ${FOLLOW_TIMEOUT:+--follow-timeout "$FOLLOW_TIMEOUT"})
SIGNAL_BELOW='' # 1: a signal goes to the children of the started process, not to the process itself
STARTED=()      # processes in the background that nobody has waited for
STOPPED=''      # 1 after INT, TERM or USR2: what runs is ended, nothing more is started

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

# Sets PYTHON to an absolute path and puts its folder first in PATH: `ninja` lies beside it.
find_python() {
  local folder
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$ROOT/.venv/bin/python
    [[ -x $PYTHON ]] || fail "no .venv in $ROOT: run \`make install\` first, or set PYTHON"
  else
    # A foreign interpreter may lack the package.
    [[ :${PYTHONPATH:-}: == *:$ROOT:* ]] || PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    LAUNCH_ENV+=("PYTHONPATH=$PYTHONPATH")
  fi
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no interpreter" 2
  folder=$(dirname "$(command -v "$PYTHON")")
  PYTHON=$(cd "$folder" && pwd)/$(basename "$PYTHON")
  PATH=${PYTHON%/*}:$PATH
}

# Prints the comment at the head of a launcher.
show_header() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}

# Reads --run, --recipe, --iteration and key=value into RUN, ITERATION, ARGUMENTS (for the stage), OVERRIDES.
parse_arguments() {
  RUN='' ITERATION='' RECIPE_ARGUMENTS=()
  while (($#)); do
    case $1 in
      -h | --help) show_header "$0" && exit 0 ;;
      --run | --recipe | --iteration)
        [[ $# -ge 2 && -n $2 ]] || fail "$1 needs a value" 2
        case $1 in
          --run) RUN=$2 ;;
          --iteration) ITERATION=$2 ;;
          --recipe) RECIPE_ARGUMENTS=("--recipe" "$2" "${RECIPE_ARGUMENTS[@]}") ;;
        esac
        shift 2
        ;;
      ?*=*) RECIPE_ARGUMENTS+=("$1") && shift ;;
      *) fail "unknown argument '$1'; see $0 --help" 2 ;;
    esac
  done
  [[ -n $RUN ]] || fail "--run RUN is required; see $0 --help" 2
  # shellcheck disable=SC2034 # used by the launchers
  ARGUMENTS=(--run "$RUN" ${ITERATION:+--iteration "$ITERATION"} "${RECIPE_ARGUMENTS[@]}")
}

require_iteration() {
  [[ $ITERATION =~ ^[0-9]+$ ]] || fail "--iteration K is required, a whole number from 0; see $0 --help" 2
}

# Asks unified_rl.launching about the run; prints its answer.
ask_python() {
  env "${LAUNCH_ENV[@]}" "$PYTHON" -m unified_rl.launching "$1" --run "$RUN" "${RECIPE_ARGUMENTS[@]}" \
    ${DRY_RUN:+--dry-run} "${@:2}"
}

# A free TCP port.
ask_port() {
  env "${LAUNCH_ENV[@]}" "$PYTHON" -m unified_rl.launching port
}

# config_values KEY...: fills the array CONFIG and chooses the accelerator. THREADS and device come with it.
config_values() {
  local answer
  answer=$(ask_python values backbone.device backbone.threads "$@") || exit "$?"
  mapfile -t CONFIG <<<"$answer"
  if [[ ${CONFIG[0]} == cpu ]] || ! has_gpu; then
    LAUNCH_ENV+=("DS_ACCELERATOR=cpu")
  fi
  LAUNCH_ENV+=("OMP_NUM_THREADS=${CONFIG[1]}")
  CONFIG=("${CONFIG[@]:2}")
}

# processes NAME DEFAULT: how many to start; the variable NAME wins.
processes() {
  local count=${!1:-$2}
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail "$1=$count is no number of processes" 2
  echo "$count"
}

has_gpu() {
  [[ ${CUDA_VISIBLE_DEVICES-all} != "" ]] && { compgen -G '/dev/nvidia[0-9]*' || [[ -e /dev/dxg || -e /dev/kfd ]]; } >/dev/null
}

# Prints a command that can be pasted into a shell.
print_command() {
  local word line=
  for word in "$@"; do
    # Plain words stay readable; a quoted value keeps its NAME= outside the quotes.
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    elif [[ $word =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
      line+=" ${BASH_REMATCH[1]}=${BASH_REMATCH[2]@Q}"
    else
      line+=" ${word@Q}"
    fi
  done
  echo "${line# }"
}

# run COMMAND...: prints or executes it; signals are passed on, its exit code is returned.
run() {
  run_workers 0 "$@"
}

# run_workers N COMMAND...: N processes with RANK, LOCAL_RANK, WORLD_SIZE (N = 0: one process without them).
# When one fails the others are stopped and its code is returned. All stay in this process group.
run_workers() {
  local workers=$1 code=0 rank ranks=()
  shift
  for ((rank = 0; rank < (workers > 0 ? workers : 1); rank++)); do
    ((workers == 0)) || ranks=("RANK=$rank" "LOCAL_RANK=$rank" "WORLD_SIZE=$workers")
    if [[ ${DRY_RUN:-} == 1 ]]; then
      print_command "${LAUNCH_ENV[@]}" "${ranks[@]}" "$@"
    elif [[ -z $STOPPED ]]; then
      env "${LAUNCH_ENV[@]}" "${ranks[@]}" "$@" &
      STARTED+=("$!")
    fi
  done
  wait_children 0 || code=$?
  [[ -z $STOPPED ]] || ((code == 0)) || code=75
  return "$code"
}

# require_committed STAGE: fails unless its manifest is there; exit codes do not tell. A worker that finishes last leaves a
# stage open where a shard was damaged meanwhile, and DeepSpeed's launcher ends with 0 when its child was killed.
require_committed() {
  local iteration mark
  printf -v iteration 'iter_%04d' "$((10#$ITERATION))"
  mark=$RUN/$iteration/$1/manifest.json
  [[ $1 != evaluation ]] || mark=$RUN/evaluation/$iteration/manifest.json
  [[ ${DRY_RUN:-} == 1 || -f $mark ]] || fail "$1 ended without $mark; the same command continues it" "${STOPPED:+75}"
}

# Where a loop started this launcher before its turn: waits until the stage before is at work.
stand_by() {
  [[ -z ${STANDBY:-} || ${DRY_RUN:-} == 1 ]] || run "$PYTHON" -m unified_rl.standby --run "$RUN"
}

# stage NAME ARGUMENTS...: runs another launcher to its end; in a dry run it prints its own commands.
stage() {
  begin '' "$@"
  finish 0
}

# begin STAGE:ITERATION NAME ARGUMENTS...: starts another launcher. Before its turn, it waits for the stage that is named.
begin() {
  local before=$1 name=$2
  shift 2
  if [[ ${DRY_RUN:-} == 1 ]]; then
    "$ROOT/launch/$name.sh" "$@"
  elif [[ -z $STOPPED ]]; then
    env "${LAUNCH_ENV[@]}" ${before:+"STANDBY=$before:$$"} "$ROOT/launch/$name.sh" "$@" &
    STARTED+=("$!")
  fi
}

# finish N: waits until at most N launchers are left. Ends this one when one has failed or after a signal.
finish() {
  local code=0
  wait_children "$1" || code=$?
  [[ -z $STOPPED ]] || exit 75
  ((code == 0)) || exit "$code"
}

# Prompt shards of the synthetic world, where the recipes expect them.
shapes_prompts() {
  local split
  for split in train heldout; do
    [[ -f data/shapes_$split/manifest.json ]] ||
      run "$PYTHON" data_tools/pack_prompts.py --shapes "$split" --out "data/shapes_$split"
  done
}

# Unlabelled pictures of the world of shapes, for Ask-Solve-Generate.
shapes_images() {
  [[ -f data/shapes_images/manifest.json ]] ||
    run "$PYTHON" data_tools/pack_images.py --shapes train --count 2048 --out data/shapes_images
}

# wait_children N: until at most N of the processes in the background are left; the first failure stops the rest and is
# the result.
wait_children() {
  local child code first=0 stopping='' deadline=0 running
  while ((${#STARTED[@]} > $1)) || [[ ${#STARTED[@]} != 0 && -n $STOPPED$stopping ]]; do
    running=()
    for child in "${STARTED[@]}"; do
      if kill -0 "$child" 2>/dev/null; then
        running+=("$child")
        continue
      fi
      code=0
      wait "$child" || code=$?
      ((code == 0 || first != 0)) || first=$code
    done
    STARTED=("${running[@]}")
    ((${#STARTED[@]})) || break
    if [[ -n $STOPPED ]] || ((first)); then
      [[ -n $stopping ]] || { stopping=1 SIGNALLED='' BELOW=() && deadline=$((SECONDS + ${STOP_SECONDS:-120})); }
      signal_children "${STARTED[@]}"
      ((SECONDS < deadline)) || kill -KILL "${STARTED[@]}" "${BELOW[@]}" 2>/dev/null || true
    fi
    sleep 0.1 || true # a bare `wait` cannot tell which of several ended (bash < 5.1)
  done
  # Ranks whose launcher died before it could stop them.
  [[ -z $stopping ]] || ((${#BELOW[@]} == 0)) || kill -KILL "${BELOW[@]}" 2>/dev/null || true
  return "$first"
}

# TERM to each started process once; with SIGNAL_BELOW to its children instead, also to those it starts later.
signal_children() {
  local pid targets=("$@")
  read_processes
  mapfile -t BELOW < <(descendants "$@")
  if [[ -n $SIGNAL_BELOW ]]; then
    targets=()
    for pid in "${BELOW[@]}"; do
      [[ " $* " != *" ${PARENT[$pid]} "* ]] || targets+=("$pid")
    done
  fi
  for pid in "${targets[@]}"; do
    [[ " $SIGNALLED " == *" $pid "* ]] || kill -TERM "$pid" 2>/dev/null || true
    SIGNALLED+=" $pid"
  done
}

# PARENT[pid] of every process; /proc instead of ps or pgrep, which small images lack.
read_processes() {
  local file line
  declare -gA PARENT=()
  for file in /proc/[0-9]*/stat; do
    { read -r line <"$file"; } 2>/dev/null || continue
    file=${line%% *} line=${line##*) } # pid (name) state parent ...
    line=${line#* }
    PARENT[$file]=${line%% *}
  done
}

# Prints every process below the given ones, at any depth.
descendants() {
  local pid above
  for pid in "${!PARENT[@]}"; do
    above=${PARENT[$pid]}
    while [[ -n $above ]]; do
      [[ " $* " == *" $above "* ]] && echo "$pid" && break
      above=${PARENT[$above]:-}
    done
  done
}

# Background processes ignore INT in a script, so that Ctrl-C reaches them once, as TERM, from here.
on_signal() {
  STOPPED=1
  [[ -n $(jobs -pr) ]] || exit 75
}
trap on_signal INT TERM USR2
