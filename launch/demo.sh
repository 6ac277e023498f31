#!/usr/bin/env bash
# Improves the tiny Janus by its own understanding, and shows it: the whole loop on two CPU cores.
# Reads   the tiny checkpoint and the recipe gvu_janus_shapes of the package
# Writes  data/shapes_{train,heldout}, RUN/ with summary.json, report.html and the picture before and after
# Environment
#   RUN                run folder (default runs/demo)
#   PYTHON, DRY_RUN=1  as for all launchers (see common.sh)
# Usage    launch/demo.sh [key=value ...]
# Example  RUN=runs/longer launch/demo.sh iterations=12
# Running it again continues, or shows the finished run.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments --run "${RUN:-runs/demo}" --recipe gvu_janus_shapes "$@"
find_python
cd "$ROOT"
shapes_prompts
stage loop "${ARGUMENTS[@]}"
run "$PYTHON" -m unified_rl.evaluation.summary --run "$RUN" --setup-seconds-file .venv/setup_seconds
