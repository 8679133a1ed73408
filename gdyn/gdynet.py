"""Run files of the original GDyNet trainer, translated so that they train unmodified. Pure but for reading YAML.

Original: sections model, data, training, optimization, checkpointing, wandb, output under a `model_type`; the command
line `--config FILE --mode train|evaluate [--output DIR] [--resume CHECKPOINT]`.
"""

from __future__ import annotations

import difflib
import random
from pathlib import Path
from typing import Any

import yaml

from gdyn.errors import MissingFile, UserError

MODEL_TYPES = {"gdynet_vanilla": "vanilla", "gdynet_ferro": "ferro"}
ENGINE_KEYS = ("tau", "cutoff", "num_gaussians", "epsilon", "mode", "atom_fea_len", "n_conv", "state_len")
KNOWN = {
    "model": (*ENGINE_KEYS, "batch_size", "learning_rate"),
    "data": ("train_fnames", "val_fnames", "test_fnames"),
    "training": ("epochs", "loss_schedule", "seed"),
    "optimization": ("torch_compile", "compile_mode", "torchscript", "mixed_precision"),
    "checkpointing": ("frequency", "save_best_only"),
    "wandb": ("enabled", "project", "entity", "run_name"),
    "output": ("folder",),
}
# The original's phase "vamp1" applies the gradient of the symmetrised score.
OBJECTIVES = {"vamp1": "vamp_sym", "vamp2": "vamp2"}


def translate_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """(arguments for our parser, notices) from arguments whose run file comes first. Anything but a GDyNet run file
    passes through unchanged.

    Raises: MissingFile, UserError naming file and key.
    """
    if argv[:1] != ["--config"] or len(argv) < 2:
        return argv, []
    source, rest = argv[1], argv[2:]
    content = _read(source)
    if "model_type" not in content or "engine" in content:
        return argv, []
    translated = yaml.safe_dump(translate(content, source))
    rest = ["--run_dir" if word == "--output" else word.replace("--output=", "--run_dir=") for word in rest]
    notice = (
        f'{source} is a GDyNet run file: translated; its phase "vamp1" is objective vamp_sym, and atoms are '
        "normalised one by one "
        "(--engine.norm batch restores the original)."
    )
    return ["--config", translated, *rest], [notice]


def translate(old: dict[str, Any], source: str) -> dict[str, Any]:
    """A GDyNet run file as ours, in plain dictionaries."""
    _check(old, source)
    model, data, training = (old.get(name) or {} for name in ("model", "data", "training"))
    optimization, checkpointing = old.get("optimization") or {}, old.get("checkpointing") or {}
    if not data.get("train_fnames") or not data.get("val_fnames"):
        raise UserError(f"{source}: data.train_fnames and data.val_fnames must name the trajectories.")
    schedule = training.get("loss_schedule", ["vamp2", "vamp1", "vamp2"])
    for word in schedule:
        if word not in OBJECTIVES:
            raise UserError(f'{source}: training.loss_schedule has "{word}"; known: vamp1, vamp2.')
    seed = training.get("seed", 1234)
    mixed = bool(optimization.get("mixed_precision"))
    splits = {"train": data["train_fnames"], "validation": data["val_fnames"], "test": data.get("test_fnames")}
    arguments = {split: paths for split, paths in splits.items() if paths}
    arguments |= {"model_type": MODEL_TYPES[old["model_type"]]} | {
        key: model[key] for key in ENGINE_KEYS if key in model
    }
    return {
        "engine": {"class_path": "Vamp", "init_args": arguments},
        "deepspeed": "bf16_zero0" if mixed else "fp32_zero0",
        "run_dir": (old.get("output") or {}).get("folder", f"./output/{old['model_type']}"),
        "loss_schedule": [OBJECTIVES[word] for word in schedule],
        "epochs": training.get("epochs", 30),
        "seed": random.SystemRandom().randrange(2**31) if seed is None else seed,
        "optimization": {
            "batch_size": model.get("batch_size", 32),
            "learning_rate": model.get("learning_rate", 1e-3),
            "torch_compile": bool(optimization.get("torch_compile")),
            "compile_mode": optimization.get("compile_mode", "default"),
        },
        "checkpointing": {
            "every_epochs": checkpointing.get("frequency", 1),
            "save_best_only": bool(checkpointing.get("save_best_only")),
            # The original keeps every checkpoint it writes.
            "keep": 1_000_000,
        },
        "logging": {"style": "gdynet"},
        "wandb": old.get("wandb") or {},
        "export": bool(optimization.get("torchscript")),
    }


def _check(old: dict[str, Any], source: str) -> None:
    if old["model_type"] not in MODEL_TYPES:
        raise UserError(f'{source}: model_type "{old["model_type"]}" is unknown; choose {" or ".join(MODEL_TYPES)}.')
    for section, content in old.items():
        if section == "model_type":
            continue
        if section not in KNOWN:
            raise UserError(f'{source}: unknown section "{section}".{_nearest(section, list(KNOWN))}')
        if not isinstance(content, dict | None):
            raise UserError(f"{source}: {section} is {content!r}; keys and values expected.")
        for key in content or {}:
            if key not in KNOWN[section]:
                raise UserError(f'{source}: unknown key "{section}.{key}".{_nearest(key, list(KNOWN[section]))}')


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(known)}."


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    try:
        if path.is_dir():
            raise UserError(f"run file {source} is a folder; give the YAML file in it.")
        if not path.is_file():
            raise MissingFile(f"run file {source} does not exist.")
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is not a text file; a run file is YAML.") from None
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{source} is {found}; a run file is YAML with keys and values, such as engine and run_dir.")
    return content
