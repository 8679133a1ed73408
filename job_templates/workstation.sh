#!/bin/bash
#: title: this machine, with the deepspeed launcher
#: scheduler: none
#: nodes: 1
#: ranks_per_node: null   # --ranks_per_node says it
#: queues: {}
#: # Between the GPUs of a machine; an assumption: PCIe 4.0 x16.
#: network: {gigabytes_per_second_per_node: 32, latency_microseconds: 5, source: "an assumption, PCIe 4.0 x16"}
#: options:
#:   cores_per_rank: {kind: number, help: "cores of a rank"}
# For one machine, with the deepspeed launcher.
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
# The last word is exec, so that whoever started this script can signal the supervisor itself.
# --num_gpus counts processes, on CPUs, too. The port differs from run to run, or two of them would meet at 29500 (DeepSpeed
# #1923).
exec python3 @@{launch}/supervise.py --run_dir "$run_dir" @@{supervise} -- \
  deepspeed --num_gpus '{ranks}' --master_port $((10000 + $$ % 20000)) @@{launch}/train.py --config "$run_file"
