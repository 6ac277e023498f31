#!/usr/bin/env bash
# Runs what is left of a run: evaluation of the base, then rollout, reward, train of each iteration, evaluation, report.
# Reads   --recipe NAME and key=value, or RUN/config.yaml of a run that exists
# Writes  RUN/ (see docs/disk_contract.md)
# Environment
#   PYTHON, DRY_RUN=1, WORKERS, TRAIN_RANKS, FOLLOW=1, FOLLOW_TIMEOUT, PREFETCH=0  as for all launchers (see common.sh)
#   MASTER_PORT, DS_HOSTFILE  as for train.sh
# Usage    launch/loop.sh --run RUN [--recipe NAME] [key=value ...]
# Example  launch/loop.sh --run runs/demo --recipe gvu_janus_shapes iterations=2
# After an interruption, however rude, the same command continues; another configuration is refused with a diff.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
[[ -z $ITERATION ]] || fail "loop.sh takes no --iteration: it continues where the run is" 2
find_python
plan=$(ask_python plan) || exit "$?"

# Wall-clock seconds, a line for each time the loop ran.
[[ ${DRY_RUN:-} == 1 ]] || trap 'echo "$SECONDS" >>"$RUN/loop_seconds"' EXIT

# Whether a stage may start while the one before it, `STAGE:ITERATION` or nothing, is still at work.
starts_early() {
  case ${before%:*}/$1 in
    rollout/reward) [[ ${PREFETCH:-} != 0 || ${FOLLOW:-} == 1 ]] ;;
    # The other machines of a hostfile cannot see whether this loop lives.
    reward/train) [[ ${PREFETCH:-} != 0 && -z ${DS_HOSTFILE:-} ]] ;;
    train/rollout) [[ ${PREFETCH:-} != 0 ]] ;;
    *) return 1 ;;
  esac
}

before=''
while read -r stage iteration <&3; do
  if starts_early "$stage"; then finish 1; else finish 0 && before=''; fi
  [[ $stage != reward || ${FOLLOW:-} != 1 ]] || before='' # takes the shards as they come
  if [[ $stage == report ]]; then # comes last
    run "$PYTHON" -m unified_rl.report --run "$RUN"
  else
    begin "$before" "$stage" --run "$RUN" --iteration "$iteration" "${RECIPE_ARGUMENTS[@]}"
  fi
  before=$stage:$iteration
done 3<<<"$plan"
