"""Losses as sums: reference numbers, closed forms, NumPy, and sums over parts that add up to the whole."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gdyn.engines.monodecoder import losses
from gdyn.engines.monodecoder.losses import Counts
from gdyn.engines.monodecoder.pairs import Pairs, sample_pairs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(lengths: tuple[int, ...] = (14, 9, 11), seed: int = 0, foldx: bool = True) -> dict[str, torch.Tensor]:
    """Amino acids, secondary structure, angles and energies of which some are unknown; contacts along the chain."""
    g, residues = generator(seed), sum(lengths)
    starts = np.cumsum((0, *lengths))
    chain = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(starts)])
    amino = torch.eye(20)[torch.randint(20, (residues,), generator=g)]
    secondary = torch.eye(3)[torch.randint(3, (residues,), generator=g)]
    angles = (torch.rand(residues, 3, generator=g) - 0.5) * 2 * math.pi
    amino[::7], secondary[::5], angles[::6, 1] = 0, 0, 0
    batch = {
        "amino_acids": amino,
        "secondary": secondary,
        "angles": angles,
        "coordinates": 15 * torch.randn(residues, 3, generator=g),
        "plddt": torch.rand(residues, generator=g),
        "lengths": torch.tensor(lengths),
        "keys": torch.arange(len(lengths)) + 100 * seed,
        "edges_contactPoints": torch.stack([torch.cat([chain, chain + 1]), torch.cat([chain + 1, chain])]),
    }
    if foldx:
        batch["foldx"] = torch.randn(len(lengths), 23, generator=g)
        batch["foldx"][0, ::4] = math.nan
    return batch


def everything(residues: int) -> torch.Tensor:
    return torch.ones(residues, dtype=torch.bool)


# ---- reference numbers and closed forms


@pytest.mark.parametrize("number", [20, 3])
def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes(number):
    target = torch.eye(number)[torch.arange(50) % number]
    loss, _ = losses.classes(torch.full((50, number), 1.7), target, everything(50))
    assert float(loss) == pytest.approx(50 * math.log(number), rel=1e-6)


def test_uniform_distance_logits_cost_ln_8_per_pair():
    batch = make_batch()
    pairs = sample_pairs(batch, 0)
    every = everything(len(pairs.contact))
    found = losses.distances(torch.zeros(len(every), 8), batch["coordinates"], pairs, every)
    expected = [math.log(8) * float(part.sum()) for part in (pairs.contact, ~pairs.contact)]
    assert [float(part) for part in found] == pytest.approx(expected, rel=1e-6)


def test_products_of_unit_vectors_as_logits_cannot_cost_less_than_0_6265():
    """The floor of the original's contact loss, -log s(1) - log(1 - s(-1))."""
    pairs = Pairs(torch.tensor([[0, 0], [1, 2]]), torch.tensor([True, False]))
    contacts, others = losses.contacts(torch.tensor([1.0, -1.0]), pairs, everything(2))
    assert float(contacts + others) == pytest.approx(0.6265234, abs=1e-6)


def test_huge_contact_logits_are_finite_and_have_the_right_slope():
    logits = torch.tensor([-1e4, 1e4, 1e4, -1e4], requires_grad=True)
    pairs = Pairs(torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4]]), torch.tensor([True, True, False, False]))
    contacts, others = losses.contacts(logits, pairs, everything(4))
    (contacts + others).backward()
    assert (contacts.item(), others.item()) == (1e4, 1e4)
    assert logits.grad is not None
    assert logits.grad.tolist() == [-1, 0, 1, 0]


def test_class_probabilities_are_targets_and_right_answers_are_counted():
    g = generator()
    logits = torch.randn(30, 20, generator=g)
    target = torch.rand(30, 20, generator=g).softmax(1)
    mask = torch.arange(30) % 4 > 0
    loss, right = losses.classes(logits, target, mask)
    z, t, m = logits.double().numpy(), target.double().numpy(), mask.numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert float(loss) == pytest.approx(-(t * log_p)[m].sum(), rel=1e-6)
    assert int(right) == (z.argmax(1) == t.argmax(1))[m].sum()
    assert losses.classes(target.log(), target, everything(30))[1] == 30


def test_distance_bins_say_how_many_boundaries_are_exceeded():
    boundaries = [5, 12.5, 20, 27.5, 35, 42.5, 50]
    assert list(losses.BOUNDARIES) == boundaries
    distances = np.concatenate([np.linspace(0.1, 60, 500), boundaries]).astype(np.float32)
    coordinates = torch.zeros(1 + len(distances), 3)
    coordinates[1:, 1] = torch.from_numpy(distances)
    index = torch.stack([torch.zeros(len(distances), dtype=torch.int64), torch.arange(1, len(coordinates))])
    bins = losses.distance_bins(coordinates, index).numpy()
    np.testing.assert_array_equal(bins, np.searchsorted(boundaries, distances))
    np.testing.assert_array_equal(bins, np.digitize(distances, boundaries, right=True))
    assert set(bins) == set(range(8))


