"""The names DeepSpeed 0.19.8 understands in its JSON, and what a value may be.

DeepSpeed ignores most misspelt keys without a word: `gradient_cliping` trains with the default. So `gdyn.ds_config`
refuses what is not listed here; `tests/test_ds_config.py` compares these tables with the installed DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value may be: how to say it, and the test of a bool, int, float, str, list, dict or None."""

    text: str
    accepts: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*words: Any) -> Kind:
    listed = ", ".join(f'"{word}"' if isinstance(word, str) else str(word) for word in words)
    return Kind(f"one of {listed}", lambda value: any(value == word and type(value) is type(word) for word in words))


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.text} or null", lambda value: value is None or kind.accepts(value))


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("a whole number", _integer)
POSITIVE = Kind("a whole number, 1 or more", lambda value: _integer(value) and value >= 1)
# Element counts are often written 5e8, which JSON reads as a float.
ELEMENTS = Kind("a whole number, 0 or more", lambda value: _number(value) and value >= 0 and value == int(value))
NUMBER = Kind("a number", _number)
SIZE = Kind("a number, 0 or more", lambda value: _number(value) and value >= 0)
FRACTION = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
TEXT = Kind("a string", lambda value: isinstance(value, str))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
DTYPE = one_of("fp32", "fp16", "bf16")
ANY = Kind("anything", lambda value: True)

Section = Mapping[str, Kind]


def _all(kind: Kind, names: str) -> dict[str, Kind]:
    """One kind for many names."""
    return dict.fromkeys(names.split(), kind)


