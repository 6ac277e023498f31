#!/usr/bin/env bash
# Measures a learning claim from scratch: for each seed a run and its controls, then intervals.
# Reads   the recipe METHOD_BACKBONE_shapes of the package
# Writes  RUN/{main,CONTROL}-SEED and RUN/summary.json
# Environment
#   RUN                      folder of all runs (default runs/evidence/METHOD-BACKBONE)
#   METHOD, BACKBONE, SEEDS  default gvu, janus, 3
#   CONTROL_SEEDS            seeds of each control (default: SEEDS)
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
[[ $METHOD != self_consistency ]] || shapes_images
claim=(--method "$METHOD" --backbone "$BACKBONE" --seeds "$SEEDS" --control-seeds "${CONTROL_SEEDS:-$SEEDS}")
listed=$(env "${LAUNCH_ENV[@]}" "$PYTHON" -m unified_rl.evaluation.evidence "${claim[@]}" --list) || exit "$?"
mapfile -t runs <<<"$listed"
for line in "${runs[@]}"; do
  read -ra words <<<"$line"
  stage loop --run "$out/${words[0]}" --recipe "${METHOD}_${BACKBONE}_shapes" "${RECIPE_ARGUMENTS[@]}" "${words[@]:1}"
done
run "$PYTHON" -m unified_rl.evaluation.evidence "${claim[@]}" --out "$out"
