"""The baseline: the network of gdyn.engines.monodecoder on HeteroData objects, in plain PyTorch Geometric, the way
foldtree2 does it: one graph object per structure joined into batches by the stock loader, messages on edge lists, a
transformer over sequences padded in a loop, convolutions of the geometry decoder protein by protein, losses as means,
and a codebook that moves in the forward pass.

foldtree2's defects are left out, so that both networks can be the same function: GraphNorm has the batch vector, the
transformer a padding mask, angles are those of a vector. `load` gives a network gdyn's parameters.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import h5py
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import GraphNorm, TransformerConv
from torch_geometric.utils import batched_negative_sampling

NODES = ("res", "AA", "coords", "bondangles", "ss", "positions", "fourier1dr", "fourier1di", "fourier2dr", "fourier2di")
CONTACTS = ("res", "contactPoints", "res")
POSITIONS, SPECTRUM, SPECTRUM_2D = 256, 160, 2600


class StructureGraphs(torch.utils.data.Dataset):
    """One HeteroData per structure of an HDF5 file, read when it is asked for; with `in_memory` only the first time."""

    def __init__(self, path: Path, in_memory: bool):
        self.file = h5py.File(path, "r", locking=False)
        self.identifiers = self.file["index/identifier"].asstr()[()].tolist()
        self.kept: dict[int, HeteroData] | None = {} if in_memory else None

    def __len__(self) -> int:
        return len(self.identifiers)

    def __getitem__(self, i: int) -> HeteroData:
        if self.kept is None:
            return self.graph(i)
        if i not in self.kept:
            self.kept[i] = self.graph(i)
        return self.kept[i]

    def graph(self, i: int) -> HeteroData:
        group = self.file["structs"][self.identifiers[i]]
        data = HeteroData()
        for kind in NODES:
            data[kind].x = torch.from_numpy(group["node"][kind]["x"][:])
        for kind in ("fourier1d", "fourier2d"):
            size, phase = torch.log1p(data[f"{kind}r"].x), data[f"{kind}i"].x
            data[f"{kind}r"].x, data[f"{kind}i"].x = size * phase.cos(), size * phase.sin()
        data[CONTACTS].edge_index = torch.from_numpy(group["edge"]["_".join(CONTACTS)]["edge_index"][:])
        return data


# -- the network ------------------------------------------------------------------------------------------------------


def mlp(*widths: int, bare: bool = True) -> nn.Sequential:
    """Behind the last Linear of a `bare` one nothing comes."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.GELU(), nn.LayerNorm(following)]
    return nn.Sequential(*layers[: -2 if bare else None])


def block(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(width), *mlp(width, 2 * hidden, hidden, bare=False))


