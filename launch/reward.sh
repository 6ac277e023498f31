#!/usr/bin/env bash
# Scores the images of one iteration under the judge: reward.workers processes of unified_rl.reward.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), RUN/iter_<K>/rollout, which FOLLOW=1 takes unfinished as well
# Writes  RUN/iter_<K>/reward/: shards, then manifest.json
# Environment
#   PYTHON, DRY_RUN=1, FOLLOW=1, FOLLOW_TIMEOUT  as for all launchers (see common.sh)
# Usage    launch/reward.sh --run RUN --iteration K [--recipe NAME] [key=value ...]
# Example  launch/reward.sh --run runs/demo --iteration 0
# Running it again continues; a committed iteration is left alone.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
require_iteration
find_python
config_values reward.workers
stand_by
workers=$(processes WORKERS "${CONFIG[0]}")
run_workers "$workers" "$PYTHON" -m unified_rl.reward "${ARGUMENTS[@]}" "${FOLLOWING[@]}"
require_committed reward
