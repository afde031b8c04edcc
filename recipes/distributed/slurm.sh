#!/usr/bin/env bash
# Train a recipe on the machines of a Slurm job:
#
#   sbatch recipes/distributed/slurm.sh mine.yaml train.steps=100
#
# Slurm sends SIGTERM five minutes before the time limit and at pre-emption; the run saves and ends. A pre-empted job is
# queued again and resumes. For a run longer than the time limit submit the same command several times: jobs of one name
# wait for each other, and each resumes; one that finds the run finished changes nothing.
#SBATCH --job-name=eaftdrope
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# one task per machine, each of which starts its processes
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${machines[0]}:29500" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --max-restarts 3 \
  --shutdown-timeout 240 \
  -m eaftdrope train "$@"