class HeteroEncoder(nn.Module):
    def __init__(self, features: int, hidden: list[int], heads: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.residues = block(features + POSITIONS, hidden[0], dropout)
        self.spectra = block(SPECTRUM, hidden[0], dropout)
        self.convolutions = nn.ModuleList(
            TransformerConv(c_in, c_out, heads, concat=False, dropout=dropout)
            for c_in, c_out in itertools.pairwise(hidden)
        )
        self.norms = nn.ModuleList(GraphNorm(width) for width in hidden[1:])
        self.kept = mlp(sum(hidden[1:]), hidden[-1], hidden[-1], bare=False)
        self.out = mlp(hidden[-1] + 20, hidden[-1], hidden[-1], embedding_dim)

    def forward(self, data: Batch) -> Tensor:
        h = self.residues(torch.cat([self.norm(data["res"].x), data["positions"].x], 1))
        h = h + self.spectra(torch.cat([data["fourier1dr"].x, data["fourier1di"].x], 1))
        kept = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = norm(F.gelu(convolution(h, data[CONTACTS].edge_index)), data["res"].batch, data.num_graphs)
            kept.append(h)
        return self.out(torch.cat([self.kept(torch.cat(kept, 1)), data["AA"].x], 1)).tanh()


class Codebook(nn.Module):
    """Codes as moving averages, updated in each forward pass of training."""

    def __init__(self, codes: int, dim: int, decay: float = 0.99, epsilon: float = 1e-5):
        super().__init__()
        self.decay, self.epsilon = decay, epsilon
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes with the gradient passed straight through, commitment loss)."""
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        codebook = self.sums / smoothed[:, None]
        flat = x.detach()
        distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        chosen = F.one_hot(distances.argmin(1), len(codebook)).to(x.dtype)
        quantized = chosen @ codebook
        if self.training:
            self.counts.mul_(self.decay).add_(chosen.sum(0), alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(chosen.T @ flat, alpha=1 - self.decay)
        return x + (quantized - x).detach(), F.mse_loss(x, quantized)


class SequenceTransformer(nn.Module):
    """Amino acids and secondary structure."""

    def __init__(self, inputs: int, hidden: int, heads: int, feed_forward: int, dropout: float):
        super().__init__()
        self.input = nn.Sequential(nn.Dropout(dropout), *mlp(inputs, hidden, hidden, bare=False), nn.Tanh())
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, feed_forward, dropout, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(hidden)
        widths = (hidden, hidden, hidden, hidden // 2)
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        self.amino_acids = nn.Conv1d(hidden // 2, 20, 1)
        self.secondary = mlp(hidden, hidden, hidden, hidden // 2, 3)

    def forward(self, x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        h = self.input(x)
        chains = [h[batch == i] for i in range(int(batch[-1]) + 1)]
        padded = h.new_zeros(len(chains), max(map(len, chains)), h.shape[1])
        real = torch.zeros(padded.shape[:2], dtype=torch.bool)
        for i, chain in enumerate(chains):
            padded[i, : len(chain)] = chain
            real[i, : len(chain)] = True
        for layer in self.layers:
            padded = layer(padded, src_key_padding_mask=~real)
        padded = self.norm(padded)
        channels = padded.transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            channels = norm(F.gelu(convolution(channels * real[:, None])).transpose(1, 2)).transpose(1, 2)
        return self.amino_acids(channels).transpose(1, 2)[real], self.secondary(padded)[real]


class GeometryCNN(nn.Module):
    """Unit vectors of the residues, their contacts, distances and angles."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        half, quarter = hidden // 2, hidden // 4
        self.input = mlp(inputs, hidden, hidden, bare=False)
        widths = (hidden, hidden, half, half)
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        self.vectors = mlp(half, half, quarter, quarter)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.distances = nn.Sequential(nn.LayerNorm(2 * quarter), *mlp(2 * quarter, half, quarter, quarter, 8))
        self.angles = mlp(half, half, quarter, 6)

    def forward(self, x: Tensor, batch: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(angles, logits of contact, logits of distance of the pairs)."""
        h = self.input(x)
        h = torch.cat([self.convolve(h[batch == i]) for i in range(int(batch[-1]) + 1)])
        u = F.normalize(self.vectors(h), dim=1, eps=1e-6)
        sine, cosine = self.angles(h).chunk(2, 1)
        angles = torch.atan2(sine, cosine)
        if pairs is None:
            return angles, None, None
        u_i, u_j = u[pairs[0]], u[pairs[1]]
        distances = (self.distances(torch.cat([u_i, u_j], 1)) + self.distances(torch.cat([u_j, u_i], 1))) / 2
        return angles, self.scale * (u_i * u_j).sum(1) + self.bias, distances

    def convolve(self, chain: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            chain = norm(F.gelu(convolution(chain.T[None])[0].T))
        return chain


class HeteroAutoencoder(nn.Module):
    """`heads` of the graph convolutions, `sequence_heads` of the transformer. `runs`: how often a step runs the
    decoders, once, or three times as foldtree2 does: without pairs, for the contacts and for the others."""

    def __init__(
        self,
        features: int,
        hidden: list[int],
        heads: int,
        embedding_dim: int,
        codes: int,
        sequence_heads: int,
        feed_forward: int,
        dropout: float,
        runs: int,
    ):
        super().__init__()
        self.encoder = HeteroEncoder(features, hidden, heads, embedding_dim, dropout)
        self.codebook = Codebook(codes, embedding_dim)
        inputs, self.runs = embedding_dim + POSITIONS, runs
        self.sequence = SequenceTransformer(inputs, hidden[-1], sequence_heads, feed_forward, dropout)
        self.geometry = GeometryCNN(inputs, hidden[-1])
        self.norm = nn.LayerNorm(embedding_dim)
        self.spectrum = mlp(embedding_dim, hidden[-1], hidden[-1], SPECTRUM_2D)

    def forward(self, data: Batch, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Logits and values, those of pairs as (contacts, others); commitment is a loss."""
        z, commitment = self.codebook(self.encoder(data))
        z = self.norm(z)
        if self.runs == 1:
            decoded = self.decode(data, z, torch.cat([positive, negative], 1))
            for name in ("contact", "distance"):
                decoded[f"{name}_positive"], decoded[f"{name}_negative"] = decoded.pop(name).split(
                    [positive.shape[1], negative.shape[1]]
                )
        else:
            decoded = self.decode(data, z, None)
            for sign, pairs in (("positive", positive), ("negative", negative)):
                of_pairs = self.decode(data, z, pairs)
                decoded |= {f"{name}_{sign}": of_pairs[name] for name in ("contact", "distance")}
        return decoded | {"commitment": commitment}

    def decode(self, data: Batch, z: Tensor, pairs: Tensor | None) -> dict[str, Tensor]:
        batch = data["res"].batch
        x = torch.cat([z, data["positions"].x], 1)
        amino_acids, secondary = self.sequence(x, batch)
        angles, contact, distance = self.geometry(x, batch, pairs)
        mean = z.new_zeros(data.num_graphs, z.shape[1]).index_add(0, batch, z) / batch.bincount()[:, None]
        decoded = {"aa": amino_acids, "ss": secondary, "angles": angles, "fft2": self.spectrum(mean)}
        return decoded if contact is None else decoded | {"contact": contact, "distance": distance}


# -- a step -----------------------------------------------------------------------------------------------------------


def sample(data: Batch) -> tuple[Tensor, Tensor]:
    """(contacts, about as many pairs per graph that are none), each pair once."""
    edges = data[CONTACTS].edge_index
    others = batched_negative_sampling(edges, data["res"].batch, force_undirected=True)
    return edges[:, edges[0] < edges[1]], others[:, others[0] < others[1]]


def losses(decoded: dict[str, Tensor], data: Batch, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
    """Each a mean."""
    contact = [decoded["contact_positive"], decoded["contact_negative"]]
    targets = [torch.ones_like(contact[0]), torch.zeros_like(contact[1])]
    boundaries = torch.linspace(5, 50, 7).square()
    logit = torch.zeros(())
    for sign, (i, j) in (("positive", positive), ("negative", negative)):
        squares = (data["coords"].x[i] - data["coords"].x[j]).square().sum(1)
        logit = logit + F.cross_entropy(decoded[f"distance_{sign}"], torch.bucketize(squares, boundaries))
    defined = data["bondangles"].x != 0
    difference = (decoded["angles"] - data["bondangles"].x)[defined]
    difference = torch.atan2(difference.sin(), difference.cos())
    return {
        "aa": F.cross_entropy(decoded["aa"], data["AA"].x),
        "edge": sum(map(F.binary_cross_entropy_with_logits, contact, targets), torch.zeros(())),
        "logit": logit,
        "ss": F.cross_entropy(decoded["ss"], data["ss"].x),
        "angles": F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.5),
        "fft2": F.smooth_l1_loss(decoded["fft2"], torch.cat([data["fourier2dr"].x, data["fourier2di"].x], 1)),
        "vq": decoded["commitment"],
    }


# -- gdyn's parameters ------------------------------------------------------------------------------------------------

NAMES = (
    (r"encoder\.(input|head)\.", "encoder."),
    (r"encoder\.body\.(\d)\.links\.0\.", r"encoder.convolutions.\1."),
    (r"encoder\.body\.(\d)\.norm\.", r"encoder.norms.\1."),
    (r"quantizer\.", "codebook."),
    (r"decoders\.geometry\.head\.contacts\.", "geometry."),
    (r"decoders\.sequence\.body\.(\d)\.", r"sequence.layers.\1."),
    (r"decoders\.(sequence|geometry)\.input\.", r"\1.input."),
    (r"decoders\.(sequence|geometry)\.(body|head)\.", r"\1."),
    (r"decoders\.(spectrum|norm)\.", r"\1."),
    (r"convolutions\.(linears|norms)\.", lambda match: {"linears": "convolutions.", "norms": "norms."}[match[1]]),
    (r"(layers\.\d)\.out\.", r"\1.self_attn.out_proj."),
    (r"(layers\.\d)\.norm_attention\.", r"\1.norm1."),
    (r"(layers\.\d)\.norm_feed_forward\.", r"\1.norm2."),
    (r"(layers\.\d)\.feed_forward\.0\.", r"\1.linear1."),
    (r"(layers\.\d)\.feed_forward\.3\.", r"\1.linear2."),
)
"""What gdyn calls a parameter, and what it is called here."""


def translated(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """gdyn's parameters, or their gradients, under the names and in the shapes of a HeteroAutoencoder."""
    ours = {}
    for name, tensor in theirs.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        if re.search(r"convolutions\.\d\.weight$", name):  # rows of [before, here, behind]
            tensor = tensor.unflatten(1, (3, -1)).transpose(1, 2)
        elif name == "sequence.amino_acids.weight":
            tensor = tensor[:, :, None]
        ours[name] = tensor
    for layer in {match[0] for match in (re.match(r"sequence\.layers\.\d\.", name) for name in ours) if match}:
        ours[f"{layer}key.bias"] = torch.zeros_like(ours[f"{layer}query.bias"])
        for kind in ("weight", "bias"):
            rows = [ours.pop(f"{layer}{part}.{kind}") for part in ("query", "key", "value")]
            ours[f"{layer}self_attn.in_proj_{kind}"] = torch.cat(rows)
    return ours


def load(network: HeteroAutoencoder, theirs: Mapping[str, Tensor]) -> None:
    """Biases that gdyn does without, those of the keys and of the convolutions' values, become zero.

    Raises: KeyError where a parameter has no counterpart.
    """
    found = translated(theirs)
    for name, tensor in network.state_dict().items():
        without = re.search(r"lin_(key|value)\.bias$", name)
        tensor.copy_(torch.zeros_like(tensor) if without else found[name])
