"""The network as a whole: structures to letters and back.

Legend: B structures, R residues of all of them one after the other, D embedding width, P pairs of residues.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdyn.engines.monodecoder.decoders import Decoders
from gdyn.engines.monodecoder.encoder import Encoder
from gdyn.engines.monodecoder.quantizer import Quantizer


class Autoencoder(nn.Module):
    """Encoder, quantizer and decoders."""

    steps_done: Tensor
    """() int64, finished optimizer steps: schedules and sampled pairs depend on it, so it travels with the weights."""

    def __init__(self, encoder: Encoder, quantizer: Quantizer, decoders: Decoders):
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoders = decoders
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Tensor], pairs_2p: Tensor) -> dict[str, Tensor]:
        """What `Decoders` returns, and encoded (R, D), quantized (R, D), codes (R,) int64. The decoders' gradient
        passes the quantizer straight through to the encoder (van den Oord et al. 2017)."""
        encoded = self.encoder(batch)
        quantized, codes = self.quantizer(encoded)
        z = encoded + (quantized - encoded).detach()
        return self.decoders(z, batch["lengths"], pairs_2p) | {
            "encoded": encoded,
            "quantized": quantized,
            "codes": codes,
        }

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The letter of every residue, (R,) int64."""
        codes: Tensor = self.quantizer(self.encoder(batch))[1]
        return codes
