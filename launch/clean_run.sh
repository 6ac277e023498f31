#!/usr/bin/env bash
# Deletes one run folder.
# Reads   RUN/config.yaml: a folder without it is no run and is left alone
# Writes  nothing; removes RUN
# Environment
#   RUN        run folder, required
#   DRY_RUN=1  print the command only
# Usage    launch/clean_run.sh
# Example  RUN=runs/demo launch/clean_run.sh
# Training state and images of the run cannot be recovered afterwards.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ -n ${RUN:-} ]] || fail "RUN is not set: make clean-run RUN=runs/demo" 2
[[ -f $RUN/config.yaml ]] || fail "$RUN is no run folder: it has no config.yaml" 2
grep -q '^rollout:' "$RUN/config.yaml" || fail "$RUN/config.yaml is not the configuration of a run" 2
run rm -rf -- "$RUN"
