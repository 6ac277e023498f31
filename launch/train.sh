#!/usr/bin/env bash
# Updates the policy on the images of one iteration: train.ranks ranks of unified_rl.train under the deepspeed launcher.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), RUN/iter_<K>/{rollout,reward}, RUN/checkpoints
# Writes  RUN/iter_<K>/{train,policy}, RUN/checkpoints; RUN/iter_<K>/train/manifest.json comes last
# Environment
#   PYTHON, DRY_RUN=1  as for all launchers (see common.sh)
#   MASTER_PORT        TCP port of rank 0 (default: a free one)
#   DS_HOSTFILE        DeepSpeed hostfile for several machines, train.ranks on each; RUN on a shared disk
# Usage    launch/train.sh --run RUN --iteration K [--recipe NAME] [key=value ...]
# Example  launch/train.sh --run runs/demo --iteration 0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
require_iteration
find_python
config_values train.ranks

# The launcher drops CUDA_VISIBLE_DEVICES when it is told a number of GPUs: name the visible ones instead.
count=$(processes TRAIN_RANKS "${CONFIG[0]}")
gpus=(--num_gpus "$count")
if [[ -n ${DS_HOSTFILE:-} ]]; then
  gpus+=(--hostfile "$DS_HOSTFILE")
elif [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ && " ${LAUNCH_ENV[*]} " != *" DS_ACCELERATOR=cpu "* ]]; then
  gpus=(--include "localhost:$(cut -d, -f "1-$count" <<<"$CUDA_VISIBLE_DEVICES")")
fi

# As a module: the first line of the `deepspeed` script is broken where the path has a space.
# The launcher dies on TERM and leaves its ranks behind; its child stops them.
# shellcheck disable=SC2034 # read by common.sh
SIGNAL_BELOW=1
run "$PYTHON" -m deepspeed.launcher.runner "${gpus[@]}" --master_port "${MASTER_PORT:-$(ask_port)}" --no_local_rank --quiet \
  --module unified_rl.train "${ARGUMENTS[@]}"

# The launcher also ends with 0 when its child was killed by a signal: only the commit mark tells.
printf -v mark '%s/iter_%04d/train/manifest.json' "$RUN" "$((10#$ITERATION))"
[[ ${DRY_RUN:-} == 1 || -f $mark ]] || fail "training ended without $mark; the same command continues it" "${STOPPED:+75}"
