"""Autoencoders and denoiser: symmetries of a complex, what may not matter, and losses against NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.engines.diffusion.autoencoder import (
    LIGAND_CLASSES,
    POCKET_CLASSES,
    Autoencoder,
    accuracy_sums,
    kl_sum,
    original_loss,
    reconstruction_sums,
)
from gdyn.engines.diffusion.denoiser import CrossAttention, Denoiser
from gdyn.nn.egnn import mean_position

LIGANDS, POCKETS = (6, 1, 9), (14, 20, 11)
D, P = 8, 6
BOTH = pytest.mark.parametrize("classes", [LIGAND_CLASSES, POCKET_CLASSES], ids=["ligand", "pocket"])
PRECISION = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
MIRROR = pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])


def randomised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every parameter random, and coordinate steps of some Å."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.data.add_((1.0 if name.endswith("steps.last.weight") else 0.1) * torch.randn_like(parameter))
    return module.to(dtype)


def make_autoencoder(classes: dict[str, int], dtype: torch.dtype = torch.float64, **options: object) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(classes, hidden=16, latent=D, blocks=2, **options)  # type: ignore[arg-type]
    return randomised(model, dtype)  # type: ignore[return-value]


def make_denoiser(dtype: torch.dtype = torch.float64, **options: object) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(D, P, hidden=16, blocks=2, **options)  # type: ignore[arg-type]
    return randomised(model, dtype)  # type: ignore[return-value]


def make_atoms(
    classes: dict[str, int], sizes: tuple[int, ...] = LIGANDS, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    features = {name: torch.randint(0, c, mask.shape, generator=random) * mask for name, c in classes.items()}
    x = 2 * torch.randn(*mask.shape, 3, generator=random, dtype=dtype) + torch.tensor([3.0, 1.0, -2.0], dtype=dtype)
    return features, x * mask[..., None], mask


def make_complexes(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arguments of the denoiser; the second sample's pocket is dropped."""
    random = torch.Generator().manual_seed(3)

    def cloud(sizes: tuple[int, ...], features: int) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        x, h = (torch.randn(*mask.shape, c, generator=random, dtype=dtype) * mask[..., None] for c in (3, features))
        return 4 * x, h, mask

    (z_x, z_h, mask), (pocket_x, pocket_h, pocket_mask) = cloud(LIGANDS, D), cloud(POCKETS, P)
    return {
        "t_b1": torch.tensor([[0.1], [0.5], [1.0]], dtype=dtype),
        "z_x": z_x,
        "z_h": z_h,
        "ligand_mask": mask,
        "pocket_x": pocket_x,
        "pocket_h": pocket_h,
        "pocket_mask": pocket_mask,
        "keep_b": torch.tensor([True, False, True]),
    }


def motion(determinant: int, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Of points, with a translation, and of vectors."""
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    q = (q * torch.tensor([determinant * torch.linalg.det(q).sign(), 1, 1])).to(dtype)
    return lambda x: x @ q.T + torch.tensor([5.0, -4.0, 7.0], dtype=dtype), lambda x: x @ q.T


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@PRECISION
@MIRROR
@BOTH
def test_latents_and_decoded_atoms_move_with_the_molecule(
    classes: dict[str, int], determinant: int, dtype: torch.dtype, tolerance: float
) -> None:
    model, (features, x, mask) = make_autoencoder(classes, dtype), make_atoms(classes, dtype=dtype)
    move, _ = motion(determinant, dtype)
    z_x, z_h = model.encode(features, x, mask)
    moved_x, moved_h = model.encode(features, move(x) * mask[..., None], mask)
    assert_close(moved_x, move(z_x) * mask[..., None], tolerance)
    assert_close(moved_h, z_h, tolerance)
    decoded, moved = model.decode(z_x, z_h, mask), model.decode(moved_x, moved_h, mask)
    assert_close(moved["positions"], move(decoded["positions"]) * mask[..., None], tolerance)
    for name in classes:
        assert_close(moved[name][mask], decoded[name][mask], tolerance)


@BOTH
def test_molecule_keeps_its_place(classes: dict[str, int]) -> None:
    """The mean of a ligand in its pocket's frame passes through the latents, however wrong the networks are."""
    model, (features, x, mask) = make_autoencoder(classes), make_atoms(classes)
    z_x, z_h = model.encode(features, x, mask)
    positions = model.decode(z_x, z_h, mask)["positions"]
    for cloud in (z_x, positions):
        assert (cloud - x).norm() > 0.1
        torch.testing.assert_close(mean_position(cloud, mask), mean_position(x, mask))


@BOTH
def test_autoencoder_ignores_batch_mates_padding_and_order(classes: dict[str, int]) -> None:
    model, (features, x, mask) = make_autoencoder(classes), make_atoms(classes)
    z = model.encode(features, x, mask)
    decoded = model.decode(*z, mask)
    for b, size in enumerate(LIGANDS):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(b))
        alone = {name: classes_bn[b : b + 1, order] for name, classes_bn in features.items()}
        alone_z = model.encode(alone, x[b : b + 1, order], mask[b : b + 1, order])
        for found, whole in zip(alone_z, z, strict=True):
            torch.testing.assert_close(found, whole[b : b + 1, order], rtol=1e-10, atol=1e-10)
        for name, found in model.decode(*alone_z, mask[b : b + 1, order]).items():
            torch.testing.assert_close(found, decoded[name][b : b + 1, order], rtol=1e-10, atol=1e-10)