def test_angles_do_not_care_for_full_turns():
    g = generator()
    predicted, target = (6 * torch.rand(40, 3, generator=g).double() - 3 for _ in range(2))
    mask = torch.ones(40, 3, dtype=torch.bool)
    turns = 2 * math.pi * torch.randint(-1, 2, (40, 3), generator=g)
    expected = [float(part) for part in losses.angles(predicted, target, mask)]
    for shifted in (losses.angles(predicted + turns, target, mask), losses.angles(predicted, target + turns, mask)):
        assert [float(part) for part in shifted] == pytest.approx(expected, rel=1e-5)
    assert [float(part) for part in losses.angles(target, predicted, mask)] == pytest.approx(expected, rel=1e-5)


def test_angles_cost_the_smooth_l1_of_the_wrapped_difference():
    """Closed form: d²/(2 beta) below beta = 0.5, d - beta/2 above."""
    target = torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, error = losses.angles(torch.tensor([[0.3, -2.0, 2 * math.pi - 1]]), target, mask)
    assert float(loss) == pytest.approx(0.3**2 / (2 * 0.5) + (2 - 0.25) + (1 - 0.25), rel=1e-6)
    assert float(error) == pytest.approx(0.3 + 2 + 1, rel=1e-6)


def test_angles_pull_the_short_way_round():
    predicted = torch.tensor([[3.0, -3.0, 3.0]], requires_grad=True)
    loss, _ = losses.angles(predicted, torch.tensor([[-3.0, 3.0, 2.9]]), torch.ones(1, 3, dtype=torch.bool))
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad.sign().tolist() == [[-1, 1, 1]]


def test_spectrum_and_energies_cost_torchs_smooth_l1():
    g = generator()
    predicted, target = (3 * torch.randn(4, 23, generator=g) for _ in range(2))
    expected = F.smooth_l1_loss(predicted, target, reduction="none")
    assert float(losses.spectrum(predicted, target)) == pytest.approx(float(expected.sum()), rel=1e-6)
    missing = torch.rand(4, 23, generator=g) < 0.3
    found = losses.foldx(predicted, target.masked_fill(missing, math.nan), ~missing)
    assert float(found) == pytest.approx(float(expected[~missing].sum()), rel=1e-6)


def test_quantization_moves_codes_by_one_term_and_vectors_by_the_other():
    g = generator()
    x, q = (torch.randn(9, 4, generator=g).requires_grad_() for _ in range(2))
    codebook, commitment = losses.quantization(x, q)
    expected = (x.detach().double() - q.detach().double()).square().mean(1).sum()
    assert [codebook.item(), commitment.item()] == pytest.approx([float(expected)] * 2, rel=1e-6)
    slope = (q - x).detach() * 2 / 4
    assert torch.autograd.grad(codebook, [x, q], allow_unused=True, retain_graph=True)[0] is None
    torch.testing.assert_close(torch.autograd.grad(codebook, q)[0], slope)
    assert torch.autograd.grad(commitment, [x, q], allow_unused=True, retain_graph=True)[1] is None
    torch.testing.assert_close(torch.autograd.grad(commitment, x)[0], -slope)


# ---- masks and counts


def all_sums(batch: dict[str, torch.Tensor], pairs: Pairs, threshold: float | None) -> torch.Tensor:
    """Every sum, from outputs that are functions of the residue (or structure) alone."""
    residue = batch["coordinates"].double() @ torch.tensor([0.3, -0.7, 0.11], dtype=torch.float64)
    structure = batch["keys"].double()

    def output(seed: torch.Tensor, width: int) -> torch.Tensor:
        return torch.sin(seed[:, None] * torch.linspace(0.5, 3, width).double() + 1)

    i, j = pairs.index
    known = losses.masks(batch, pairs, threshold)
    sums = [
        *losses.classes(output(residue, 20), batch["amino_acids"], known.amino_acids),
        *losses.classes(output(residue, 3), batch["secondary"], known.secondary),
        *losses.angles(output(residue, 3), batch["angles"], known.angles),
        *losses.contacts(residue[i] * residue[j], pairs, known.pairs),
        *losses.distances(output(residue[i] * residue[j], 8), batch["coordinates"], pairs, known.pairs),
        losses.foldx(output(structure, 23), batch["foldx"], known.foldx),
        *losses.quantization(output(residue, 16), output(residue + 1, 16)),
    ]
    return torch.stack([part.double() for part in sums])


