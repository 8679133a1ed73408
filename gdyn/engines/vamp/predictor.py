"""The first lobe as a program of its own: frames in, state probabilities out."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim

from gdyn.engine import Predictor
from gdyn.engines.vamp.lobes import Lobe

INPUTS = {
    "atom_types": "(atoms,) int64, atomic numbers",
    "target_index": "(targets,) int64, the atoms whose states are predicted",
    "nbr_lists": "(frames, atoms, neighbours) int32, neighbour indices",
    "nbr_dists": "(frames, atoms, neighbours) float32, distances, Å",
    "atom_directions": "(frames, atoms, 3) float32, ferro only",
}


class Positional(nn.Module):
    """A lobe with tensors instead of a dictionary for input."""

    def __init__(self, lobe: Lobe):
        super().__init__()
        self.lobe = lobe

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.lobe(dict(zip(INPUTS, tensors, strict=False)))


def predictor(lobe: Lobe) -> Predictor:
    """For any number of frames, atoms, targets and neighbours."""
    ferro = lobe.directions is not None
    frames, atoms, targets, neighbours = (Dim(name, min=2) for name in ("frames", "atoms", "targets", "neighbours"))
    shapes = ({0: atoms}, {0: targets}, *2 * ({0: frames, 1: atoms, 2: neighbours},), {0: frames, 1: atoms})
    count = 5 if ferro else 4
    return Predictor(
        network=Positional(lobe),
        example=_frames(4, 7, 3, 5)[:count],
        other=_frames(3, 9, 2, 4)[:count],
        # One entry for *tensors, which is a tuple.
        dynamic_shapes=(shapes[:count],),
        inputs=dict(list(INPUTS.items())[:count]),
        output="(frames, targets, states) float32 probabilities",
    )


def _frames(frames: int, atoms: int, targets: int, neighbours: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(1, 90, (atoms,), generator=generator),
        torch.arange(targets),
        torch.randint(0, atoms, (frames, atoms, neighbours), generator=generator, dtype=torch.int32),
        torch.rand(frames, atoms, neighbours, generator=generator) * 6,
        torch.rand(frames, atoms, 3, generator=generator),
    )
