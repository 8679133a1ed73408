"""The decoders: what the letters of a structure say of its sequence, geometry, spectrum and energies. foldtree2's
MultiMonoDecoder, in one pass and with every structure by itself.

Legend: B structures, R residues of all of them one after the other, L of one, D embedding width, P pairs of residues.
z (R, D) are the vectors of the letters; u (R, h / 4) unit vectors, close for residues in contact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.engines.monodecoder.layers import ChainConvolutions, SelfAttention, perceptron, positions_of, recompute
from gdyn.engines.monodecoder.layout import (
    AMINO_ACIDS,
    FOLDX_WIDTH,
    POSITION_WIDTH,
    SECONDARY,
    SPECTRUM_2D_WIDTH,
)
from gdyn.nn.ragged import places, sum_samples

DISTANCE_CLASSES = 8


def divisor(width: int, heads: int) -> int:
    """The largest divisor of width that is at most heads: attention needs one, and foldtree2's 5 divides few widths."""
    return max(d for d in range(1, heads + 1) if width % d == 0)


class Sequence(nn.Module):
    """Amino acids and secondary structure: a transformer over each structure, then a convolution for the amino acids
    and a perceptron for the secondary structure."""

    def __init__(self, inputs: int, hidden: int, heads: int, dropout: float, feed_forward: int, checkpoint: bool):
        super().__init__()
        self.checkpoint = checkpoint
        self.input = nn.Sequential(nn.Dropout(dropout), *perceptron(inputs, hidden, hidden, bare=False), nn.Tanh())
        self.body = nn.ModuleList(
            SelfAttention(hidden, divisor(hidden, heads), feed_forward, dropout) for _ in range(2)
        )
        self.head = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(hidden),
                "convolutions": ChainConvolutions(hidden, hidden, hidden, hidden // 2),
                "amino_acids": nn.Linear(hidden // 2, len(AMINO_ACIDS)),
                "secondary": perceptron(hidden, hidden, hidden, hidden // 2, len(SECONDARY)),
            }
        )

    def forward(self, x_rc: Tensor, lengths_b: Tensor, follows_r: Tensor) -> dict[str, Tensor]:
        """aa_logits (R, 20), ss_logits (R, 3)."""
        h = self.input(x_rc)
        for layer in self.body:
            h = recompute(self.checkpoint, layer, h, lengths_b)
        h = self.head["norm"](h)
        return {
            "aa_logits": self.head["amino_acids"](self.head["convolutions"](h, follows_r)).float(),
            "ss_logits": self.head["secondary"](h).float(),
        }


class Contacts(nn.Module):
    """Logits of contact, a cos(u_i, u_j) + b. foldtree2's a = 1 and b = 0 keep all probabilities between 0.27 and 0.73,
    and learned from there they hardly move; these starts reach from 0.00001 to 0.98."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 8.0))
        self.bias = nn.Parameter(torch.full((1,), -4.0))

    def forward(self, cosines: Tensor) -> Tensor:
        return self.scale * cosines + self.bias


class Geometry(nn.Module):
    """Contacts, distances and backbone angles, from convolutions along the chain."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        half, quarter = hidden // 2, hidden // 4
        self.input = perceptron(inputs, hidden, hidden, bare=False)
        self.body = nn.ModuleDict(
            {
                "convolutions": ChainConvolutions(hidden, hidden, half, half),
                "vectors": perceptron(half, half, quarter, quarter),
            }
        )
        self.head = nn.ModuleDict(
            {
                "contacts": Contacts(),
                "distances": nn.Sequential(
                    nn.LayerNorm(2 * quarter), *perceptron(2 * quarter, half, quarter, quarter, DISTANCE_CLASSES)
                ),
                "angles": perceptron(half, half, quarter, 6),
            }
        )

    def forward(self, x_rc: Tensor, follows_r: Tensor, pairs_2p: Tensor) -> dict[str, Tensor]:
        """contact_logits (P,) and distance_logits (P, 8), the same for (i, j) as for (j, i); angles (R, 3), radians."""
        h, u = self.embed(x_rc, follows_r)
        u_i, u_j = (u.index_select(0, ends) for ends in pairs_2p)
        both_ways = torch.stack([torch.cat([u_i, u_j], 1), torch.cat([u_j, u_i], 1)]).to(h.dtype)
        return {
            "contact_logits": self.head["contacts"]((u_i * u_j).sum(1)),
            "distance_logits": self.head["distances"](both_ways).float().mean(0),
            "angles": angle(*self.head["angles"](h).float().chunk(2, 1)),
        }

    def embed(self, x_rc: Tensor, follows_r: Tensor) -> tuple[Tensor, Tensor]:
        """What the chain says at each residue, (R, h / 2), and the unit vectors u, float32."""
        h = self.body["convolutions"](self.input(x_rc), follows_r)
        return h, F.normalize(self.body["vectors"](h).float(), dim=1, eps=1e-6)


def angle(sine: Tensor, cosine: Tensor) -> Tensor:
    """The angle of the vector (cosine, sine) of any length, radians; 0, and a finite slope, for the zero vector."""
    tiny = sine.square() + cosine.square() < 1e-8
    return torch.atan2(sine, torch.where(tiny, 1.0, cosine))


class Decoders(nn.Module):
    """All decoders at once, from the letters' vectors and the places in the chain. `heads` is the most heads
    `divisor` may choose; `feed_forward` the inner width of the transformer layers."""

    def __init__(
        self,
        embedding_dim: int,
        hidden: int,
        heads: int,
        dropout: float,
        spectrum: bool,
        foldx: bool,
        checkpoint: bool = False,
        feed_forward: int = 2048,
    ):
        super().__init__()
        inputs = embedding_dim + POSITION_WIDTH
        # Codes start small, and beside the positions nothing would be seen of them.
        self.norm = nn.LayerNorm(embedding_dim)
        self.sequence = Sequence(inputs, hidden, heads, dropout, feed_forward, checkpoint)
        self.geometry = Geometry(inputs, hidden)
        self.spectrum = perceptron(embedding_dim, hidden, hidden, 2 * SPECTRUM_2D_WIDTH) if spectrum else None
        self.foldx = perceptron(embedding_dim, hidden, hidden, FOLDX_WIDTH) if foldx else None

    def forward(self, z_rd: Tensor, lengths_b: Tensor, pairs_2p: Tensor) -> dict[str, Tensor]:
        """What `Sequence` and `Geometry` return, spectrum_2d (B, 2600) and foldx (B, 23); all float32."""
        x, follows = self._inputs(z_rd, lengths_b)
        z = x[:, : z_rd.shape[1]]
        decoded = self.sequence(x, lengths_b, follows) | self.geometry(x, follows, pairs_2p)
        mean = (sum_samples(z.float(), lengths_b) / lengths_b[:, None]).to(x.dtype)
        if self.spectrum is not None:
            decoded["spectrum_2d"] = self.spectrum(mean).float()
        if self.foldx is not None:
            decoded["foldx"] = self.foldx(mean).float()
        return decoded

    def contact_probabilities(self, z_rd: Tensor, lengths_b: Tensor) -> list[Tensor]:
        """For every structure the probability of contact of each pair of residues, (L, L), symmetric."""
        _, u = self.geometry.embed(*self._inputs(z_rd, lengths_b))
        contacts = self.geometry.head["contacts"]
        return [contacts(own @ own.T).sigmoid() for own in u.split(lengths_b.tolist())]

    def _inputs(self, z_rd: Tensor, lengths_b: Tensor) -> tuple[Tensor, Tensor]:
        """z, normalised, and positions side by side; false where a chain begins, (R,)."""
        z = self.norm(z_rd.to(self.norm.weight.dtype))
        return torch.cat([z, positions_of(lengths_b).to(z.dtype)], 1), places(lengths_b) > 0
