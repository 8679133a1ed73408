#!/bin/bash
# For any cluster with MPI and ssh, without a scheduler.
set -eo pipefail # not -u: conda's scripts read variables that are not set
cd /lustre/project

# The supervisor chooses a run's hosts from these.
export GDYN_HOSTFILE=/home/user/hosts
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
# Open MPI hands over no variable of its own accord to other hosts (Open MPI 5.0 documentation, mpirun, 2026).
hand_over=()
for name in PATH LD_LIBRARY_PATH PYTHONPATH VIRTUAL_ENV OMP_NUM_THREADS TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR \
  TORCH_FR_BUFFER_SIZE TORCH_FR_DUMP_TEMP_FILE TORCH_NCCL_DUMP_ON_TIMEOUT NCCL_SOCKET_IFNAME; do
  if [[ -v $name ]]; then hand_over+=(-x "$name"); fi
done
bind=socket
map=ppr:4:node
if [[ $bind == none ]]; then map+=:OVERSUBSCRIBE; fi
# When a rank dies, the others need a few seconds to say where they were, and end by themselves.
recovery=(--enable-recovery)
# The last word is exec, so that whoever started this script can signal the supervisor itself.
exec python3 /opt/gdyn/launch/supervise.py --run_dir "$run_dir" --nodes 2 --ranks_per_node 4 -- \
  mpirun -n '{ranks}' --hostfile '{hosts}' "${hand_over[@]}" --map-by "$map" --bind-to "$bind" "${recovery[@]}" \
  python3 /opt/gdyn/launch/train.py --config "$run_file"
