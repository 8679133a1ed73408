"""How well structures come back from their letters: everything measured once over a whole set, and beside each score
what one gets without a structure.

Legend: N structures, R residues of all of them one after the other, L residues of one, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gdyn.engines.monodecoder.layout import AMINO_ACIDS, SECONDARY
from gdyn.engines.monodecoder.losses import confident

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gdyn.engines.monodecoder.structures import Structures
from gdyn.splits import Part

BATCH_RESIDUES = 4096
FAR = 6
"""Residues apart in the chain from which on a contact says something of the fold (CASP)."""
UNKNOWN = -1
"""In `amino` and `secondary`: no label."""


@dataclass(frozen=True)
class Reading:
    """One structure, as it is and as its letters decode."""

    identifier: str
    codes: np.ndarray
    """(L,) int64."""
    amino: np.ndarray
    """(L,) int64 in the order of AMINO_ACIDS, or UNKNOWN."""
    amino_decoded: np.ndarray
    amino_nats: np.ndarray
    """(L,) -sum p ln q, NaN where unknown."""
    secondary: np.ndarray
    """(L,) int64 in the order of SECONDARY, or UNKNOWN; also where not `known`."""
    secondary_decoded: np.ndarray
    angles: np.ndarray
    """(L, 3) phi, psi, omega, radians; NaN where undefined or not `known`."""
    angles_decoded: np.ndarray
    contacts: np.ndarray
    """(L, L) bool."""
    probabilities: np.ndarray
    """(L, L)."""
    coordinates: np.ndarray
    """(L, 3) CA, Å."""
    known: np.ndarray
    """(L,) bool: confident enough a structure to be compared with."""

    @property
    def sequence(self) -> str:
        return amino_sequence(self.amino)


RESIDUE_FIELDS = (
    *("codes", "amino", "amino_decoded", "amino_nats", "secondary", "secondary_decoded"),
    *("angles", "angles_decoded"),
)


@dataclass(frozen=True)
class Survey:
    """A whole set, without its contact maps."""

    residues: dict[str, np.ndarray]
    """Of each of RESIDUE_FIELDS all R rows."""
    contacts: dict[str, np.ndarray]
    """Of each score of `contact_scores` the values (N,) of all structures, NaN where there is no contact to find."""
    nearness: dict[str, np.ndarray]
    """The same if pairs are ranked by their nearness in the chain: what is known without a structure."""
    codes: int
    """K."""

    @property
    def usage(self) -> np.ndarray:
        """(K,) how many residues have each code."""
        return np.bincount(self.residues["codes"], minlength=self.codes)


def batches(sizes: np.ndarray, batch_residues: int) -> Iterator[np.ndarray]:
    """Indices of consecutive structures, as many as have no more than `batch_residues` residues together; a longer
    structure comes alone."""
    start, total = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > start and total + size > batch_residues:
            yield np.arange(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield np.arange(start, len(sizes))


def codes_of(model: nn.Module) -> int:
    """K."""
    return len(model.quantizer.usage())  # type: ignore[operator, union-attr]


def amino_sequence(amino: np.ndarray) -> str:
    """One-letter codes, X for UNKNOWN."""
    return "".join((AMINO_ACIDS + "X")[i] for i in amino)


def labels(classes_rc: Tensor) -> np.ndarray:
    """(R,) the most probable class, UNKNOWN for a row of zeros."""
    return torch.where(classes_rc.any(1), classes_rc.argmax(1), UNKNOWN).numpy()


def read(
    model: nn.Module, structures: Structures | Part[Structures], indices: np.ndarray, least_plddt: float | None
) -> list[Reading]:
    """A batch of structures. `model`: the trained Autoencoder, in eval mode. Below `least_plddt`, where there is one,
    residues are not `known`."""
    batch = structures[indices]
    known = confident(batch, least_plddt)
    no_pairs = torch.zeros((2, 0), dtype=torch.int64)
    with torch.inference_mode():
        out = model(batch, no_pairs)
        maps = model.decoders.contact_probabilities(out["quantized"], batch["lengths"])  # type: ignore[union-attr, operator]
    p, log_q = batch["amino_acids"], out["aa_logits"].float().log_softmax(1)
    nats = torch.where(p.any(1), -(p * log_q).sum(1), torch.nan)
    rows = {
        "codes": out["codes"].numpy(),
        "amino": labels(p),
        "amino_decoded": log_q.argmax(1).numpy(),
        "amino_nats": nats.numpy(),
        "secondary": labels(batch["secondary"] * known[:, None]),
        "secondary_decoded": out["ss_logits"].argmax(1).numpy(),
        "angles": torch.where((batch["angles"] != 0) & known[:, None], batch["angles"], torch.nan).numpy(),
        "angles_decoded": out["angles"].float().numpy(),
        "coordinates": batch["coordinates"].numpy(),
        "known": known.numpy(),
    }
    ends = batch["lengths"].cumsum(0).numpy()
    starts = ends - batch["lengths"].numpy()
    edges = batch["edges_contactPoints"].numpy()
    found = []
    for index, start, end, probabilities in zip(indices, starts, ends, maps, strict=True):
        own = edges[:, (edges[0] >= start) & (edges[0] < end)] - start
        contacts = np.zeros((end - start, end - start), dtype=bool)
        contacts[own[0], own[1]] = contacts[own[1], own[0]] = True
        parts = {name: values[start:end] for name, values in rows.items()}
        found.append(
            Reading(structures.identifiers[index], contacts=contacts, probabilities=probabilities.numpy(), **parts)
        )
    return found


def survey(
    model: nn.Module,
    structures: Structures | Part[Structures],
    least_plddt: float | None,
    batch_residues: int = BATCH_RESIDUES,
) -> Survey:
    """Read a whole set, keeping of each structure its residues and how well its contacts come back."""
    residues: dict[str, list[np.ndarray]] = {name: [] for name in RESIDUE_FIELDS}
    contacts, nearness = [], []
    for indices in batches(structures.sizes, batch_residues):
        for reading in read(model, structures, indices, least_plddt):
            for name, parts in residues.items():
                parts.append(getattr(reading, name))
            place = np.arange(len(reading.codes))
            contacts.append(contact_scores(reading.contacts, reading.probabilities, reading.known))
            nearness.append(contact_scores(reading.contacts, -np.abs(place[:, None] - place), reading.known))
    return Survey(
        {name: np.concatenate(parts) for name, parts in residues.items()},
        {name: np.array([of[name] for of in contacts]) for name in contacts[0]},
        {name: np.array([of[name] for of in nearness]) for name in nearness[0]},
        codes_of(model),
    )


def average_precision(true: np.ndarray, scores: np.ndarray) -> float:
    """Sum over the distinct scores, from the highest, of precision x gain in recall; NaN if nothing is true."""
    if not true.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of equal scores
    hits = true[order].cumsum()[last]
    return float((hits / (last + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])


def contact_scores(contacts_ll: np.ndarray, ranking_ll: np.ndarray, known_l: np.ndarray) -> dict[str, float]:
    """Of one structure, over pairs i < j of known residues, those first whose `ranking` is highest. `_long`: of those
    at least FAR apart. `at_l`: of these the first L. NaN where there is no contact to find."""
    i, j = np.triu_indices(len(contacts_ll), 1)
    pairs = known_l[i] & known_l[j]
    i, j = i[pairs], j[pairs]
    true, ranking, far = contacts_ll[i, j], ranking_ll[i, j], j - i >= FAR
    first = np.argsort(-ranking[far], kind="stable")[: len(contacts_ll)]
    return {
        "average_precision": average_precision(true, ranking),
        "average_precision_long": average_precision(true[far], ranking[far]),
        "precision_at_l": _mean(true[far][first]) if true[far].any() else math.nan,
    }


def scores(seen: Survey) -> dict[str, Any]:
    """Everything `gdyn evaluate` says of a set, as plain numbers; NaN: not defined for it. `chance` has, under the
    same names, what one gets without a structure: by always the same answer, and contacts by nearness in the chain."""
    of = seen.residues
    known = of["amino"] != UNKNOWN
    labelled = of["secondary"] != UNKNOWN
    errors = wrapped(of["angles_decoded"] - of["angles"])
    constant = wrapped(circular_mean(of["angles"]) - of["angles"])
    background = np.bincount(of["amino"][known], minlength=len(AMINO_ACIDS))
    nats = _mean(of["amino_nats"][known])
    return {
        "structures": len(seen.contacts["average_precision"]),
        "residues": len(known),
        "aa_cross_entropy": nats,
        "aa_perplexity": math.exp(nats),
        "aa_accuracy": _mean(of["amino"][known] == of["amino_decoded"][known]),
        "ss_accuracy": _mean(of["secondary"][labelled] == of["secondary_decoded"][labelled]),
        **_contact_means(seen.contacts),
        **_angle_scores(errors),
        "codebook_perplexity": math.exp(entropy(seen.usage)),
        "codes_used": int((seen.usage > 0).sum()),
        "codes": seen.codes,
        "chance": {
            "aa_cross_entropy": entropy(background),
            "aa_perplexity": math.exp(entropy(background)),
            "aa_accuracy": _largest_share(background),
            "ss_accuracy": _largest_share(np.bincount(of["secondary"][labelled], minlength=len(SECONDARY))),
            **_contact_means(seen.nearness),
            **_angle_scores(constant),
        },
    }


def _contact_means(contacts: dict[str, np.ndarray]) -> dict[str, float]:
    return {f"contact_{name}": _mean(of_structures) for name, of_structures in contacts.items()}


def _angle_scores(errors_r3: np.ndarray) -> dict[str, float]:
    degrees = np.degrees(np.abs(errors_r3))
    names = ("phi_mae_degrees", "psi_mae_degrees", "omega_mae_degrees")
    return {"angle_mae_degrees": _mean(degrees)} | {name: _mean(degrees[:, i]) for i, name in enumerate(names)}


def wrapped(angles: np.ndarray) -> np.ndarray:
    """The same angles in [-pi, pi)."""
    return (angles + np.pi) % (2 * np.pi) - np.pi


def circular_mean(angles_r3: np.ndarray) -> np.ndarray:
    """(3,) direction of the mean of the unit vectors; NaN rows do not count."""
    with np.errstate(invalid="ignore"):
        return np.array([np.arctan2(_mean(np.sin(column)), _mean(np.cos(column))) for column in angles_r3.T])


def entropy(counts: np.ndarray) -> float:
    """Nats, of counts."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _largest_share(counts: np.ndarray) -> float:
    return float(counts.max() / counts.sum()) if counts.sum() else math.nan


