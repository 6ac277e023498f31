#!/usr/bin/env bash
# Submits the loop or one stage to SLURM; what is submitted, in which order and size, is decided by unified_rl.slurm.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), the site's settings, launch/slurm/stage.sbatch
# Writes  RUN/slurm/: NAME.sbatch, config.yaml (resolved), jobs (`ID NAME` a line), logs/
# Environment
#   SLURM_SITE         settings of the cluster (default launch/slurm/site.env)
#   PYTHON, DRY_RUN=1, FOLLOW=1, FOLLOW_TIMEOUT  as for all launchers (see launch/common.sh)
# Usage    launch/slurm/submit.sh loop|rollout|reward|train|evaluate [--dry-run] --run RUN [--iteration K] [--recipe NAME] [key=value ...]
# Example  launch/slurm/submit.sh loop --dry-run --run runs/big --recipe gvu_janus_pro_1b
# Submit again after a failure: what is committed is left out.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[[ ${1:-} != -h && ${1:-} != --help ]] || { show_header "$0" && exit 0; }
what=${1:-}
[[ $what =~ ^(loop|rollout|reward|train|evaluate)$ ]] || fail "the first argument is loop or a stage; see $0 --help" 2
shift
words=()
for word in "$@"; do
  if [[ $word == --dry-run ]]; then DRY_RUN=1; else words+=("$word"); fi
done
parse_arguments "${words[@]}"
if [[ $what == loop ]]; then
  [[ -z $ITERATION ]] || fail "loop takes no --iteration: it continues where the run is" 2
else
  require_iteration
fi
[[ -z ${WORKERS:-}${TRAIN_RANKS:-} ]] ||
  fail "WORKERS and TRAIN_RANKS count processes of one machine; under SLURM the run's configuration does, and TRAIN_NODES of the site's settings" 2
find_python
[[ ${DRY_RUN:-} != 1 ]] && DRY_RUN=''
[[ -n $DRY_RUN ]] || command -v sbatch >/dev/null || fail "sbatch is not on PATH: submit from a login node of the cluster"

folder=$RUN/slurm
[[ $folder == /* ]] || folder=$PWD/$folder

# Two jobs at the same work would only wait for each other's locks.
if [[ -z $DRY_RUN && -f $folder/jobs ]]; then
  queued=$(squeue --me --noheader --format=%F) || fail "squeue does not answer"
  while read -r id name; do
    [[ $'\n'$queued$'\n' != *$'\n'"$id"$'\n'* ]] ||
      fail "job $id ($name) of this run is still queued or running: wait for it, or scancel it first"
  done <"$folder/jobs"
fi

plan=$(env "${LAUNCH_ENV[@]}" "$PYTHON" -m unified_rl.slurm "$what" --site "${SLURM_SITE:-$ROOT/launch/slurm/site.env}" \
  ${DRY_RUN:+--dry-run} "${ARGUMENTS[@]}" "${FOLLOWING[@]}") || exit "$?"
if [[ -n $DRY_RUN ]]; then
  echo "${plan%$'\n\n'*}"
  echo
  plan=${plan##*$'\n\n'}
fi

declare -A ids=()
submitted=()
while read -r name after kind; do
  command=(sbatch --parsable "--chdir=$folder/logs")
  if [[ $after != - ]]; then
    dependency=${kind:-afterok}
    for before in ${after//,/ }; do dependency+=:${ids[$before]}; done
    command+=("--dependency=$dependency")
  fi
  command+=("$folder/$name.sbatch")
  if [[ -n $DRY_RUN ]]; then
    print_command "${command[@]}"
    ids[$name]=%$name
    continue
  fi
  # --parsable: ID or ID;CLUSTER
  if ! id=$("${command[@]}"); then
    ((${#submitted[@]} == 0)) || scancel "${submitted[@]}" || true
    fail "sbatch refused $name; what was submitted before it is cancelled"
  fi
  ids[$name]=${id%%;*}
  submitted+=("${ids[$name]}")
  echo "${ids[$name]} $name" | tee -a "$folder/jobs"
done <<<"$plan"
