"""The encoder: what is known of a residue and of its neighbours in space, as one vector per residue. foldtree2's
mk1_Encoder, with positions that are computed and norms per structure.

Legend: B structures, R residues of all of them one after the other, E edges, D embedding width, h channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.nn import GraphNorm

from gdyn.engines.monodecoder.layers import GraphAttention, neighbours, perceptron, positions_of, recompute
from gdyn.engines.monodecoder.layout import AMINO_ACIDS, POSITION_WIDTH, SPECTRUM_WIDTH
from gdyn.nn.ragged import owners


def input_block(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(width), *perceptron(width, 2 * hidden, hidden, bare=False))


class Features(nn.Module):
    """Raw features, places in the chain and spectra of the distance matrix to h channels per residue."""

    def __init__(self, features: int, hidden: int, dropout: float, positions: bool, spectra: bool):
        super().__init__()
        self.positions = positions
        self.norm = nn.LayerNorm(features)
        self.residues = input_block(features + positions * POSITION_WIDTH, hidden, dropout)
        self.spectra = input_block(2 * SPECTRUM_WIDTH, hidden, dropout) if spectra else None

    def forward(self, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """(R, h)."""
        x = self.norm(batch["features"].to(dtype))
        if self.positions:
            x = torch.cat([x, positions_of(batch["lengths"]).to(x.dtype)], 1)
        h = self.residues(x)
        return h if self.spectra is None else h + self.spectra(batch["spectra"].to(dtype))


class Convolution(nn.Module):
    """Attention over each kind of edges, their mean, GELU, and GraphNorm (Cai et al. 2021) of every structure by
    itself."""

    def __init__(self, c_in: int, c_out: int, heads: int, edges: Sequence[str], dropout: float):
        super().__init__()
        self.links = nn.ModuleList(GraphAttention(c_in, c_out, heads, dropout) for _ in edges)
        self.norm = GraphNorm(c_out)

    def forward(self, h_rc: Tensor, near: list[tuple[Tensor, Tensor]], owners_r: Tensor, structures: int) -> Tensor:
        """h (R, c_in) and, for every kind of edges, what `neighbours` returns. Returns (R, c_out)."""
        mixed = torch.stack([link(h_rc, *of) for link, of in zip(self.links, near, strict=True)]).mean(0)
        # Sums over a whole structure need more than 8 bits.
        return self.norm(nn.functional.gelu(mixed).float(), owners_r, structures).to(mixed.dtype)


class Readout(nn.Module):
    """What all convolutions saw (jumping knowledge) and the true amino acid to D numbers in (-1, 1)."""

    def __init__(self, kept: int, hidden: int, embedding_dim: int):
        super().__init__()
        self.kept = perceptron(kept, hidden, hidden, bare=False)
        self.out = perceptron(hidden + len(AMINO_ACIDS), hidden, hidden, embedding_dim)

    def forward(self, kept_rc: Tensor, amino_acids: Tensor) -> Tensor:
        h = self.kept(kept_rc)
        return self.out(torch.cat([h, amino_acids.to(h.dtype)], 1)).float().tanh()


class Encoder(nn.Module):
    """Batches of structures (see `Structures`) to vectors in (-1, 1)^D.

    `hidden` has the channels after the input and after each convolution, so at least two numbers; `edges` the kinds of
    edges; `checkpoint`: recompute the convolutions in the backward pass. Whatever holds for `features` holds for the
    output: if they do not change under rotation, neither does it.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        heads: int,
        embedding_dim: int,
        edges: Sequence[str],
        dropout: float,
        checkpoint: bool = False,
        positions: bool = True,
        spectra: bool = True,
    ):
        super().__init__()
        self.features, self.edges, self.checkpoint = features, tuple(edges), checkpoint
        self.input = Features(features, hidden[0], dropout, positions, spectra)
        self.body = nn.ModuleList(
            Convolution(c_in, c_out, heads, edges, dropout) for c_in, c_out in itertools.pairwise(hidden)
        )
        self.head = Readout(sum(hidden[1:]), hidden[-1], embedding_dim)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(R, D) float32."""
        lengths = batch["lengths"]
        h = self.input(batch, next(self.parameters()).dtype)
        near = [neighbours(batch[f"edges_{link}"], len(h)) for link in self.edges]
        owner = owners(lengths)
        kept = []
        for convolution in self.body:
            h = recompute(self.checkpoint, convolution, h, near, owner, len(lengths))
            kept.append(h)
        return self.head(torch.cat(kept, 1), batch["amino_acids"])
