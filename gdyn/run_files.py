"""A run file as plain values, for login nodes: `gdyn.config`, which knows every key, imports torch. YAML only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gdyn import gdynet
from gdyn.errors import MissingFile, UserError
from gdyn.rundir import RunDir

KEYS = (
    *("engine", "deepspeed", "run_dir", "phases", "loss_schedule", "epochs", "seed", "resume", "init_from"),
    *("allow_schedule_change", "optimization", "checkpointing", "logging", "wandb", "report", "export", "workers"),
    *("wall_time", "hang_timeout", "limit_windows", "overfit_windows", "preflight"),
)
"""What may stand at the top of a run file: the fields of RunConfig, which imports torch; a test compares."""


_SUPERVISORS_OWN = re.compile(r"\{(nodes|ranks|hosts)\}")


def read(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The run file as plain values, with `changes` applied; one of the original GDyNet is translated.

    Raises: MissingFile, UserError naming file and key.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist; give a run file (YAML).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; a run file is keys and values.")
    if "model_type" in content and "engine" not in content:
        content = gdynet.translate(content, str(path))
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        raise UserError(f'{path}: unknown key "{unknown[0]}"; known: {", ".join(KEYS)}.')
    for text in changes:
        _change(content, text)
    return content


def _change(content: dict[str, Any], text: str) -> None:
    """Apply one --set: a dotted key and a YAML value. `engine.tau` means engine.init_args.tau, as in `gdyn train`."""
    name, equals, value = text.partition("=")
    words = name.split(".")
    if not equals or not all(words):
        raise UserError(f'--set "{text}": expected key=value, e.g. optimization.batch_size=64.')
    if words[0] not in KEYS:
        raise UserError(f'--set "{text}": unknown key "{words[0]}"; known: {", ".join(KEYS)}.')
    if words[0] == "engine" and len(words) > 1 and words[1] not in ("class_path", "init_args"):
        words.insert(1, "init_args")
    place: Any = content
    for i, word in enumerate(words[:-1]):
        if place.get(word) is None:
            place[word] = {}
        place = place[word]
        if isinstance(place, list):
            raise UserError(
                f'--set "{text}": {".".join(words[: i + 1])} is a list; items of a list cannot be set one by one. Set '
                "all of it, or edit the run file."
            )
        if not isinstance(place, dict):
            raise UserError(f'--set "{text}": {".".join(words[: i + 1])} is one value ({place}), not a section.')
    try:
        place[words[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f'--set "{text}": "{value}" is not a YAML value; quote it.') from None


def run_folder(content: Mapping[str, Any], source: Path) -> RunDir:
    """Where a run file's results go. Raises: UserError."""
    path = Path(text(content, "run_dir", source)).expanduser().absolute()
    if _SUPERVISORS_OWN.search(str(path)):
        raise UserError(f"{source}: run_dir {path} holds {{nodes}}, {{ranks}} or {{hosts}}, which the script fills in.")
    return RunDir(path)


def text(content: Mapping[str, Any], key: str, source: Path) -> str:
    if not isinstance(content.get(key), str) or not content[key]:
        raise UserError(f"{source}: {key} is {content.get(key)!r}; expected a name or path.")
    return str(content[key])