@BOTH
def test_losses_are_sums_over_real_atoms(classes: dict[str, int]) -> None:
    model, (features, x, mask) = make_autoencoder(classes), make_atoms(classes)
    z_x, z_h = model.encode(features, x, mask)
    decoded = model.decode(z_x, z_h, mask)
    expected = dict.fromkeys([*classes, "positions", "kl"], 0.0)
    right, rmsd = dict.fromkeys(classes, 0), 0.0
    arrays = {name: value.detach().numpy() for name, value in decoded.items()}
    for b, size in enumerate(LIGANDS):
        squares = ((arrays["positions"][b, :size] - x[b, :size].numpy()) ** 2).sum()
        expected["positions"] += squares
        rmsd += np.sqrt(squares / size)
        latent = z_x[b, :size].detach().numpy()
        expected["kl"] += 0.5 * ((latent - latent.mean(0)) ** 2).sum() + 0.5 * (z_h[b].detach().numpy() ** 2).sum()
        for name in classes:
            for logits, target in zip(arrays[name][b, :size], features[name][b, :size].tolist(), strict=True):
                expected[name] += np.log(np.exp(logits).sum()) - logits[target]
                right[name] += int(np.argmax(logits) == target)
    found = reconstruction_sums(decoded, features, x, mask) | {"kl": kl_sum(z_x, z_h, mask)}
    assert {name: float(value.detach()) for name, value in found.items()} == pytest.approx(expected, rel=1e-10)
    found = accuracy_sums(decoded, features, x, mask)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(right | {"rmsd": rmsd}, rel=1e-10)


@BOTH
def test_losses_ignore_padding(classes: dict[str, int]) -> None:
    model, (features, x, mask) = make_autoencoder(classes), make_atoms(classes)
    wide_features = {name: F.pad(value, (0, 5)) for name, value in features.items()}
    wide_x, wide_mask = F.pad(x, (0, 0, 0, 5)), F.pad(mask, (0, 5))

    def sums(features: dict[str, Tensor], x: Tensor, mask: Tensor) -> dict[str, float]:
        z = model.encode(features, x, mask)
        losses = reconstruction_sums(model.decode(*z, mask), features, x, mask) | {"kl": kl_sum(*z, mask)}
        return {name: float(value.detach()) for name, value in losses.items()}

    assert sums(wide_features, wide_x, wide_mask) == pytest.approx(sums(features, x, mask), rel=1e-10)


def test_perfect_reconstruction_has_no_loss() -> None:
    features, x, mask = make_atoms(LIGAND_CLASSES)
    decoded = {name: 100.0 * F.one_hot(features[name], c).double() for name, c in LIGAND_CLASSES.items()}
    decoded["positions"] = x
    assert all(float(value) < 1e-12 for value in reconstruction_sums(decoded, features, x, mask).values())
    found = {name: float(value) for name, value in accuracy_sums(decoded, features, x, mask).items()}
    assert found == dict.fromkeys(LIGAND_CLASSES, float(mask.sum())) | {"rmsd": 0.0}


