"""Packages that only some commands need: the extras of setup.cfg."""

from __future__ import annotations

import importlib
from typing import Any

from gdyn.errors import UserError


def optional(module: str, extra: str = "prepare") -> Any:
    """A module of a package that may not be there. Raises: UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise UserError(f'this needs the Python package {missing}: pip install "gdyn[{extra}]" ({error}).') from None
