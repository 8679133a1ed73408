"""The DeepSpeed JSON: read it, refuse what DeepSpeed would ignore, and fill its "auto" values for this run.

DeepSpeed owns its schema. What is checked here is what the trainer reasons with (micro-batch, accumulation, precision,
clipping, optimizer, schedule), the names of all keys, and the combinations that are known to fail late or silently.
Whether a machine can run it is asked in `gdyn.ds_machine`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gdyn.ds_keys import AUTO, OPTIMIZERS, REFUSED, REQUIRED, SCHEDULERS, SECTIONS, Section
from gdyn.errors import MissingFile, UserError

PRECISIONS = ("torch_autocast", "bf16", "fp16")
WARMUP_SHARE = 0.05  # of all optimizer steps, where the JSON says "auto"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class DsConfig:
    """A DeepSpeed JSON as written: `values` may still hold "auto". Messages name `path`."""

    path: Path
    values: dict[str, Any]

    def __str__(self) -> str:
        return str(self.path)


# Reading


def read(path: str | Path) -> DsConfig:
    """Read a JSON file; `check` says what is in it. Raises MissingFile or UserError."""
    path = Path(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f'{path}: "{twice[0]}" is written twice in one object; keep one.')
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg} "
            "(comments and trailing commas are not part of JSON)."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}).") from error
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: the DeepSpeed JSON does not exist.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a DeepSpeed config is one JSON object {{...}}, found {_shown(values)}.")
    return DsConfig(path, values)


# Checking


def check(config: DsConfig) -> list[str]:
    """Refuse unknown, removed and wrongly typed keys, and combinations that cannot work: one UserError, one line each.

    Returns warnings: what will run, but probably not as meant.
    """
    problems = list(_key_problems(config.values)) or list(_rule_problems(config.values))
    if problems:
        raise UserError("\n".join(f"{config}: {problem}" for problem in problems))
    return [f"{config}: {caution}" for caution in _cautions(config.values)]


def _sections(values: Values) -> Iterator[tuple[str, Values, Section]]:
    """Every object whose keys we know, with its dotted name and the names that may stand in it."""
    for name, known in SECTIONS.items():
        found = get(values, name) if name else values
        if isinstance(found, dict):
            yield name, found, known
    for name, table in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        params, kind = get(values, f"{name}.params"), _canonical(get(values, f"{name}.type"), table)
        if isinstance(params, dict) and kind:
            yield f"{name}.params", params, table[kind]


def _key_problems(values: Values) -> Iterator[str]:
    for section, found, known in _sections(values):
        for key, value in found.items():
            name = f"{section}.{key}" if section else key
            if name in REFUSED:
                yield f'"{name}": {REFUSED[name]}.'
            elif key not in known:
                yield f'unknown key "{name}"{_nearest(key, section, known)}.'
            elif value == "auto" and not known[key].accepts("auto"):
                if name not in AUTO:
                    yield f'"{name}" is "auto", which is filled only for {", ".join(AUTO)}; write a value.'
            elif not known[key].accepts(value):
                yield f'"{name}" is {_shown(value)}; expected {known[key].text}.'
    for name, table in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        kind = get(values, f"{name}.type")
        if isinstance(kind, str) and _canonical(kind, table) is None:
            yield f'unknown {name} "{kind}"; known: {", ".join(table)}.'


def _nearest(key: str, section: str, known: Section) -> str:
    """The way on from an unknown key: the name it resembles, or the section where it belongs."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), lower, n=1, cutoff=0.75)
    if close:
        return f'; did you mean "{lower[close[0]]}"'
    homes = [name or "the top level" for name, names in SECTIONS.items() if key in names and name != section]
    if homes:
        return f"; it belongs in {homes[0]}"
    return f"; known {'in ' + section if section else 'at the top level'}: {', '.join(sorted(known))}"