def structures(batch: dict[str, torch.Tensor], parts: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """The batch's structures in batches of their own."""
    lengths = batch["lengths"].tolist()
    starts = np.cumsum([0, *lengths])
    made = []
    for chosen in parts:
        rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in chosen])
        new = torch.full((sum(lengths),), -1)
        new[rows] = torch.arange(len(rows))
        edges = new[batch["edges_contactPoints"]]
        part = {name: batch[name][rows] for name in ("amino_acids", "secondary", "angles", "coordinates", "plddt")}
        part |= {name: batch[name][chosen] for name in ("lengths", "keys", "foldx")}
        made.append(part | {"edges_contactPoints": edges[:, (edges >= 0).all(0)]})
    return made


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sums_and_counts_of_parts_add_up_to_those_of_the_whole(threshold):
    whole = make_batch()
    parts = structures(whole, [[2], [0, 1]])
    pairs, pairs_of = sample_pairs(whole, 4), [sample_pairs(part, 4) for part in parts]
    total = torch.stack(losses.counts(whole, pairs, threshold))
    each = [torch.stack(losses.counts(part, p, threshold)) for part, p in zip(parts, pairs_of, strict=True)]
    assert total.dtype == torch.float64
    assert torch.equal(total, each[0] + each[1])
    found = sum(all_sums(part, p, threshold) for part, p in zip(parts, pairs_of, strict=True))
    torch.testing.assert_close(found, all_sums(whole, pairs, threshold), rtol=2e-6, atol=1e-5)


def test_counts_are_those_of_a_plain_loop():
    batch, threshold = make_batch(), 0.4
    pairs = sample_pairs(batch, 0)
    sure = [bool(p >= threshold) for p in batch["plddt"]]
    ends = [sure[i] and sure[j] for i, j in pairs.index.T.tolist()]
    expected = Counts(
        structures=3,
        residues=34,
        amino_acids=sum(bool(row.sum() > 0) for row in batch["amino_acids"]),
        secondary=sum(ok and bool(row.sum() > 0) for ok, row in zip(sure, batch["secondary"], strict=True)),
        angles=sum(ok * int((row != 0).sum()) for ok, row in zip(sure, batch["angles"], strict=True)),
        contacts=sum(ok and contact for ok, contact in zip(ends, pairs.contact.tolist(), strict=True)),
        others=sum(ok and not contact for ok, contact in zip(ends, pairs.contact.tolist(), strict=True)),
        foldx=3 * 23 - 6,
    )
    assert [float(count) for count in losses.counts(batch, pairs, threshold)] == [float(count) for count in expected]
    assert float(losses.counts(make_batch(foldx=False), pairs).foldx) == 0


def test_what_is_not_counted_is_not_summed():
    """Outputs of unknown, missing and unsure terms may be anything, even not a number, and get no gradient."""
    batch, threshold = make_batch(), 0.5
    pairs = sample_pairs(batch, 0)
    known = losses.masks(batch, pairs, threshold)

    def check(loss, output, mask):
        clean, spoiled = (output.detach().clone().requires_grad_() for _ in range(2))
        with torch.no_grad():
            spoiled[~mask] = math.nan
        expected, found = loss(clean), loss(spoiled)
        assert torch.equal(expected, found)
        slope = torch.autograd.grad(found, spoiled)[0]
        assert torch.equal(slope, torch.autograd.grad(expected, clean)[0])
        assert (slope[mask] != 0).any()
        assert not slope[~mask].any()

    g = generator(9)
    random = [torch.randn(shape, generator=g) for shape in ((34, 20), (34, 3), (34, 3), (len(pairs.contact),))]
    check(lambda z: losses.classes(z, batch["amino_acids"], known.amino_acids)[0], random[0], known.amino_acids)
    check(lambda z: losses.classes(z, batch["secondary"], known.secondary)[0], random[1], known.secondary)
    check(lambda z: losses.angles(z, batch["angles"], known.angles)[0], random[2], known.angles)
    check(lambda z: sum(losses.contacts(z, pairs, known.pairs)), random[3], known.pairs)
    check(lambda z: losses.foldx(z, batch["foldx"], known.foldx), torch.randn(3, 23, generator=g), known.foldx)
    logits = torch.randn(len(pairs.contact), 8, generator=g)
    check(lambda z: sum(losses.distances(z, batch["coordinates"], pairs, known.pairs)), logits, known.pairs)


def test_sums_over_nothing_are_zero():
    batch = make_batch(lengths=(1, 1))
    batch["amino_acids"].zero_()
    pairs = sample_pairs(batch, 0)
    counts = losses.counts(batch, pairs, plddt_threshold=2.0)
    assert [float(count) for count in counts] == [2, 2, 0, 0, 0, 0, 0, 46 - 6]
    sums = all_sums(batch, pairs, 2.0)
    assert sums.isfinite().all()
    assert not sums[:10].any()


def test_half_precision_outputs_are_summed_in_float32():
    logits = torch.zeros(5000, 20, dtype=torch.bfloat16)
    loss, _ = losses.classes(logits, torch.eye(20)[torch.arange(5000) % 20], everything(5000))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(5000 * math.log(20), rel=1e-5)
