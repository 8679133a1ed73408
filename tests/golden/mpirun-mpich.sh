#!/bin/bash
# For any cluster with MPI and ssh, without a scheduler.
set -eo pipefail # not -u: conda's scripts read variables that are not set
cd /lustre/project

# Caches of compiled kernels: on a node's own /tmp, and one per start, because a killed build leaves a lock for the next
# (pytorch #189245, 2026). PyTorch and Triton make the folders on each node themselves.
caches=/tmp/gdyn-$(id -u)-$$
export TRITON_CACHE_DIR=$caches/triton
export TORCH_EXTENSIONS_DIR=$caches/torch_extensions

run_dir=/lustre/project/run
run_file=/lustre/project/run/job/run.yaml
# NCCL's flight recorder: where a collective hangs, every rank writes what it was in (PyTorch 2.13, torch.distributed,
# 2026).
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=$run_dir/job/flight_recorder/rank_
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
mkdir -p "$run_dir/job/flight_recorder"
# When a rank dies, the others need a few seconds to say where they were, and end by themselves. With
# -disable-auto-cleanup Hydra grants them, unless the process that it started died of a signal; and it sends USR1 to the
# others (MPICH 5.0, hydra/proxy/pmip.c, 2026). Therefore a shell stands between, which survives both, and stays because
# of the exit.
# shellcheck disable=SC2016 # meant for that shell
recovery=(-disable-auto-cleanup bash -c 'trap "" INT TERM USR1 USR2; "$@"; exit $?' rank)
# The last word is exec, so that whoever started this script can signal the supervisor itself.
exec python3 /opt/gdyn/launch/supervise.py --run_dir "$run_dir" --nodes 1 --ranks_per_node 4 -- \
  mpiexec -n '{ranks}' -f '{hosts}' -ppn 4 -bind-to none "${recovery[@]}" \
  python3 /opt/gdyn/launch/train.py --config "$run_file"
