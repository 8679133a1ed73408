"""The engines. One import line each; importing is registering."""

from gdyn.engines.vamp.engine import Vamp

__all__ = ["Vamp"]