def _rule_problems(values: Values) -> Iterator[str]:
    stage, optimizer, scheduler = zero_stage(values), optimizer_type(values), scheduler_type(values)
    enabled = [f'"{name}"' for name in sorted(PRECISIONS) if get(values, f"{name}.enabled") is True]
    if len(enabled) > 1:
        yield f"both {' and '.join(enabled)} are enabled; keep one."
    if get(values, "torch_autocast.enabled", False) and "dtype" not in values["torch_autocast"]:
        yield '"torch_autocast.dtype" is missing; write "bfloat16" (torch would choose by device).'
    if "train_micro_batch_size_per_gpu" not in values:
        yield '"train_micro_batch_size_per_gpu" is missing; write a number, or "auto" to take optimization.batch_size.'
    if "gradient_clipping" not in values:
        yield '"gradient_clipping" is missing; DeepSpeed would clip at 1.0 silently. Write 1.0, or 0.0 for no clipping.'
    if optimizer is None:
        yield f'"optimizer" with a "type" is missing; known: {", ".join(OPTIMIZERS)}.'
    elif get(values, "optimizer.params.lr") is None and get(values, "optimizer.params.muon_lr") is None:
        yield '"optimizer.params.lr" is missing; write a number, or "auto" to take optimization.learning_rate.'
    if "scheduler" in values and scheduler is None:
        yield f'"scheduler" has no "type"; known: {", ".join(SCHEDULERS)}.'
    for key in REQUIRED.get(scheduler or "", ()):
        if get(values, f"scheduler.params.{key}") is None:
            yield f'"scheduler.params.{key}" is missing; {scheduler} needs it. Write a number or "auto".'
    if optimizer == "SGD" and stage > 0 and values.get("zero_allow_untested_optimizer") is not True:
        yield f'SGD with ZeRO stage {stage} needs "zero_allow_untested_optimizer": true.'
    if optimizer == "Muon" and stage == 3 and get(values, "zero_optimization.reduce_scatter") is not False:
        yield 'Muon with ZeRO stage 3 needs "reduce_scatter": false in "zero_optimization".'
    if stage == 0 and precision(values) == "bf16" and get(values, "data_types.grad_accum_dtype") == "fp32":
        yield '"data_types.grad_accum_dtype": "fp32" with "bf16" needs ZeRO stage 1 or more.'
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(values, key)
        if device != "none" and stage < lowest:
            yield f'"zero_optimization.{key}" needs "stage" {lowest} or more, found {stage}; it would be ignored.'
        if device == "nvme" and not get(values, f"zero_optimization.{key}.nvme_path"):
            yield f'"zero_optimization.{key}" on nvme needs "nvme_path".'


def _cautions(values: Values) -> Iterator[str]:
    stage, optimizer = zero_stage(values), optimizer_type(values)
    if optimizer == "Adam" and get(values, "optimizer.params.adam_w_mode", True):
        yield (
            'optimizer "Adam" without "adam_w_mode": false is AdamW in DeepSpeed; write "AdamW" if that is meant '
            "(with torch_adam its weight_decay is 0.01 where the JSON is silent)."
        )
    if optimizer == "Muon" and stage > 0 and clipping(values) > 0:
        yield (
            f"gradient_clipping {clipping(values):g} with Muon under ZeRO stage {stage} shrinks the orthogonalised "
            "update, not the gradient; 0.0 gives the same steps at every stage."
        )
    if precision(values) == "bf16" and stage == 0:
        yield '"bf16" at ZeRO stage 0 accumulates gradients in bf16; "torch_autocast" or stage 1 keeps fp32.'


# Completing


class Wishes(Protocol):
    """The run file's `optimization` section; None where it is silent."""

    @property
    def batch_size(self) -> int | None: ...
    @property
    def gradient_accumulation_steps(self) -> int | None: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def mixed_precision(self) -> bool | str | None: ...
    @property
    def lr_schedule(self) -> object | None: ...


def batch_sizes(config: DsConfig, batch_size: int | None, gradient_accumulation_steps: int | None) -> tuple[int, int]:
    """(samples per rank and micro-batch, micro-batches per window). UserError where JSON and run file disagree."""
    values = copy.deepcopy(config.values)
    # Nothing said about accumulation, in either place, means none.
    silent = values.setdefault("gradient_accumulation_steps", "auto") == "auto" and gradient_accumulation_steps is None
    _fill(config, values, "train_micro_batch_size_per_gpu", batch_size)
    _fill(config, values, "gradient_accumulation_steps", 1 if silent else gradient_accumulation_steps)
    return micro_batch(values), accumulation(values)


def complete(config: DsConfig, wishes: Wishes, total_steps: int | None = None) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, no "auto" left. Raises UserError where JSON and run file disagree.

    `wishes.mixed_precision` is "fp32", "bf16" or "fp16"; False is fp32 and True bf16. `total_steps`: optimizer steps of
    the whole run. DeepSpeed computes the global batch itself.
    """
    values = copy.deepcopy(config.values)
    if wishes.lr_schedule is not None and "scheduler" in values:
        raise UserError(
            f'{config}: "scheduler" is {scheduler_type(values)}, and the run file has optimization.lr_schedule; keep '
            "one of them."
        )
    micro, window = batch_sizes(config, wishes.batch_size, wishes.gradient_accumulation_steps)
    values |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": window}
    _fill_precision(config, values, wishes.mixed_precision)
    _fill(config, values, "optimizer.params.lr", wishes.learning_rate)
    for name in ("scheduler.params.warmup_max_lr", "scheduler.params.cycle_max_lr"):
        written = get(values, name)
        if written is not None:
            rate = get(values, "optimizer.params.lr") if written == "auto" else wishes.learning_rate
            _fill(config, values, name, rate)
    _fill_steps(config, values, total_steps)
    return values


def _fill(config: DsConfig, values: dict[str, Any], name: str, wish: float | None) -> None:
    """Put the run file's value where the JSON says "auto"; both silent, or each with its own value, is an error."""
    written = get(values, name)
    if written == "auto":
        if wish is None:
            raise UserError(f'{config}: {name} is "auto", and the run file has no {AUTO[name]}; write one of them.')
        if not wish > 0:
            raise UserError(f"{AUTO[name]} is {_shown(wish)}; expected a number above 0.")
        _put(values, name, wish)
    elif wish is not None and wish != written:
        found = "is not written" if written is None else f"= {_shown(written)}"
        raise UserError(
            f"{config}: {name} {found}, but the run file says {AUTO[name]} = {_shown(wish)}; "
            'remove the latter, or write "auto" in the JSON.'
        )