TOP: Section = {
    **_all(POSITIVE, "train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    "gradient_clipping": SIZE,
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": one_of("mean", "sum"),
    **_all(or_null(DTYPE), "communication_data_type seq_parallel_communication_data_type"),
    **_all(BOOL, "prescale_gradients managed_gradient_accumulation disable_allgather dataloader_drop_last"),
    **_all(BOOL, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer use_data_before_expert_parallelism"),
    **_all(BOOL, "wall_clock_breakdown memory_breakdown dump_state disable_python_gc"),
    **_all(or_null(POSITIVE), "steps_per_print vocabulary_size"),
    "log_level": or_null(TEXT),
    "datastates_ckpt": ANY,
    **_all(OBJECT, "optimizer scheduler zero_optimization fp16 bf16 torch_autocast data_types"),
    **_all(OBJECT, "checkpoint activation_checkpointing flops_profiler comms_logger timers compile aio"),
    **_all(OBJECT, "tensorboard wandb csv_monitor comet"),
    # Known by name only: not used with gdyn, and DeepSpeed checks most of them itself.
    **_all(OBJECT, "autotuning data_efficiency hybrid_engine weight_quantization"),
}

_STAGE3 = {
    **_all(ELEMENTS, "prefetch_bucket_size param_persistence_threshold model_persistence_threshold"),
    **_all(ELEMENTS, "max_live_parameters max_reuse_distance"),
    **_all(BOOL, "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential"),
    "module_granularity_threshold": INTEGER,
}

ZERO: Section = {
    "stage": one_of(0, 1, 2, 3),
    **_all(ELEMENTS, "reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size"),
    "overlap_comm": or_null(BOOL),
    **_all(BOOL, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions"),
    **_all(BOOL, "compute_grad_norm load_from_fp32_weights elastic_checkpoint ignore_unused_parameters legacy_stage1"),
    **_all(BOOL, "round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_gradients"),
    **_all(BOOL, "zero_quantized_nontrainable_weights memory_efficient_linear pipeline_loading_checkpoint"),
    **_all(BOOL, "override_module_apply log_trace_cache_warnings enable_sanity_checks"),
    "save_muon_momentum_buffer_in_memory": BOOL,
    **_all(or_null(OBJECT), "offload_param offload_optimizer zenflow"),
    "leaf_module": OBJECT,
    **_STAGE3,
    **{f"stage3_{name}": kind for name, kind in _STAGE3.items()},  # both spellings are DeepSpeed's
}

_DEVICE = one_of("none", "cpu", "nvme")
_MONITOR: Section = {"enabled": BOOL, "output_path": TEXT, "job_name": TEXT}

SECTIONS: Mapping[str, Section] = {
    "": TOP,
    "optimizer": {"type": TEXT, "params": OBJECT, "legacy_fusion": BOOL},
    "scheduler": {"type": TEXT, "params": OBJECT},
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": {
        "device": _DEVICE,
        "nvme_path": or_null(TEXT),
        **_all(ELEMENTS, "buffer_count buffer_size max_in_cpu"),
        "pin_memory": BOOL,
    },
    "zero_optimization.offload_optimizer": {
        "device": _DEVICE,
        "nvme_path": or_null(TEXT),
        "buffer_count": ELEMENTS,
        **_all(BOOL, "pin_memory pipeline_read pipeline_write fast_init super_offload"),
        **_all(FRACTION, "ratio cpuadam_cores_perc"),
    },
    "zero_optimization.leaf_module": _all(LIST, "classes names name_suffixes"),
    "fp16": {
        **_all(BOOL, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "loss_scale": SIZE,
        **_all(INTEGER, "initial_scale_power hysteresis"),
        **_all(POSITIVE, "loss_scale_window min_loss_scale"),
    },
    "bf16": _all(
        BOOL,
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    ),
    "torch_autocast": {
        "enabled": BOOL,
        "dtype": one_of("bfloat16", "bf16", "torch.bfloat16", "float16", "fp16", "half", "torch.float16"),
        "lower_precision_safe_modules": LIST,
    },
    "data_types": {
        **_all(or_null(DTYPE), "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": Kind('"auto" or a list', lambda value: value == "auto" or isinstance(value, list)),
    },
    "checkpoint": {
        "tag_validation": one_of("Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"),
        **_all(BOOL, "load_universal use_node_local_storage checkpoint_serialization"),
        "parallel_write": OBJECT,
        "writer": or_null(OBJECT),
    },
    "checkpoint.parallel_write": {"pipeline_stage": BOOL},
    "checkpoint.writer": {
        **_all(TEXT, "type data_parallel"),
        "io_buffer_size": ELEMENTS,
        "io_multiplier": POSITIVE,
        **_all(BOOL, "io_buffer_double show_statistics decoupled"),
    },
    "activation_checkpointing": {
        **_all(BOOL, "partition_activations contiguous_memory_optimization synchronize_checkpoint_boundary"),
        **_all(BOOL, "profile cpu_checkpointing"),
        "number_checkpoints": or_null(POSITIVE),
    },
    "flops_profiler": {
        **_all(BOOL, "enabled detailed"),
        **_all(POSITIVE, "profile_step top_modules"),
        "recompute_fwd_factor": NUMBER,
        "module_depth": INTEGER,
        "output_file": or_null(TEXT),
    },
    "comms_logger": {**_all(BOOL, "enabled prof_all verbose debug"), "prof_ops": LIST},
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": BOOL, "project": TEXT, **_all(or_null(TEXT), "group team")},
    "comet": {
        "enabled": BOOL,
        "samples_log_interval": POSITIVE,
        "online": or_null(BOOL),
        **_all(or_null(TEXT), "project workspace api_key experiment_name experiment_key mode"),
    },
    "compile": {
        "passes": or_null(LIST),
        "free_activation_threshold": ELEMENTS,
        **_all(BOOL, "deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory"),
        **_all(BOOL, "offload_opt_states offload_parameters double_buffer symmetric_memory debug_log"),
        **_all(BOOL, "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather"),
        **_all(BOOL, "keep_int_input_tensors keep_all_input_tensors"),
    },
    "timers": {"throughput": OBJECT},
    "timers.throughput": _all(BOOL, "enabled synchronized"),
    "aio": {
        **_all(POSITIVE, "block_size queue_depth intra_op_parallelism"),
        **_all(BOOL, "single_submit overlap_events use_gds"),
    },
}

_ADAM: Section = {
    **_all(SIZE, "lr weight_decay eps"),
    "betas": LIST,
    **_all(BOOL, "amsgrad torch_adam adam_w_mode"),
    # Read with torch_adam only, then without it only.
    **_all(BOOL, "maximize capturable differentiable"),
    **_all(or_null(BOOL), "foreach fused"),
    **_all(BOOL, "bias_correction set_grad_none fp32_optimizer_states"),
}

# DeepSpeed's others are not used here: Lamb and Lion must be compiled; MuAdam, MuAdamW and MuSGD need the package `mup`
# and a model with base shapes.
OPTIMIZERS: Mapping[str, Section] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Muon": {
        **_all(SIZE, "lr muon_lr adam_lr weight_decay eps"),
        "momentum": FRACTION,
        "betas": LIST,
        "ns_method": one_of("gram", "standard"),
        **_all(BOOL, "per_head_muon torch_adam adam_w_mode fp32_optimizer_states"),
        "foreach": or_null(BOOL),
    },
    "SGD": {
        **_all(SIZE, "lr weight_decay momentum"),
        "dampening": NUMBER,
        **_all(BOOL, "nesterov maximize differentiable"),
        **_all(or_null(BOOL), "foreach fused"),
    },
}

_WARMUP: Section = {"warmup_num_steps": POSITIVE, "warmup_type": one_of("log", "linear")}
SCHEDULERS: Mapping[str, Section] = {
    "WarmupLR": {**_WARMUP, "warmup_min_lr": SIZE, "warmup_max_lr": or_null(SIZE)},
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": POSITIVE, **_all(SIZE, "warmup_min_lr warmup_max_lr")},
    "WarmupCosineLR": {**_WARMUP, "total_num_steps": POSITIVE, **_all(FRACTION, "warmup_min_ratio cos_min_ratio")},
    "OneCycle": {
        **_all(SIZE, "cycle_min_lr cycle_max_lr decay_lr_rate decay_mom_rate"),
        "cycle_first_step_size": POSITIVE,
        "cycle_second_step_size": or_null(POSITIVE),
        "cycle_first_stair_count": ELEMENTS,
        "cycle_second_stair_count": or_null(ELEMENTS),
        "decay_step_size": ELEMENTS,
        "cycle_momentum": BOOL,
        **_all(FRACTION, "cycle_min_mom cycle_max_mom"),
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": SIZE,
        "lr_range_test_step_size": POSITIVE,
        "lr_range_test_step_rate": NUMBER,
        "lr_range_test_staircase": BOOL,
    },
}

# Scheduler parameters DeepSpeed has no default for.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    # Without warmup_max_lr the schedule rises to 0.001, whatever `lr` says.
    "WarmupDecayLR": ("total_num_steps", "warmup_max_lr"),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}

# Keys people still write, and the way on.
REFUSED: Mapping[str, str] = {
    "train_batch_size": (
        "it depends on the number of ranks; state train_micro_batch_size_per_gpu and gradient_accumulation_steps, "
        "the global batch is computed"
    ),
    **dict.fromkeys(
        ("sequence_parallel_size", "tensor_parallel", "expert_parallel", "pipeline"),
        "gdyn splits batches over ranks, not models; delete the key",
    ),
    "amp": 'removed from DeepSpeed with Apex AMP; use "torch_autocast" or "bf16"',
    "compression_training": "removed from DeepSpeed; delete the block",
    "curriculum_learning": 'removed from DeepSpeed; see "data_efficiency.data_sampling.curriculum_learning"',
    "eigenvalue": "removed from DeepSpeed with quantised training; delete the block",
    "elasticity": "removed from DeepSpeed; state micro-batch and accumulation, gdyn resumes on any number of ranks",
    "graph_harvesting": "removed from DeepSpeed; delete the key",
    "nebula": "removed from DeepSpeed; gdyn writes its own checkpoints, delete the block",
    "progressive_layer_drop": "removed from DeepSpeed; delete the block",
    "quantize_training": "removed from DeepSpeed; delete the block",
    "sparse_attention": "removed from DeepSpeed; delete the block",
    "sparse_gradients": "removed from DeepSpeed, embeddings are reduced dense; delete the key",
    "bfloat16": 'renamed; it is called "bf16"',
    "zero_optimization.mics_shard_size": 'removed from DeepSpeed with MiCS; see "zero_hpz_partition_size"',
    "zero_optimization.mics_hierarchical_params_gather": "removed from DeepSpeed with MiCS; delete the key",
    "zero_optimization.zeropp_loco_param": 'removed from DeepSpeed; keep "zero_quantized_gradients" alone',
    "zero_optimization.cpu_offload": 'deprecated; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'deprecated; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": (
        'deprecated; write "pin_memory" inside "offload_optimizer" or "offload_param"'
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        'renamed; it is called "stage3_gather_16bit_weights_on_model_save"'
    ),
    "bf16.check_overflow": 'renamed; it is called "check_grad_overflow"',
    "optimizer.params.max_grad_norm": 'clipping is stated once, as top-level "gradient_clipping"',
}

# Where "auto" may stand, and the run-file key (or fact of the run) that fills it.
AUTO: Mapping[str, str] = {
    "train_micro_batch_size_per_gpu": "optimization.batch_size",
    "gradient_accumulation_steps": "optimization.gradient_accumulation_steps",
    "optimizer.params.lr": "optimization.learning_rate",
    "scheduler.params.warmup_max_lr": "optimization.learning_rate",
    "scheduler.params.cycle_max_lr": "optimization.learning_rate",
    "scheduler.params.total_num_steps": "the run's number of optimizer steps",
    "scheduler.params.warmup_num_steps": "the run's number of optimizer steps",
    "fp16.enabled": "optimization.mixed_precision",
    "bf16.enabled": "optimization.mixed_precision",
    "torch_autocast.enabled": "optimization.mixed_precision",
}
