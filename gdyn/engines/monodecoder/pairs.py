"""Pairs of residues whose contact is to be predicted: all contacts, and about as many sampled pairs without contact.

The sample of a structure is a function of its key and the optimizer step, computed with integers: it is the same beside
any other structures, on any rank and device, and after a resume.

Legend: B structures, R residues of all of them, E edges, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdyn.nn import counters
from gdyn.nn.ragged import owners, places


@dataclass(frozen=True)
class Pairs:
    """First all contacts, then the others; both in the order of their residues, and every pair once."""

    index: Tensor
    """(2, P) int64: rows of the batch, the smaller one first."""
    contact: Tensor
    """(P,) bool"""


def sample_pairs(batch: dict[str, Tensor], step: int) -> Pairs:
    """The contacts of `edges_contactPoints`, in whichever directions it has them; and as many draws per structure from
    all of its pairs, less those that hit a contact or an earlier draw."""
    lengths_b, edges = batch["lengths"], batch["edges_contactPoints"]
    owner_r = owners(lengths_b)
    residues = len(owner_r)
    low, high = edges.amin(0), edges.amax(0)
    contacts = torch.unique((low * residues + high)[low != high])  # pairs as numbers, which sort as pairs do
    draws_b = torch.bincount(owner_r[contacts // residues], minlength=len(lengths_b))
    low, high = _draw(batch["keys"], step, lengths_b, draws_b)
    drawn = torch.unique(low * residues + high)
    others = drawn[~torch.isin(drawn, contacts)]
    numbers = torch.cat([contacts, others])
    contact = torch.arange(len(numbers), device=numbers.device) < len(contacts)
    return Pairs(torch.stack([numbers // residues, numbers % residues]), contact)


def _draw(keys_b: Tensor, step: int, lengths_b: Tensor, draws_b: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, higher rows) of as many pairs per structure as `draws_b` says, each of its L (L - 1) / 2 pairs equally
    likely."""
    owner = owners(draws_b)
    random = counters.output(counters.output(keys_b, torch.tensor(step))[owner], places(draws_b))
    length = lengths_b[owner]
    # L choices of one residue and L - 1 of another give each pair twice. The modulo of 64 bits favours none that shows.
    choice = random % (length * (length - 1))
    one, other = choice // (length - 1), choice % (length - 1)
    other = other + (other >= one)
    starts = (lengths_b.cumsum(0) - lengths_b)[owner]
    return starts + torch.minimum(one, other), starts + torch.maximum(one, other)
