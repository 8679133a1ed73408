"""The DeepSpeed JSON: what is refused, how "auto" is filled, and that every recipe of ds_configs/ really trains."""

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gdyn import ds_config, ds_keys, ds_machine
from gdyn.ds_config import DsConfig
from gdyn.ds_machine import Machine
from gdyn.errors import MissingFile, UserError
from gdyn.ranks import RankContext
from gdyn.recipes import bundled
from tests.harness import run_ranks

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}
GONE = object()


@dataclass(frozen=True)
class Wishes:
    """A run file's `optimization` section."""

    batch_size: int | None = 32
    gradient_accumulation_steps: int | None = None
    learning_rate: float | None = 1e-3
    mixed_precision: bool | str | None = None


def config(**changes: Any) -> DsConfig:
    """GOOD with changes by dotted name ("a__b" is a.b); GONE removes."""
    values = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *way, last = name.split("__")
        section = values
        for part in way:
            section = section.setdefault(part, {})
        if value is GONE:
            del section[last]
        else:
            section[last] = value
    return DsConfig(Path("mine.json"), values)


# Reading


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('{\n  "fp16": {"enabled": true},\n}', ["line 3, column 1", "trailing commas"]),
        ('{\n  // note\n  "bf16": {}}', ["line 2, column 3", "comments"]),
        ('{"bf16": {"enabled": true}, "bf16": {}}', ['"bf16" is written twice']),
        ('{"optimizer": {"type": "Adam", "type": "AdamW"}}', ['"type" is written twice']),
        ("[1, 2]", ["one JSON object", "[1, 2]"]),
        ("", ["line 1, column 1"]),
    ],
)
def test_unreadable_json_is_one_clear_error(tmp_path: Path, text: str, fragments: list[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        ds_config.read(path)
    assert all(fragment in str(refused.value) for fragment in [str(path), *fragments])


def test_missing_binary_or_directory_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MissingFile, match=r"absent\.json"):
        ds_config.read(tmp_path / "absent.json")
    with pytest.raises(UserError, match="UTF-8"):
        ds_config.read(tmp_path / "binary.json")
    with pytest.raises(UserError, match="cannot be read"):
        ds_config.read(tmp_path)


# Checking

BAD: list[tuple[dict[str, Any], list[str]]] = [
    # unknown keys, with the way on
    ({"gradient_cliping": 1.0}, ['unknown key "gradient_cliping"', '"gradient_clipping"']),
    ({"Train_Micro_Batch_Size_Per_GPU": 1}, ['did you mean "train_micro_batch_size_per_gpu"']),
    ({"stage": 1}, ['unknown key "stage"', "belongs in zero_optimization"]),
    ({"qqq": 1}, ['unknown key "qqq"', "known at the top level", "wall_clock_breakdown"]),
    ({"zero_optimization__stge": 2}, ['"zero_optimization.stge"', '"stage"']),
    ({"zero_optimization__offload_optimizer": {"divice": "cpu"}}, ["offload_optimizer.divice", '"device"']),
    ({"optimizer__params__learning_rate": 1e-3}, ["optimizer.params.learning_rate", "known in optimizer.params"]),
    ({"optimizer__params__beta": [0.9, 0.99]}, ['did you mean "betas"']),
    ({"optimizer__lr": 1e-3}, ['unknown key "optimizer.lr"']),
    ({"fp16__loss_scal": 0}, ["fp16.loss_scal", '"loss_scale"']),
    ({"bf16__enable": True}, ["bf16.enable", '"enabled"']),
    ({"torch_autocast": {"dtyp": "bf16"}}, ["torch_autocast.dtyp", '"dtype"']),
    ({"checkpoint__tag_valid": "Fail"}, ["checkpoint.tag_valid"]),
    ({"tensorboard__path": "x"}, ["tensorboard.path"]),
    ({"flops_profiler__step": 1}, ["flops_profiler.step"]),
    ({"activation_checkpointing__cpu": True}, ["activation_checkpointing.cpu"]),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
        ['unknown key "scheduler.params.total_num_steps"'],
    ),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 9}}}, ['"warmup_num_steps"']),
    # refused on purpose
    ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "splits batches over ranks"]),
    ({"train_batch_size": 64}, ['"train_batch_size"', "number of ranks", "gradient_accumulation_steps"]),
    ({"elasticity": {"enabled": True}}, ['"elasticity"', "removed"]),
    ({"amp": {"enabled": True}}, ['"amp"', "removed", "torch_autocast"]),
    ({"zero_optimization__mics_shard_size": 8}, ["mics_shard_size", "removed", "zero_hpz_partition_size"]),
    ({"zero_optimization__cpu_offload": True}, ["cpu_offload", '"offload_optimizer"']),
    ({"optimizer__params__max_grad_norm": 1.0}, ["max_grad_norm", "gradient_clipping"]),
    # types and ranges
    ({"train_micro_batch_size_per_gpu": "32"}, ["train_micro_batch_size_per_gpu", '"32"', "a whole number"]),
    ({"train_micro_batch_size_per_gpu": 0}, ["1 or more"]),
    ({"train_micro_batch_size_per_gpu": -4}, ["is -4"]),
    ({"gradient_accumulation_steps": 1.5}, ["gradient_accumulation_steps", "1.5"]),
    ({"gradient_clipping": "1.0"}, ["gradient_clipping", '"1.0"', "a number"]),
    ({"gradient_clipping": -1}, ["gradient_clipping", "0 or more"]),
    ({"gradient_clipping": "auto"}, ['"gradient_clipping" is "auto"', "filled only for"]),
    ({"gradient_clipping": float("nan")}, ["gradient_clipping", "NaN"]),
    ({"zero_optimization__stage": 4}, ["zero_optimization.stage", "one of 0, 1, 2, 3"]),
    ({"zero_optimization__stage": "2"}, ['is "2"', "one of 0, 1, 2, 3"]),
    ({"zero_optimization": True}, ["zero_optimization", "an object"]),
    ({"zero_optimization__reduce_bucket_size": -1}, ["reduce_bucket_size"]),
    ({"optimizer__params__lr": "1e-3"}, ["optimizer.params.lr", '"1e-3"', "a number"]),
    ({"optimizer__params__torch_adam": "true"}, ["torch_adam", "true or false"]),
    ({"bf16__enabled": 1}, ["bf16.enabled", "true or false"]),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, ["warmup_type", '"log", "linear"']),
    # combinations
    ({"optimizer__type": "Adan"}, ['unknown optimizer "Adan"', "AdamW"]),
    ({"optimizer__type": "sgd"}, ['unknown optimizer "sgd"', "SGD"]),
    ({"optimizer__type": ["Adam"]}, ["optimizer.type", "a string"]),
    ({"scheduler": {"type": "Cosine", "params": {}}}, ['unknown scheduler "Cosine"', "WarmupCosineLR"]),
    ({"scheduler": {"params": {}}}, ['"scheduler" has no "type"']),
    ({"optimizer": GONE}, ['"optimizer" with a "type" is missing']),
    ({"optimizer__params": {}}, ['"optimizer.params.lr" is missing', "optimization.learning_rate"]),
    (
        {"train_micro_batch_size_per_gpu": GONE},
        ["train_micro_batch_size_per_gpu", "missing", "optimization.batch_size"],
    ),
    ({"gradient_clipping": GONE}, ['"gradient_clipping" is missing']),
    ({"fp16__enabled": True, "bf16__enabled": True}, ['both "bf16" and "fp16" are enabled; keep one']),
    ({"bf16__enabled": True, "torch_autocast": {"enabled": True, "dtype": "bf16"}}, ['"bf16" and "torch_autocast"']),
    ({"torch_autocast__enabled": True}, ["torch_autocast.dtype", "missing"]),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, ["scheduler.params.warmup_max_lr"]),
    ({"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1.0}}}, ["scheduler.params.cycle_min_lr"]),
    ({"optimizer": {"type": "SGD", "params": {"lr": 1}}}, ["SGD", "zero_allow_untested_optimizer"]),
    (
        {"optimizer": {"type": "Muon", "params": {"lr": 1}}, "zero_optimization__stage": 3},
        ["Muon", '"reduce_scatter": false'],
    ),
    ({"zero_optimization__offload_param": {"device": "cpu"}}, ["offload_param", '"stage" 3']),
    ({"zero_optimization__offload_optimizer": {"device": "nvme"}}, ["offload_optimizer", "nvme_path"]),
    (
        {"zero_optimization__stage": 0, "bf16__enabled": True, "data_types__grad_accum_dtype": "fp32"},
        ["grad_accum_dtype", "stage 1 or more"],
    ),
]


@pytest.mark.parametrize(("changes", "fragments"), BAD, ids=[fragments[0] for _, fragments in BAD])
def test_bad_json_is_refused_with_file_key_and_way_on(changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        ds_config.check(config(**changes))
    assert str(refused.value).startswith("mine.json: ")
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        ds_config.check(config(gradient_cliping=1.0, zero_optimization__stage=7, amp={}))
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"optimizer__type": "Adam"}, "is AdamW in DeepSpeed"),
        ({"optimizer": {"type": "Muon", "params": {"lr": 1}}}, "shrinks the orthogonalised update"),
        ({"bf16__enabled": True, "zero_optimization__stage": 0}, "accumulates gradients in bf16"),
    ],
)
def test_doubtful_json_is_accepted_with_a_warning(changes: dict[str, Any], fragment: str) -> None:
    assert ds_config.check(config()) == []
    [warning] = ds_config.check(config(**changes))
    assert fragment in warning


