"""The engines. One import line each; importing is registering."""

from gdyn.engines.diffusion.engine import Diffusion
from gdyn.engines.monodecoder.engine import Monodecoder
from gdyn.engines.vamp.engine import Vamp

__all__ = ["Diffusion", "Monodecoder", "Vamp"]
