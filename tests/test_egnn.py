"""The dense network is the formula of E(n)-equivariant networks, pair by pair in NumPy here, and has its symmetries."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gdyn.nn import egnn
from gdyn.nn.egnn import EGNN, centred, cut_by_size, mean_position

IN, H, OUT = 5, 16, 4
SIZES = (7, 1, 4, 9, 3)
VARIANTS = [
    {},
    {"attention": True, "tanh": True, "norm_constant": 1.0},
    {"normalization": "mean", "sublayers": 1},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=["plain", "attention, tanh", "mean"])


def make_network(dtype: torch.dtype = torch.float64, **options: object) -> EGNN:
    """With every parameter random and coordinate steps of some Å, so that nothing is hidden by being small."""
    torch.manual_seed(0)
    network = EGNN(IN, H, OUT, blocks=2, **options).to(dtype)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        scale = 1.0 if name.endswith("steps.last.weight") else 0.1
        parameter.data.add_(scale * torch.randn_like(parameter))
    return network


def make_molecules(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    n = max(sizes)
    mask = torch.arange(n) < torch.tensor(sizes)[:, None]
    h = torch.randn(len(sizes), n, IN, generator=random, dtype=dtype)
    x = 2 * torch.randn(len(sizes), n, 3, generator=random, dtype=dtype)
    return h * mask[..., None], x * mask[..., None], mask


def rotation(determinant: int, dtype: torch.dtype = torch.float64) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return (q * torch.tensor([determinant * torch.linalg.det(q).sign(), 1, 1])).to(dtype)


def pair_by_pair(network: EGNN, h: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One molecule without padding, h (n, in) and x (n, 3), in loops over pairs."""
    weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    def silu(z: np.ndarray) -> np.ndarray:
        return z * sigmoid(z)

    def linear(name: str, z: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ z + weights.get(f"{name}.bias", 0)

    n, divisor = len(x), len(x) if network.normalization == "mean" else 100
    initial = ((x[:, None] - x) ** 2).sum(-1)
    h = np.array([linear("embedding", row) for row in h])
    for b, block in enumerate(network.blocks):
        distances = ((x[:, None] - x) ** 2).sum(-1)

        def features(name: str, h: np.ndarray, i: int, j: int, squares: np.ndarray = distances) -> np.ndarray:
            z = np.concatenate([h[i], h[j], [squares[i, j], initial[i, j]]])
            return silu(linear(f"{name}.second", silu(linear(f"{name}.first", z))))

        for s, layer in enumerate(block.messages):
            name = f"blocks.{b}.messages.{s}"
            sums = np.zeros_like(h)
            for i in range(n):
                for j in range(n):
                    m = features(name, h, i, j)
                    gate = sigmoid(linear(f"{name}.gate", m)) if layer.gate is not None else 1
                    sums[i] += gate * m / divisor
            h = h + np.array(
                [
                    linear(f"{name}.update.2", silu(linear(f"{name}.update.0", np.concatenate(row))))
                    for row in zip(h, sums, strict=True)
                ]
            )
        name, moved = f"blocks.{b}.steps", x.copy()
        for i in range(n):
            for j in range(n):
                phi = linear(f"{name}.last", features(name, h, i, j))
                if block.steps.reach is not None:
                    phi = np.tanh(phi) * 15 / len(network.blocks)
                length = np.sqrt(distances[i, j] + 1e-8) + block.steps.norm_constant
                moved[i] += (x[i] - x[j]) / length * phi / divisor
        x = moved
    return np.array([linear("readout", row) for row in h]), x


def gradients(network: EGNN, h: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of a random linear function of the outputs, by the parameters and both inputs."""
    network = copy.deepcopy(network)
    h, x = h.clone().requires_grad_(), x.clone().requires_grad_()
    random = torch.Generator().manual_seed(3)
    loss = sum(
        (out * torch.randn(out.shape, generator=random, dtype=torch.float64)).sum() for out in network(h, x, mask)
    )
    loss.backward()  # type: ignore[union-attr]
    assert h.grad is not None and x.grad is not None
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None} | {"h": h.grad, "x": x.grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@variants
def test_network_is_the_formula_pair_by_pair(options: dict) -> None:
    network, (h, x, mask) = make_network(**options), make_molecules()
    out, moved = network(h, x, mask)
    assert not out[~mask].any() and not moved[~mask].any()
    assert (moved - x).norm() > 0.1
    for b, size in enumerate(SIZES):
        expected = pair_by_pair(network, h[b, :size].numpy(), x[b, :size].numpy())
        np.testing.assert_allclose(out[b, :size].detach(), expected[0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(moved[b, :size].detach(), expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
@variants
def test_features_are_invariant_and_coordinates_equivariant(
    options: dict, determinant: int, dtype: torch.dtype, tolerance: float
) -> None:
    network, (h, x, mask) = make_network(dtype, **options), make_molecules(dtype=dtype)
    q, shift = rotation(determinant, dtype), torch.tensor([3.0, -1.0, 2.0], dtype=dtype)
    out, moved = network(h, x, mask)
    turned_out, turned = network(h, x @ q.T + shift, mask)
    assert (turned_out - out).norm() < tolerance * out.norm()
    expected = (moved @ q.T + shift) * mask[..., None]
    assert (turned - expected).norm() < tolerance * expected.norm()


@variants
def test_atoms_have_no_order(options: dict) -> None:
    network, (h, x, mask) = make_network(**options), make_molecules()
    shuffle = torch.randperm(mask.shape[1], generator=torch.Generator().manual_seed(4))
    # Padding is shuffled too: masks with holes are masks.
    found = network(h[:, shuffle], x[:, shuffle], mask[:, shuffle])
    for a, b in zip(found, network(h, x, mask), strict=True):
        torch.testing.assert_close(a, b[:, shuffle], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
@variants
def test_batch_mates_and_padding_do_not_matter(options: dict, garbage: float) -> None:
    network, (h, x, mask) = make_network(**options), make_molecules()
    pad = (0, 0, 0, 6)
    wide = torch.nn.functional.pad(mask, (0, 6))
    wide_h, wide_x = (torch.nn.functional.pad(t, pad).masked_fill(~wide[..., None], garbage) for t in (h, x))
    whole = network(wide_h, wide_x, wide)
    for b, size in enumerate(SIZES):
        one = slice(b, b + 1), slice(size)
        for a, alone in zip(whole, network(h[one], x[one], mask[one]), strict=True):
            torch.testing.assert_close(a[one], alone, rtol=1e-10, atol=1e-10)


@variants
def test_gradients_are_those_of_the_plain_operations(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    network, molecules = make_network(**options), make_molecules()
    found = gradients(network, *molecules)
    assert all(value.isfinite().all() and value.any() for value in found.values())
    assert found.keys() == dict(network.named_parameters()).keys() | {"h", "x"}
    monkeypatch.setattr(egnn.FusedPairs, "apply", egnn.plain_pairs)
    assert_same(found, gradients(network, *molecules), 1e-10)


def test_gradient_of_the_coordinates_is_the_slope() -> None:
    network, (h, x, mask) = make_network(), make_molecules((4, 2))
    slope = gradients(network, h, x, mask)["x"]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * mask[..., None]

    def loss(x: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(3)
        outs = network(h, x, mask)
        return torch.stack(
            [(o * torch.randn(o.shape, generator=random, dtype=torch.float64)).sum() for o in outs]
        ).sum()

    with torch.no_grad():
        rise = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    assert float(rise) == pytest.approx(float((slope * direction).sum()), rel=1e-6)


@variants
def test_checkpointing_changes_no_number(options: dict) -> None:
    molecules = make_molecules()
    kept = gradients(make_network(**options), *molecules)
    assert_same(gradients(make_network(**options, checkpoint=True), *molecules), kept, 0.0)


def test_rows_at_a_time_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    network, molecules = make_network(attention=True), make_molecules()
    whole = gradients(network, *molecules)
    monkeypatch.setattr(egnn, "PAIRS_ON_CPU", 20)
    assert_same(gradients(network, *molecules), whole, 1e-12)


def test_one_atom_and_coinciding_atoms_have_finite_gradients() -> None:
    h, x, mask = make_molecules((1, 5))
    x[1] = 1.0
    assert all(value.isfinite().all() for value in gradients(make_network(), h, x, mask).values())


def test_one_atom_stays_where_it_is() -> None:
    h, x, mask = make_molecules((1,))
    torch.testing.assert_close(make_network()(h, x, mask)[1], x, rtol=0, atol=0)


def test_new_network_hardly_moves_atoms() -> None:
    torch.manual_seed(0)
    h, x, mask = make_molecules(dtype=torch.float32)
    assert (EGNN(IN, H, OUT, 2)(h, x, mask)[1] - x).abs().max() < 1e-3


@pytest.mark.parametrize("cast", ["module", "autocast"])
def test_coordinates_are_float32_in_a_bfloat16_network(cast: str) -> None:
    network, (h, x, mask) = make_network(torch.float32), make_molecules(dtype=torch.float32)
    out, moved = network(h, x, mask)
    run: Callable[..., tuple[Tensor, Tensor]] = network
    if cast == "module":
        run = copy.deepcopy(network).bfloat16()
    shift = torch.tensor([1000.0, 0.0, 0.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        half_out, half_moved = run(h, x + shift, mask)
        (half_out.float().sum() + half_moved.square().sum()).backward()
    assert half_out.dtype == torch.bfloat16 and half_moved.dtype == torch.float32
    assert (half_out.float() - out).norm() < 0.05 * out.norm()
    # bfloat16 has steps of 4 Å at 1000 Å
    steps, half_steps = moved - x, (half_moved - shift - x) * mask[..., None]
    assert (half_steps - steps).norm() < 0.05 * steps.norm()


@pytest.mark.parametrize("pairs", [1, 100, 10**6])
def test_groups_of_like_size_hold_all_molecules_with_little_padding(pairs: int) -> None:
    sizes = sorted(torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(6)).tolist())
    cuts = cut_by_size(sizes, pairs)
    assert [k for begin, end in cuts for k in range(begin, end)] == list(range(50))
    for begin, end in cuts:
        padded = (end - begin) * sizes[end - 1] ** 2
        assert padded <= egnn.PADDING * sum(size**2 for size in sizes[begin:end])
        assert padded <= pairs or end - begin == 1


def test_mean_is_that_of_real_atoms() -> None:
    _, x, mask = make_molecules()
    x = x.masked_fill(~mask[..., None], 99.0)
    for b, size in enumerate(SIZES):
        expected = x[b, :size].numpy().mean(0)
        np.testing.assert_allclose(mean_position(x, mask)[b, 0], expected)
        np.testing.assert_allclose(centred(x, mask)[b, :size], x[b, :size].numpy() - expected)
    assert not centred(x, mask)[~mask].any()
