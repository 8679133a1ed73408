"""Our tables of DeepSpeed's JSON keys against the installed DeepSpeed, name by name."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdyn import ds_config, ds_keys

PYDANTIC = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.leaf_module": "deepspeed.runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "timers.throughput": "deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
}


def imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("section", PYDANTIC)
def test_section_has_deepspeeds_fields_and_accepts_their_defaults(section: str) -> None:
    known, fields = ds_keys.SECTIONS[section], imported(PYDANTIC[section]).model_fields
    current = {
        name: field for name, field in fields.items() if not (field.json_schema_extra or {}).get("deprecated", False)
    }
    deprecated = {f"{section}.{name}" for name in fields.keys() - current.keys()}
    assert known.keys() == current.keys() | {field.alias for field in current.values() if field.alias}
    assert deprecated <= ds_keys.REFUSED.keys()
    for name, field in current.items():
        default = field.get_default(call_default_factory=True)
        if hasattr(default, "model_dump"):
            default = default.model_dump()
        assert known[name].accepts(default), f"{name}: {default!r} is DeepSpeed's default, but not {known[name].text}"


class Listening(dict[str, Any]):
    """A JSON object that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__({k: Listening(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.asked: set[str] = set()

    def _note(self, key: Any) -> Any:
        self.asked.add(key)
        return key

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._note(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._note(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._note(key), default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Listening":
        return self


def asked_for() -> dict[str, set[str]]:
    """The keys DeepSpeed's parser asks for, by section of plain dicts (pydantic sections swallow theirs whole)."""
    from deepspeed.runtime.config import DeepSpeedConfig

    values: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "timers": {"throughput": {}}}
    values |= {"activation_checkpointing": {}, "flops_profiler": {}, "aio": {}, "data_types": {}}
    values |= {"torch_autocast": {"dtype": "bf16", "lower_precision_safe_modules": []}}
    values |= {"checkpoint": {"parallel_write": {}, "writer": {}}}
    heard = Listening(values)
    DeepSpeedConfig(heard)
    sections = {"": heard}
    for name in ds_keys.SECTIONS:
        found = ds_config.get(dict(heard), name) if name else None
        if isinstance(found, Listening):
            sections[name] = found
    return {name: section.asked for name, section in sections.items()}


def test_tables_have_the_keys_deepspeeds_parser_asks_for() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    asked = asked_for()
    removed = _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | {f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= ds_keys.REFUSED.keys()
    top = asked.pop("") - ds_keys.REFUSED.keys()
    assert ds_keys.TOP.keys() == top
    assert {
        "checkpoint",
        "checkpoint.writer",
        "data_types",
        "activation_checkpointing",
        "flops_profiler",
        "aio",
    } <= set(asked)
    for section, keys in asked.items():
        if section not in PYDANTIC:
            assert ds_keys.SECTIONS[section].keys() == keys, section


def parameters(*functions: Callable[..., Any]) -> set[str]:
    first = {"self", "params", "model_params", "optimizer", "last_batch_iteration", "adamw_mode"}
    return {name for function in functions for name in inspect.signature(function).parameters} - first


def test_scheduler_tables_have_deepspeeds_parameters() -> None:
    from deepspeed.runtime import lr_schedules

    assert set(ds_keys.SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, known in ds_keys.SCHEDULERS.items():
        signature = inspect.signature(getattr(lr_schedules, name))
        assert known.keys() == parameters(getattr(lr_schedules, name))
        required = {key for key, p in signature.parameters.items() if p.default is p.empty} - {"optimizer"}
        assert required <= set(ds_keys.REQUIRED.get(name, ()))


def test_optimizer_tables_have_the_parameters_of_every_implementation() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.engine import DeepSpeedEngine

    # What DeepSpeed takes out itself before it calls the optimizer.
    ours = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
    adam = parameters(torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam) - {"decoupled_weight_decay"}
    assert ds_keys.OPTIMIZERS["Adam"].keys() == ds_keys.OPTIMIZERS["AdamW"].keys() == adam | ours
    assert ds_keys.OPTIMIZERS["SGD"].keys() == parameters(torch.optim.SGD)
    halves = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}
    assert ds_keys.OPTIMIZERS["Muon"].keys() == halves | ours | {"per_head_muon", "foreach"}
