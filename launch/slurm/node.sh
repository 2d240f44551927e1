#!/bin/bash
# The ranks of one node of a job: torchrun, started by srun in launch/slurm/pretrain.sbatch, which sets MMTRAIN_*.
#
#   node.sh RANK_SCRIPT PROGRAM OPTIONS...
set -euo pipefail

if [ "$SLURM_NODEID" = 0 ]; then
  echo "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$MMTRAIN_ATTEMPT/step"   # which a signal to the run is sent to
fi
# Ranks follow the nodes' order, so that rank 0, its log and the ranks' meeting place are on the first. torchrun hands
# SIGTERM on to its ranks, and gives them TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to save.
exec python -m torch.distributed.run --nnodes="$MMTRAIN_NODES_USED" --node-rank="$SLURM_NODEID" \
  --nproc-per-node="$MMTRAIN_PROCESSES_USED" --master-addr="$MMTRAIN_HEAD" --master-port="$MMTRAIN_PORT" \
  --max-restarts=0 --no-python "$@"
