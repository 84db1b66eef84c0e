#!/usr/bin/env bash
#SBATCH --job-name=flowspace
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=TERM@120
# Starts one torchrun a machine; SIGTERM comes two minutes before the end, the run saves, and the next job continues it.
# Usage: sbatch examples/imagenet/slurm.sh examples/imagenet/configs/crossflow-xl.yaml data.path=/data/imagenet/train
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$head:29500" \
  --rdzv_id "$SLURM_JOB_ID" -m flowspace.cli train "$@"
