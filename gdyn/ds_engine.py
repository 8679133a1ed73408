"""What surrounds a DeepSpeed engine's life: which parameters it trains, and letting it go."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from gdyn.errors import UserError
from gdyn.phases import Phase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def trainable(model: nn.Module, phase: Phase) -> list[str]:
    """Names of the parameters a phase trains.

    Raises: UserError if its globs match none.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in phase.trains)]
    if not chosen:
        raise UserError(
            f"phase {phase.label}: trains {list(phase.trains)} matches no parameter; the first are "
            f"{', '.join(names[:3])}."
        )
    return chosen


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers these parameters are, also where ZeRO-3 has partitioned them, which makes them look empty."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def release(ds: DeepSpeedEngine) -> None:
    """Destroy `ds`, and what `destroy` leaves behind: hooks on the module and references to the optimizer would keep
    every phase's engine alive."""
    ds.destroy()
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if getattr(ds, hook, None) is not None:
            getattr(ds, hook).remove()
    ds.optimizer = ds.basic_optimizer = ds.lr_scheduler = None
    gc.collect()
