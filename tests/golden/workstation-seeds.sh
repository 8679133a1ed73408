#!/bin/bash
# For one machine, with the deepspeed launcher.
set -eo pipefail # not -u: conda's scripts read variables that are not set
cd /lustre/project


run_dir=/lustre/project/run
run_file=/lustre/project/run/job/run.yaml
# An ensemble: one member after the other, its number is this script's argument.
members=(seed1234 seed1235 seed1236)
run_dir=$run_dir/${members[${1:?which member: its number, from 0}]}
run_file=/lustre/project/run/job/members/$1.yaml
# NCCL's flight recorder: where a collective hangs, every rank writes what it was in (PyTorch 2.13, torch.distributed,
# 2026).
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=$run_dir/job/flight_recorder/rank_
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
mkdir -p "$run_dir/job/flight_recorder"
# The last word is exec, so that whoever started this script can signal the supervisor itself.
# --num_gpus counts processes, on CPUs, too. The port differs from run to run, or two of them would meet at 29500 (DeepSpeed
# #1923).
exec python3 /opt/gdyn/launch/supervise.py --run_dir "$run_dir" --nodes 1 --ranks_per_node 2 --ensemble /lustre/project/run/job/members -- \
  deepspeed --num_gpus '{ranks}' --master_port $((10000 + $$ % 20000)) /opt/gdyn/launch/train.py --config "$run_file"