def _fill_precision(config: DsConfig, values: dict[str, Any], mixed: bool | str | None) -> None:
    wanted = ("bf16" if mixed else "fp32") if isinstance(mixed, bool) else mixed
    if wanted not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f'optimization.mixed_precision is {_shown(mixed)}; expected "fp32", "bf16" or "fp16".')
    if wanted in ("bf16", "fp16") and not any(name in values for name in PRECISIONS):
        # The JSON names no precision at all: autocast keeps parameters, gradients and optimizer in fp32.
        values["torch_autocast"] = {"enabled": "auto", "dtype": wanted}
    for name in PRECISIONS:
        if get(values, f"{name}.enabled") == "auto":
            if wanted is None:
                raise UserError(
                    f'{config}: {name}.enabled is "auto", and the run file has no optimization.mixed_precision; '
                    "write one of them."
                )
            means = _autocast_dtype(values) if name == "torch_autocast" else name
            _put(values, f"{name}.enabled", means == wanted and precision(values) == "fp32")
    found = precision(values)
    if wanted is not None and found.removeprefix("autocast-") != wanted:
        raise UserError(
            f"{config}: the precision is {found}, but the run file says optimization.mixed_precision = "
            f"{_shown(mixed)}; remove the latter, or choose another DeepSpeed JSON."
        )


def _fill_steps(config: DsConfig, values: dict[str, Any], total_steps: int | None) -> None:
    for key in ("total_num_steps", "warmup_num_steps"):
        name = f"scheduler.params.{key}"
        if get(values, name) == "auto":
            if total_steps is None:
                raise UserError(f'{config}: {name} is "auto", but the number of steps is not known; write a number.')
            _put(values, name, total_steps if key == "total_num_steps" else max(1, round(WARMUP_SHARE * total_steps)))


# The effective numbers, from a dict with or without "auto" left (numbers need it filled)


def get(values: Values, name: str, default: Any = None) -> Any:
    """The value under a dotted name, or the default where any part of the way is missing."""
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def micro_batch(values: Values) -> int:
    """Samples per rank and micro-batch."""
    return int(values["train_micro_batch_size_per_gpu"])


def accumulation(values: Values) -> int:
    """Micro-batches per optimizer step: the length of a window."""
    return int(values["gradient_accumulation_steps"])


def global_batch(values: Values, world_size: int) -> int:
    """Samples per optimizer step over all ranks."""
    return micro_batch(values) * accumulation(values) * world_size


def clipping(values: Values) -> float:
    """Largest gradient norm; 0 is no clipping."""
    return float(values["gradient_clipping"])


def zero_stage(values: Values) -> int:
    return int(get(values, "zero_optimization.stage", 0))


def precision(values: Values) -> str:
    """ "fp32", "bf16" or "fp16" (parameters in that type), "autocast-bf16" or "autocast-fp16" (fp32 parameters)."""
    for name in ("fp16", "bf16"):
        if get(values, f"{name}.enabled") is True:
            return name
    return f"autocast-{_autocast_dtype(values)}" if get(values, "torch_autocast.enabled") is True else "fp32"


def optimizer_type(values: Values) -> str | None:
    """As spelt in our tables ("AdamW" for "adamw"), or None."""
    return _canonical(get(values, "optimizer.type"), OPTIMIZERS)


def scheduler_type(values: Values) -> str | None:
    return _canonical(get(values, "scheduler.type"), SCHEDULERS)


def offload_device(values: Values, key: str) -> str:
    """ "none", "cpu" or "nvme" for key "offload_optimizer" or "offload_param"."""
    return str(get(values, f"zero_optimization.{key}.device", "none"))


def _autocast_dtype(values: Values) -> str:
    return "fp16" if get(values, "torch_autocast.dtype") in ("float16", "fp16", "half", "torch.float16") else "bf16"


def _canonical(kind: Any, table: Mapping[str, Section]) -> str | None:
    """DeepSpeed takes its own optimizers in any case; torch's (SGD) and the schedulers as spelt."""
    if not isinstance(kind, str):
        return None
    if table is OPTIMIZERS and kind.lower() != "sgd":
        return {name.lower(): name for name in table}.get(kind.lower())
    return kind if kind in table else None


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *way, last = name.split(".")
    for part in way:
        values = values[part]
    values[last] = value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
