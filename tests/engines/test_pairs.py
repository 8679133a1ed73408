"""Pairs: every contact once, sampled pairs that depend on key and step alone, evenly distributed."""

import numpy as np
import pytest
import torch

from gdyn.engines.monodecoder.pairs import sample_pairs


def protein(residues: int, contacts: list[tuple[int, int]], key: int) -> dict:
    return {"residues": residues, "contacts": contacts, "key": key}


def batch(*proteins: dict) -> dict[str, torch.Tensor]:
    """Contacts in both directions, as `gdyn prepare` writes them."""
    starts = np.cumsum([0] + [p["residues"] for p in proteins])[:-1]
    edges = [
        (start + a, start + b)
        for start, p in zip(starts, proteins, strict=True)
        for i, j in p["contacts"]
        for a, b in ((i, j), (j, i))
    ]
    return {
        "lengths": torch.tensor([p["residues"] for p in proteins]),
        "keys": torch.tensor([p["key"] for p in proteins]),
        "edges_contactPoints": torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T,
    }


def random_protein(residues: int, seed: int) -> dict:
    """Neighbours along the chain and some others."""
    rng = np.random.default_rng(seed)
    contacts = {(i, i + 1) for i in range(residues - 1)}
    contacts |= {tuple(sorted(rng.choice(residues, 2, replace=False).tolist())) for _ in range(residues)}
    return protein(residues, sorted(contacts), int(rng.integers(-(2**63), 2**63)))


def as_sets(pairs, start: int = 0, stop: int = 1 << 40) -> tuple[list, list]:
    """(contacts, others) with both ends within start..stop, counted from start, in order."""
    both = [[], []]
    for (i, j), contact in zip(pairs.index.T.tolist(), pairs.contact.tolist(), strict=True):
        if start <= i < stop:
            assert i < j < stop
            both[not contact].append((i - start, j - start))
    return both[0], both[1]


def test_every_contact_comes_once_and_no_sampled_pair_is_one():
    one = random_protein(40, 0)
    contacts, others = as_sets(sample_pairs(batch(one), 3))
    assert contacts == one["contacts"]
    assert len(set(others)) == len(others)
    assert not set(others) & set(contacts)
    assert all(0 <= i < j < 40 for i, j in others)
    assert 0.8 * len(contacts) < len(others) <= len(contacts)


def test_any_order_one_direction_repeated_and_self_edges_give_the_same_pairs():
    tidy = batch(random_protein(30, 1), random_protein(25, 2))
    low, high = tidy["edges_contactPoints"][:, ::2]
    turned = torch.rand(low.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    untidy = torch.stack([torch.where(turned, low, high), torch.where(turned, high, low)])
    selves = torch.arange(10).expand(2, 10)
    untidy = torch.cat([untidy, selves, untidy[:, :7]], 1)
    untidy = untidy[:, torch.randperm(untidy.shape[1], generator=torch.Generator().manual_seed(1))]
    found, expected = sample_pairs(tidy | {"edges_contactPoints": untidy}, 5), sample_pairs(tidy, 5)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.contact, expected.contact)


def test_a_structure_has_the_same_pairs_alone_and_among_others():
    proteins = [random_protein(residues, seed) for seed, residues in enumerate([31, 2, 57, 40])]
    together = sample_pairs(batch(*proteins), 11)
    start = 0
    for one in proteins:
        stop = start + one["residues"]
        assert as_sets(together, start, stop) == as_sets(sample_pairs(batch(one), 11))
        start = stop


def test_pairs_change_with_the_step_and_the_key_and_with_nothing_else():
    one = random_protein(60, 4)

    def others(protein, step):
        return as_sets(sample_pairs(batch(protein), step))[1]

    assert others(one, 8) == others(one, 8)
    torch.manual_seed(123)
    assert others(one, 8) == others(one, 8)
    samples = [others(one, step) for step in range(20)] + [others(one | {"key": one["key"] + 1}, 0)]
    shared = [len(set(a) & set(b)) / len(a) for i, a in enumerate(samples) for b in samples[:i]]
    share = len(one["contacts"]) / (60 * 59 / 2)
    assert np.mean(shared) == pytest.approx(share, abs=0.02)  # as many as independent samples share


def test_sampled_pairs_are_evenly_distributed():
    """Chi-square over all pairs of a structure, 100 keys and 40 steps, against its mean and deviation."""
    residues, contacts = 12, [(0, 1), (3, 9), (10, 11)]
    copies = batch(*[protein(residues, contacts, key=7919 * copy - 50) for copy in range(100)])
    counts = np.zeros((residues, residues))
    for step in range(40):
        pairs = sample_pairs(copies, step)
        np.add.at(counts, tuple(pairs.index[:, ~pairs.contact].numpy() % residues), 1)
    allowed = [(i, j) for j in range(residues) for i in range(j) if (i, j) not in contacts]
    assert counts.sum() == sum(counts[pair] for pair in allowed)
    observed = np.array([counts[pair] for pair in allowed])
    chi = float(((observed - observed.mean()) ** 2 / observed.mean()).sum())
    freedom = len(allowed) - 1
    assert abs(chi - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbouring_keys_and_steps_are_unrelated():
    """One draw from ten pairs, of which one is a contact: neighbours agree in a tenth of the cases."""
    keys, steps = 200, 50
    proteins = batch(*[protein(5, [(0, 1)], key) for key in range(keys)])
    drawn = np.full((steps, keys), -1)
    for step in range(steps):
        pairs = sample_pairs(proteins, step)
        i, j = pairs.index[:, ~pairs.contact].numpy()
        drawn[step, i // 5] = 5 * (i % 5) + j % 5
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[1:, :-1], drawn[:-1, 1:])):
        assert np.mean(one == other) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / one.size))


def test_a_structure_full_of_contacts_has_few_others_and_one_without_has_none():
    full = [(i, j) for j in range(6) for i in range(j)]
    assert as_sets(sample_pairs(batch(protein(6, full, 1)), 0)) == (sorted(full), [])
    contacts, others = as_sets(sample_pairs(batch(protein(6, sorted(full)[:-1], 1)), 0))
    assert len(contacts) == 14
    assert set(others) <= {(4, 5)}
    for lone in (protein(6, [], 1), protein(1, [], 1)):
        pairs = sample_pairs(batch(lone), 0)
        assert pairs.index.shape == (2, 0)
        assert pairs.contact.shape == (0,)