def test_originals_loss_is_its_definition() -> None:
    """[squares + CE(h, argmax over all classes) + number squares] / ((3 + 12) n_padded) + 0.01 KL of unit variance,
    KL not divided, padded atoms with ln 11 each."""
    random = torch.Generator().manual_seed(5)
    sizes, n, c = (5, 2), 7, 11
    mask = torch.arange(n) < torch.tensor(sizes)[:, None]

    def draw(*shape: int) -> Tensor:
        values = torch.randn(2, n, *shape, generator=random, dtype=torch.float64)
        return values * mask.view(2, n, *[1] * len(shape))

    element = F.one_hot(torch.randint(0, 10, (2, n), generator=random), 10)
    aromatic = torch.randint(0, 2, (2, n, 1), generator=random)
    categories = torch.cat([element, aromatic], -1).double() * mask[..., None]
    x_hat, logits, number, x, target, z_x = draw(3), draw(c), draw(), draw(3), draw(), draw(3)
    z_h = torch.randn(2, n, 32, generator=random, dtype=torch.float64)
    found = original_loss(x_hat, logits, number, x, categories, target, z_x, z_h, mask)
    for b, size in enumerate(sizes):
        error = ((x_hat[b] - x[b]).numpy() ** 2).sum() + ((number[b] - target[b]).numpy() ** 2).sum()
        for i in range(n):
            row = logits[b, i].numpy()
            chosen = int(np.argmax(categories[b, i].numpy()))
            entropy = np.log(np.exp(row).sum()) - row[chosen]
            assert i < size or entropy == pytest.approx(np.log(11))
            error += entropy
        kl = 0.5 * (z_x[b].numpy() ** 2).sum() + 0.5 * (z_h[b, :size].numpy() ** 2).sum()
        assert float(found[b]) == pytest.approx(error / ((3 + 12) * n) + 0.01 * kl, rel=1e-12)


@PRECISION
@MIRROR
def test_noise_turns_with_the_complex_and_ignores_its_place(
    determinant: int, dtype: torch.dtype, tolerance: float
) -> None:
    model, complexes = make_denoiser(dtype), make_complexes(dtype)
    move, turn = motion(determinant, dtype)
    moved = complexes | {"z_x": move(complexes["z_x"]), "pocket_x": move(complexes["pocket_x"])}
    eps_x, eps_h = model(**complexes)
    moved_x, moved_h = model(**moved)
    assert_close(moved_x, turn(eps_x), tolerance)
    assert_close(moved_h, eps_h, tolerance)


def test_noise_of_coordinates_has_mean_zero() -> None:
    complexes = make_complexes()
    eps_x, eps_h = make_denoiser()(**complexes)
    mask = complexes["ligand_mask"]
    assert eps_x.norm() > 0.1
    assert eps_x.sum(1).abs().max() < 1e-12
    assert not eps_x[~mask].any() and not eps_h[~mask].any()


@pytest.mark.parametrize("garbage", [5.0, float("nan")])
def test_denoiser_ignores_batch_mates_and_padding(garbage: float) -> None:
    """Padded pocket atoms lie at the origin, within reach of the ligand: the original took them for atoms."""
    model, complexes = make_denoiser(), make_complexes()
    wide = dict(complexes)
    for side, names in (("ligand", ("z_x", "z_h")), ("pocket", ("pocket_x", "pocket_h"))):
        mask = wide[f"{side}_mask"] = F.pad(complexes[f"{side}_mask"], (0, 4))
        for name in names:
            wide[name] = F.pad(complexes[name], (0, 0, 0, 4)).masked_fill(~mask[..., None], garbage)
    whole = model(**wide)
    for b, (n, m) in enumerate(zip(LIGANDS, POCKETS, strict=True)):
        cut = {name: value[b : b + 1] for name, value in complexes.items()}
        cut |= {name: cut[name][:, :n] for name in ("z_x", "z_h", "ligand_mask")}
        cut |= {name: cut[name][:, :m] for name in ("pocket_x", "pocket_h", "pocket_mask")}
        for found, alone in zip(whole, model(**cut), strict=True):
            torch.testing.assert_close(found[b : b + 1, :n], alone, rtol=1e-10, atol=1e-10)


def test_denoiser_knows_no_order_of_atoms() -> None:
    model, complexes = make_denoiser(), make_complexes()
    random = torch.Generator().manual_seed(6)
    n, m = (torch.randperm(max(sizes), generator=random) for sizes in (LIGANDS, POCKETS))
    shuffled = complexes | {name: complexes[name][:, n] for name in ("z_x", "z_h", "ligand_mask")}
    shuffled |= {name: complexes[name][:, m] for name in ("pocket_x", "pocket_h", "pocket_mask")}
    for found, expected in zip(model(**shuffled), model(**complexes), strict=True):
        torch.testing.assert_close(found, expected[:, n], rtol=1e-10, atol=1e-10)