# Completing


def test_auto_takes_the_run_files_values() -> None:
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    mine = config(scheduler={"type": "WarmupDecayLR", "params": schedule})
    written = copy.deepcopy(mine.values)
    values = ds_config.complete(mine, Wishes(batch_size=8, gradient_accumulation_steps=4), total_steps=200)
    assert (ds_config.micro_batch(values), ds_config.accumulation(values)) == (8, 4)
    assert ds_config.global_batch(values, world_size=3) == 96
    assert values["optimizer"]["params"]["lr"] == 1e-3
    assert values["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 1e-3,
        "warmup_num_steps": 10,
        "total_num_steps": 200,
    }
    assert '"auto"' not in json.dumps(values)
    assert mine.values == written


def test_concrete_values_stand_where_the_run_file_is_silent_or_agrees() -> None:
    mine = config(train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=2, optimizer__params__lr=0.01)
    for wishes in (Wishes(None, None, None), Wishes(16, 2, 0.01)):
        values = ds_config.complete(mine, wishes)
        assert ds_config.batch_sizes(mine, wishes.batch_size, wishes.gradient_accumulation_steps) == (16, 2)
        assert values == mine.values


def test_accumulation_is_one_where_nobody_says_anything() -> None:
    assert ds_config.batch_sizes(config(), 32, None) == (32, 1)
    assert ds_config.batch_sizes(config(gradient_accumulation_steps=GONE), 32, None) == (32, 1)
    assert ds_config.batch_sizes(config(gradient_accumulation_steps=GONE), 32, 4) == (32, 4)