def _mean(values: np.ndarray) -> float:
    """Over what is defined; NaN if nothing is."""
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(values.mean()) if values.size else math.nan


@dataclass(frozen=True)
class Letter:
    """What a code stands for in a set."""

    code: int
    share: float
    """Of all residues."""
    secondary: np.ndarray
    """(3,) shares of loop, helix, strand among its residues; NaN without labels."""
    angles: np.ndarray
    """(3,) circular mean phi, psi, omega, radians; NaN if none is defined."""
    enrichment: np.ndarray
    """(20,) log2 of how many times more frequent each amino acid is than in the whole set."""


def describe(seen: Survey, pseudocount: float = 5.0) -> list[Letter]:
    """All K codes. Enrichment counts `pseudocount` residues with the background's amino acids beside each code's own,
    so that rare codes do not look extreme."""
    of, letters = seen.residues, []
    background = np.bincount(of["amino"][of["amino"] != UNKNOWN], minlength=20) + 1.0
    background /= background.sum()
    order = np.argsort(of["codes"], kind="stable")
    bounds = np.concatenate([[0], seen.usage.cumsum()])
    for code, (start, end) in enumerate(pairwise(bounds)):
        rows = order[start:end]
        amino, secondary = (values[values != UNKNOWN] for values in (of["amino"][rows], of["secondary"][rows]))
        shares = np.bincount(amino, minlength=20) + pseudocount * background
        classes = np.bincount(secondary, minlength=3).astype(float)
        letters.append(
            Letter(
                code,
                len(rows) / len(order),
                classes / classes.sum() if len(secondary) else np.full(3, np.nan),
                circular_mean(of["angles"][rows]),
                np.log2(shares / shares.sum() / background),
            )
        )
    return letters
