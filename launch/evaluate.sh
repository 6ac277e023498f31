#!/usr/bin/env bash
# Evaluates the weights after K iterations (0: base) on held-out prompts: rollout.workers processes.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), evaluate.prompts, RUN/iter_<K-1>/policy
# Writes  RUN/evaluation/iter_<K>/: images, scores.json, then manifest.json
# Environment
#   PYTHON     interpreter (default .venv/bin/python)
#   DRY_RUN=1  print the commands only
# Usage    launch/evaluate.sh --run RUN --iteration K [--recipe NAME] [key=value ...]
# Example  launch/evaluate.sh --run runs/demo --iteration 0
# Running it again continues; a committed evaluation is left alone.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
require_iteration
find_python
config_values rollout.workers evaluate.prompts
workers=$(processes WORKERS "${CONFIG[0]}")
run_workers "$workers" "$PYTHON" -m unified_rl.evaluation "${ARGUMENTS[@]}"
[[ -z ${CONFIG[1]:-} ]] || require_committed evaluation
