#!/bin/bash
set -euo pipefail
hosts=${1:?usage: openmpi.sh HOSTFILE}
export OMP_NUM_THREADS=4
export NCCL_SOCKET_IFNAME=ib0
mpirun -n 8 --hostfile "$hosts" --map-by ppr:4:node --bind-to none -x OMP_NUM_THREADS -x NCCL_SOCKET_IFNAME -x PATH \
  python train.py --config run.yaml