def test_even_the_shortest_run_warms_up_for_a_step() -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    values = ds_config.complete(config(scheduler=schedule), Wishes(), total_steps=3)
    assert values["scheduler"]["params"]["warmup_num_steps"] == 1


CONFLICTS: list[tuple[dict[str, Any], Wishes, list[str]]] = [
    ({"train_micro_batch_size_per_gpu": 64}, Wishes(), ["_per_gpu = 64", "optimization.batch_size = 32"]),
    ({"gradient_accumulation_steps": 2}, Wishes(gradient_accumulation_steps=4), ["gradient_accumulation_steps = 2"]),
    ({"optimizer__params__lr": 0.1}, Wishes(), ["params.lr = 0.1", "optimization.learning_rate = 0.001"]),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}},
        Wishes(),
        ["warmup_max_lr = 0.1", "optimization.learning_rate"],
    ),
    ({}, Wishes(batch_size=None), ['train_micro_batch_size_per_gpu is "auto"', "optimization.batch_size"]),
    ({}, Wishes(learning_rate=None), ['optimizer.params.lr is "auto"', "optimization.learning_rate"]),
    ({}, Wishes(batch_size=-1), ["optimization.batch_size is -1", "above 0"]),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}}},
        Wishes(),
        ["total_num_steps", "number of steps is not known"],
    ),
    ({"bf16__enabled": False}, Wishes(mixed_precision=True), ["precision is fp32", "mixed_precision = true"]),
    ({"fp16__enabled": True}, Wishes(mixed_precision="bf16"), ["precision is fp16", 'mixed_precision = "bf16"']),
    ({"bf16__enabled": "auto"}, Wishes(), ['bf16.enabled is "auto"', "optimization.mixed_precision"]),
    ({}, Wishes(mixed_precision="int8"), ['mixed_precision is "int8"', '"fp32", "bf16" or "fp16"']),
]


