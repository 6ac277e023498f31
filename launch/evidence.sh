#!/usr/bin/env bash
# Measures a learning claim from scratch: for each seed a run and its control with shuffled rewards, then intervals.
# Reads   the recipe METHOD_BACKBONE_shapes of the package
# Writes  RUN/{main,shuffled}-SEED and RUN/summary.json
# Environment
#   RUN                      folder of all runs (default runs/evidence/METHOD-BACKBONE)
#   METHOD, BACKBONE, SEEDS  default gvu, janus, 3
#   PYTHON, DRY_RUN=1        as for all launchers (see common.sh)
# Usage    launch/evidence.sh [key=value ...]
# Example  METHOD=gvu BACKBONE=janus SEEDS=3 launch/evidence.sh
# Running it again continues.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
METHOD=${METHOD:-gvu} BACKBONE=${BACKBONE:-janus} SEEDS=${SEEDS:-3}
out=${RUN:-runs/evidence/$METHOD-$BACKBONE}
parse_arguments --run "$out" "$@"
find_python
cd "$ROOT"
shapes_prompts
for ((seed = 1; seed <= SEEDS; seed++)); do
  for control in none shuffled; do
    stage loop --run "$out/${control/none/main}-$seed" --recipe "${METHOD}_${BACKBONE}_shapes" \
      "${RECIPE_ARGUMENTS[@]}" "seed=$seed" "policy.control=$control"
  done
done
run "$PYTHON" -m unified_rl.evaluation.evidence --method "$METHOD" --backbone "$BACKBONE" --seeds "$SEEDS" --out "$out"