def test_dropped_pocket_is_not_seen_and_a_kept_one_is() -> None:
    model, complexes = make_denoiser(), make_complexes()
    other = complexes | {"pocket_x": complexes["pocket_x"] + 0.5, "pocket_h": 2 * complexes["pocket_h"]}
    before, after = model(**complexes)[1], model(**other)[1]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [False, True, False]


def test_pocket_atoms_beyond_the_cutoff_are_not_seen() -> None:
    model, complexes = make_denoiser(cutoff=8.0), make_complexes()
    complexes["keep_b"] = torch.ones(3, dtype=torch.bool)
    far = complexes | {"pocket_x": complexes["pocket_x"] + 100.0}
    farther = complexes | {"pocket_x": complexes["pocket_x"] + 200.0}
    for a, b, near in zip(model(**far), model(**farther), model(**complexes), strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, near)


def test_cross_attention_is_the_formula_pair_by_pair() -> None:
    torch.manual_seed(0)
    layer = randomised(CrossAttention(16, P, cutoff=5.0), torch.float64)
    complexes = make_complexes()
    x, mask, px, ph, p_mask = (complexes[k] for k in ("z_x", "ligand_mask", "pocket_x", "pocket_h", "pocket_mask"))
    h = torch.randn(*mask.shape, 16, dtype=torch.float64)
    with torch.no_grad():
        found_h, found_x = layer(h, x, mask, ph, px, p_mask)
        seen = 0
        for b, (n, m) in enumerate(zip(LIGANDS, POCKETS, strict=True)):
            for i in range(n):
                expected_h, expected_x = h[b, i].clone(), x[b, i].clone()
                for p in range(m):
                    arrow = x[b, i] - px[b, p]
                    square = arrow.dot(arrow)
                    if square >= 25:
                        continue
                    seen += 1
                    both = torch.cat([h[b, i], ph[b, p], square.view(1)])
                    gate = layer.gate_out(F.silu(layer.gate(both))).sigmoid()
                    value = layer.value_out(F.silu(layer.value(both[16:])))
                    step = layer.step_out(F.silu(layer.step(both))).tanh()
                    expected_h += gate * value / 100
                    expected_x += 0.1 * step * arrow / square.sqrt() / 100
                torch.testing.assert_close(found_h[b, i], expected_h, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(found_x[b, i], expected_x, rtol=1e-8, atol=1e-10)
    assert 0 < seen < sum(n * m for n, m in zip(LIGANDS, POCKETS, strict=True))


def denoiser_gradients(**options: object) -> dict[str, Tensor]:
    model = make_denoiser(**options)
    eps_x, eps_h = model(**make_complexes())
    (eps_x.square().sum() + eps_h.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def autoencoder_gradients(**options: object) -> dict[str, Tensor]:
    model, (features, x, mask) = make_autoencoder(POCKET_CLASSES, **options), make_atoms(POCKET_CLASSES)
    z = model.encode(features, x, mask)
    losses = reconstruction_sums(model.decode(*z, mask), features, x, mask)
    (sum(losses.values()) + kl_sum(*z, mask)).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("gradients", "model"),
    [(denoiser_gradients, make_denoiser()), (autoencoder_gradients, make_autoencoder(POCKET_CLASSES))],
    ids=["denoiser", "autoencoder"],
)
def test_every_parameter_learns_and_checkpointing_changes_no_number(
    gradients: Callable[..., dict[str, Tensor]], model: nn.Module
) -> None:
    kept, again = gradients(), gradients(checkpoint=True)
    assert kept.keys() == dict(model.named_parameters()).keys()
    for name, gradient in kept.items():
        assert gradient.isfinite().all() and gradient.any(), name
        assert torch.equal(again[name], gradient), name


def test_parameters_have_a_gradient_even_where_no_pocket_is_dropped() -> None:
    """DeepSpeed waits for the gradient of every parameter."""
    model, complexes = make_denoiser(), make_complexes() | {"keep_b": torch.ones(3, dtype=torch.bool)}
    sum(eps.square().sum() for eps in model(**complexes)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.parameters())


def test_half_precision_networks_return_float32_near_the_full_ones() -> None:
    complexes, atoms = make_complexes(torch.float32), make_atoms(LIGAND_CLASSES, dtype=torch.float32)
    autoencoder, denoiser = make_autoencoder(LIGAND_CLASSES, torch.float32), make_denoiser(torch.float32)
    full = [*denoiser(**complexes), *autoencoder.encode(*atoms)]
    half = [*denoiser.bfloat16()(**complexes), *autoencoder.bfloat16().encode(*atoms)]
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()