@pytest.mark.parametrize(("changes", "wishes", "fragments"), CONFLICTS, ids=[f[0] for *_, f in CONFLICTS])
def test_disagreement_names_both_places(changes: dict[str, Any], wishes: Wishes, fragments: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        ds_config.complete(config(**changes), wishes)
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


@pytest.mark.parametrize(
    ("changes", "mixed", "precision"),
    [
        ({}, None, "fp32"),
        ({}, False, "fp32"),
        ({}, True, "autocast-bf16"),
        ({}, "fp16", "autocast-fp16"),
        ({"bf16__enabled": True}, None, "bf16"),
        ({"bf16__enabled": True}, "bf16", "bf16"),
        ({"bf16__enabled": "auto", "fp16__enabled": "auto"}, "fp16", "fp16"),
        ({"bf16__enabled": "auto", "fp16__enabled": "auto"}, True, "bf16"),
        ({"bf16__enabled": "auto", "fp16__enabled": "auto"}, False, "fp32"),
    ],
)
def test_mixed_precision_fills_what_the_json_leaves_open(changes: dict[str, Any], mixed: Any, precision: str) -> None:
    values = ds_config.complete(config(**changes), Wishes(mixed_precision=mixed))
    assert ds_config.precision(values) == precision


# The machine

TOOLLESS = Machine("cpu", frozenset({"fp32", "bf16"}), ("a C++ compiler (c++)", "ninja"), frozenset())
EQUIPPED = Machine("cpu", frozenset({"fp32", "bf16"}), (), frozenset())


def test_precision_the_device_lacks_is_refused() -> None:
    mine = config(fp16__enabled=True)
    with pytest.raises(UserError, match=r"mine\.json: precision fp16 is not supported .* bf16, fp32"):
        ds_machine.check_hardware(mine, mine.values, EQUIPPED, {})


@pytest.mark.parametrize(
    ("changes", "ops"),
    [
        ({}, []),
        ({"optimizer__params__torch_adam": False}, ["fused_adam"]),
        (
            {"optimizer__params__torch_adam": False, "zero_optimization__offload_optimizer": {"device": "cpu"}},
            ["cpu_adam"],
        ),
        ({"zero_optimization__offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, ["async_io"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}, []),
    ],
)
def test_ops_that_must_be_compiled_are_foreseen(changes: dict[str, Any], ops: list[str]) -> None:
    assert ds_machine.ops_needed(config(**changes).values) == ops


def test_compilation_without_tools_is_refused_and_with_tools_announced(tmp_path: Path) -> None:
    mine = config(optimizer__params__torch_adam=False)
    directories = {"fused_adam": tmp_path}
    with pytest.raises(UserError, match=r'C\+\+ compiler .* ninja; .*g\+\+.*"torch_adam": true'):
        ds_machine.check_hardware(mine, mine.values, TOOLLESS, directories)
    [warning] = ds_machine.check_hardware(mine, mine.values, EQUIPPED, directories)
    assert "fused_adam" in warning and "minutes" in warning
    (tmp_path / "fused_adam.so").touch()
    assert ds_machine.check_hardware(mine, mine.values, EQUIPPED, directories) == []
    with pytest.raises(UserError, match=r"does not find ninja;"):
        ds_machine.check_hardware(mine, mine.values, TOOLLESS, directories)


def test_abandoned_build_lock_is_refused_with_the_cure(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    for path in (lock, tmp_path):
        os.utime(path, (0, 0))
    with pytest.raises(UserError, match=f"rm {lock}"):
        ds_machine.check_build_locks({"fused_adam": tmp_path})


def test_lock_of_a_live_build_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            lock.unlink()

    monkeypatch.setattr("time.sleep", nap)
    ds_machine.check_build_locks({"fused_adam": tmp_path})
    assert len(naps) == 3


def test_a_process_in_the_build_directory_counts_as_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ds_machine._process_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ds_machine._process_in(tmp_path)


def test_no_lock_no_wait_and_no_op_no_directory(tmp_path: Path) -> None:
    ds_machine.check_build_locks({"fused_adam": tmp_path})
    assert ds_machine.build_directories(config().values, EQUIPPED) == {}


def test_torch_says_where_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    values = config(optimizer__params__torch_adam=False).values
    assert ds_machine.build_directories(values, EQUIPPED) == {"fused_adam": tmp_path / "fused_adam"}
    built_in = Machine("cpu", frozenset({"fp32"}), (), frozenset({"fused_adam"}))
    assert ds_machine.build_directories(values, built_in) == {}


# Our names against the installed DeepSpeed's

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


# The recipes


@pytest.mark.parametrize("name", bundled())
def test_recipe_is_clean_and_named_after_what_it_does(name: str) -> None:
    recipe = ds_config.read(bundled()[name])
    assert ds_config.check(recipe) == []
    values = ds_config.complete(recipe, Wishes(), total_steps=100)
    precision, stage, *rest = name.split("_")
    assert ds_config.precision(values).removeprefix("autocast-") == precision
    assert stage == f"zero{ds_config.zero_stage(values)}"
    assert ("offload" in rest) == (ds_config.offload_device(values, "offload_param") == "cpu")
    assert ("warmup" in rest) == (ds_config.scheduler_type(values) is not None)
    assert ds_machine.ops_needed(values) == []


def test_recipes_cover_the_precisions_and_stages_promised() -> None:
    promised = {f"{p}_zero{stage}" for p in ("fp32", "bf16", "fp16") for stage in (0, 1, 2)}
    promised |= {f"{p}_zero3{offload}" for p in ("fp32", "bf16") for offload in ("", "_offload")}
    assert promised <= bundled().keys()


STEPS, BATCH = 6, 16


def batches() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, generator=random)
    return [(inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]))] * STEPS


def model() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(3, 1)


def losses_without_deepspeed() -> list[float]:
    module = model()
    adam = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for inputs, targets in batches():
        adam.zero_grad()
        loss = torch.nn.functional.mse_loss(module(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    return losses


def losses_of(name: str) -> list[float] | str:
    """The losses DeepSpeed gets with a recipe, or why this machine refuses it."""
    import deepspeed

    recipe, machine = ds_config.read(bundled()[name]), ds_machine.look()
    values = ds_config.complete(recipe, Wishes(batch_size=BATCH, learning_rate=0.1), total_steps=STEPS)
    try:
        ds_machine.check_hardware(recipe, values, machine, ds_machine.build_directories(values, machine))
    except UserError as refused:
        return str(refused)
    module = model()
    ds, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=values)
    losses = []
    for inputs, targets in batches():
        loss = torch.nn.functional.mse_loss(ds(inputs).float(), targets)
        ds.backward(loss)
        ds.step()
        losses.append(loss.item())
    return losses


def losses_of_all(here: RankContext) -> dict[str, list[float] | str]:
    return {"plain": losses_without_deepspeed()} | {name: losses_of(name) for name in bundled()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[float] | str]:
    """Recipe -> its losses, and "plain" for PyTorch without DeepSpeed; all in one process."""
    return run_ranks(1, losses_of_all)[0]


@pytest.mark.parametrize("name", bundled())
def test_recipe_trains_like_plain_pytorch_or_says_why_it_cannot(trained: dict[str, Any], name: str) -> None:
    losses, expected = trained[name], trained["plain"]
    if isinstance(losses, str):
        assert name.startswith("fp16") and "precision fp16 is not supported" in losses
    elif name.endswith("warmup"):
        assert losses[-1] < losses[0]
    else:
        assert losses == pytest.approx(expected, rel=1e-5 if name.startswith("fp32") else 3e-2)
