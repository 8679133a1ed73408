#!/bin/bash
#: title: any cluster with MPI and ssh, without a scheduler
#: scheduler: none
#: ranks_per_node: null   # --ranks_per_node says it
#: queues: {}
#: # An assumption, for there is no typical cluster: one 10 Gb/s port a node.
#: network: {gigabytes_per_second_per_node: 1.25, latency_microseconds: 20, source: "an assumption, 10 Gb/s"}
#: options:
#:   mpi_flavour: {choices: [openmpi, mpich, intel], default: openmpi, help: "whose mpirun it is"}
#:   hostfile: {kind: file, help: "a host per line; leave out for this machine alone"}
#:   bind: {choices: [socket, none], default: socket, help: "none: more ranks than cores may share them"}
#:   cores_per_rank: {kind: number, help: "cores of a rank"}
# For any cluster with MPI and ssh, without a scheduler.
set -eo pipefail # not -u: conda's scripts read variables that are not set
cd @@{workdir}
#? conda
# shellcheck disable=SC1091 # conda's own script
source activate @@{conda}
#?
#? venv
# shellcheck disable=SC1091 # the environment's own script
source @@{venv}/bin/activate
#?

#? time
# There is no scheduler to ask when the time is up; the supervisor reads this.
export GDYN_END_TIME=$(($(date +%s) + @@{seconds}))
#?
#? cores_per_rank
# Threads of a rank: its cores (PyTorch documentation, torch.set_num_threads, 2026).
export OMP_NUM_THREADS=@@{cores_per_rank}
#?
#? hostfile
# The supervisor chooses a run's hosts from these.
export GDYN_HOSTFILE=@@{hostfile}
#?
# Caches of compiled kernels: on a node's own /tmp, and one per start, because a killed build leaves a lock for the next
# (pytorch #189245, 2026). PyTorch and Triton make the folders on each node themselves.
caches=/tmp/gdyn-$(id -u)-$$
export TRITON_CACHE_DIR=$caches/triton
export TORCH_EXTENSIONS_DIR=$caches/torch_extensions

run_dir=@@{run_dir}
run_file=@@{run_dir}/job/run.yaml
#? members
# An ensemble: one member after the other, its number is this script's argument.
members=(@@{members})
run_dir=$run_dir/${members[${1:?which member: its number, from 0}]}
run_file=@@{run_dir}/job/members/$1.yaml
#?
# NCCL's flight recorder: where a collective hangs, every rank writes what it was in (PyTorch 2.13, torch.distributed,
# 2026).
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=$run_dir/job/flight_recorder/rank_
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
mkdir -p "$run_dir/job/flight_recorder"
#? mpi_flavour=openmpi
# Open MPI hands over no variable of its own accord to other hosts (Open MPI 5.0 documentation, mpirun, 2026).
hand_over=()
for name in PATH LD_LIBRARY_PATH PYTHONPATH VIRTUAL_ENV OMP_NUM_THREADS TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR \
  TORCH_FR_BUFFER_SIZE TORCH_FR_DUMP_TEMP_FILE TORCH_NCCL_DUMP_ON_TIMEOUT NCCL_SOCKET_IFNAME; do
  if [[ -v $name ]]; then hand_over+=(-x "$name"); fi
done
bind=@@{bind}
map=ppr:@@{ranks_per_node}:node
if [[ $bind == none ]]; then map+=:OVERSUBSCRIBE; fi
# When a rank dies, the others need a few seconds to say where they were, and end by themselves.
recovery=(--enable-recovery)
#?
#? mpi_flavour=mpich
# When a rank dies, the others need a few seconds to say where they were, and end by themselves. With
# -disable-auto-cleanup Hydra grants them, unless the process that it started died of a signal; and it sends USR1 to the
# others (MPICH 5.0, hydra/proxy/pmip.c, 2026). Therefore a shell stands between, which survives both, and stays because
# of the exit.
# shellcheck disable=SC2016 # meant for that shell
recovery=(-disable-auto-cleanup bash -c 'trap "" INT TERM USR1 USR2; "$@"; exit $?' rank)
#?
#? mpi_flavour=intel
bind=@@{bind}
pin=(-genv I_MPI_PIN_DOMAIN "$bind")
if [[ $bind == none ]]; then pin=(-genv I_MPI_PIN 0); fi
#?
# The last word is exec, so that whoever started this script can signal the supervisor itself.
exec python3 @@{launch}/supervise.py --run_dir "$run_dir" @@{supervise} -- \
#? mpi_flavour=openmpi
  mpirun -n '{ranks}' --hostfile '{hosts}' "${hand_over[@]}" --map-by "$map" --bind-to "$bind" "${recovery[@]}" \
#?
#? mpi_flavour=mpich
  mpiexec -n '{ranks}' -f '{hosts}' -ppn @@{ranks_per_node} -bind-to @@{bind} "${recovery[@]}" \
#?
#? mpi_flavour=intel
  mpirun -n '{ranks}' -f '{hosts}' -ppn @@{ranks_per_node} "${pin[@]}" \
#?
  @@{python} @@{launch}/train.py --config "$run_file"
