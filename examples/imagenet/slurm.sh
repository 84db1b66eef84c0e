#!/usr/bin/env bash
#SBATCH --job-name=flowspace
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=TERM@120
# The paper's 8 machines of 8 GPUs: with its batch of 2048, each GPU has 32 images.
# One launcher a machine starts a process a GPU. SIGTERM comes two minutes before the end of the
# job; the run saves, and the next job continues it.
# Usage: sbatch examples/imagenet/slurm.sh examples/imagenet/configs/paper/crossflow-b.yaml \
#   data.path=/data/imagenet/train training.processes=64
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --shutdown-timeout 110 --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  examples/imagenet/train.py "$@"
