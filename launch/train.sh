#!/usr/bin/env bash
# Updates the policy on the images of one iteration: train.ranks ranks of unified_rl.train under the deepspeed launcher.
# Reads   RUN/config.yaml (or --recipe NAME and key=value), RUN/iter_<K>/{rollout,reward}, RUN/checkpoints
# Writes  RUN/iter_<K>/{train,policy}, RUN/checkpoints; RUN/iter_<K>/train/manifest.json comes last
# Environment
#   PYTHON, DRY_RUN=1  as for all launchers (see common.sh)
#   MASTER_PORT        TCP port of rank 0 (default: a free one)
#   DS_HOSTFILE        DeepSpeed hostfile for several machines, train.ranks on each; RUN on a shared disk. Started through
#                      ssh and pdsh from the first of them, or
#   NODE_RANK          with DS_HOSTFILE: started by the same command on every machine, this is number NODE_RANK of the
#                      file; MASTER_ADDR and MASTER_PORT are needed then (see docs/operations.md)
# Usage    launch/train.sh --run RUN --iteration K [--recipe NAME] [key=value ...]
# Example  launch/train.sh --run runs/demo --iteration 0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"
require_iteration
find_python
config_values train.ranks
stand_by

# The launcher drops CUDA_VISIBLE_DEVICES when it is told a number of GPUs: name the visible ones instead.
count=$(processes TRAIN_RANKS "${CONFIG[0]}")
gpus=(--num_gpus "$count")
if [[ -n ${DS_HOSTFILE:-} ]]; then
  gpus+=(--hostfile "$DS_HOSTFILE")
  [[ -z ${MASTER_ADDR:-} ]] || gpus+=(--master_addr "$MASTER_ADDR")
  if [[ -n ${NODE_RANK:-} ]]; then
    [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] || fail "NODE_RANK needs MASTER_ADDR and MASTER_PORT, the same on every machine" 2
    gpus+=(--no_ssh --node_rank "$NODE_RANK")
  else
    # Without a sign of life ssh waits for ever for a machine that is cut off, and pdsh for ssh.
    LAUNCH_ENV+=("PDSH_SSH_ARGS_APPEND=-o BatchMode=yes -o ServerAliveInterval=15 ${PDSH_SSH_ARGS_APPEND:-}")
  fi
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} && " ${LAUNCH_ENV[*]} " != *" DS_ACCELERATOR=cpu "* ]]; then
  [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes the numbers of GPUs only" 2
  commas=${CUDA_VISIBLE_DEVICES//[^,]/}
  ((count <= ${#commas} + 1)) || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has fewer GPUs than the $count ranks of training (train.ranks)" 2
  gpus=(--include "localhost:$(cut -d, -f "1-$count" <<<"$CUDA_VISIBLE_DEVICES")")
fi

# As a module: the first line of the `deepspeed` script is broken where the path has a space.
# The launcher dies on TERM and leaves its ranks behind; its child stops them. With pdsh below it, it stops them itself.
# shellcheck disable=SC2034 # read by common.sh
[[ -n ${DS_HOSTFILE:-} && -z ${NODE_RANK:-} ]] || SIGNAL_BELOW=1
run "$PYTHON" -m deepspeed.launcher.runner "${gpus[@]}" --master_port "${MASTER_PORT:-$(ask_port)}" --no_local_rank --quiet \
  --module unified_rl.train "${ARGUMENTS[@]}"

# Only the machine of rank 0 writes the manifest; a network file system may show it to the others later.
[[ ${NODE_RANK:-0} != 0 ]] || require_committed train
