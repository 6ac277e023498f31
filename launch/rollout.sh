#!/usr/bin/env bash
# Draws the images of one iteration: rollout.workers processes of unified_rl.rollout on this machine.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), prompt shards, RUN/iter_<K-1>/policy
# Writes  RUN/iter_<K>/rollout/: shards, then manifest.json
# Environment
#   PYTHON     interpreter (default .venv/bin/python)
#   DRY_RUN=1  print the commands only
# Usage    launch/rollout.sh --run RUN --iteration K [--recipe NAME] [key=value ...]
# Example  launch/rollout.sh --run runs/demo --iteration 0 --recipe gvu_janus_shapes
# Running it again continues; a committed iteration is left alone.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
require_iteration
find_python
config_values rollout.workers
stand_by
workers=$(processes WORKERS "${CONFIG[0]}")
run_workers "$workers" "$PYTHON" -m unified_rl.rollout "${ARGUMENTS[@]}"
require_committed rollout
