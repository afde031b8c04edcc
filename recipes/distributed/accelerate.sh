#!/usr/bin/env bash
# Train a recipe with accelerate: run this on every machine, with the same arguments. The recipe's section parallel sets the
# engine; a configuration file of accelerate that sets one too is refused.
#
#   recipes/distributed/accelerate.sh mine.yaml train.steps=100                      one machine
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 recipes/distributed/accelerate.sh mine.yaml    the first of two machines
#
# GPUS   processes on each machine (8)   HEAD       address of the first machine (localhost)
# NODES  machines (1)                    PORT       a free port there (29500)
#                                        NODE_RANK  number of this machine, from 0 (0)
set -euo pipefail

gpus=${GPUS:-8} nodes=${NODES:-1}

exec accelerate launch \
  --multi_gpu \
  --num_machines "$nodes" \
  --machine_rank "${NODE_RANK:-0}" \
  --num_processes "$((gpus * nodes))" \
  --main_process_ip "${HEAD:-localhost}" \
  --main_process_port "${PORT:-29500}" \
  -m eaftdrope train "$@"
