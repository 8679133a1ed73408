"""The DeepSpeed JSON: what is refused, and how "auto" is filled."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gdyn import ds_config
from gdyn.ds_config import DsConfig
from gdyn.errors import MissingFile, UserError

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
    lr_schedule: object | None = None


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
    (
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}},
        Wishes(),
        ["optimizer.params.lr is not written", "optimization.learning_rate = 0.001"],
    ),
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
