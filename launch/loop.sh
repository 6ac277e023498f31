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
# Side by side, each waiting for the one before. The other machines of a hostfile cannot see whether this loop still runs.
together=rollout+reward+train
[[ -z ${DS_HOSTFILE:-} ]] || together=rollout+reward
[[ ${PREFETCH:-} != 0 ]] || together=${FOLLOWING[0]:+rollout+reward}
plan=$(ask_python plan ${together:+--together "$together"}) || exit "$?"

# Wall-clock seconds, a line for each time the loop ran.
[[ ${DRY_RUN:-} == 1 ]] || trap 'echo "$SECONDS" >>"$RUN/loop_seconds"' EXIT

while read -r stage iteration <&3; do
  if [[ $stage == report ]]; then
    run "$PYTHON" -m unified_rl.report --run "$RUN"
  else
    stage "$stage" --run "$RUN" --iteration "$iteration" "${RECIPE_ARGUMENTS[@]}"
  fi
done 3<<<"$plan"
