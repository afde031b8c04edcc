#!/usr/bin/env bash
# Train a recipe with torchrun: run this on every machine, with the same arguments.
#
#   recipes/distributed/torchrun.sh mine.yaml train.steps=100                    one machine
#   NODES=2 HEAD=10.0.0.1 recipes/distributed/torchrun.sh mine.yaml              each of two machines
#
# GPUS   processes on this machine (8)          HEAD      address of one of the machines (localhost)
# NODES  machines (1)                           PORT      a free port there (29500)
# JOB    the same name on every machine (mine)  RESTARTS  times that all start again after one was lost (3)
set -euo pipefail

# A signal to torchrun reaches every process, which has --shutdown-timeout seconds to save.
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
  --rdzv-id "${JOB:-mine}" \
  --max-restarts "${RESTARTS:-3}" \
  --shutdown-timeout 600 \
  -m eaftdrope train "$@"
