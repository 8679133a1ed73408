"""VAMP scores against reference numbers, deeptime, finite differences and NumPy, down to degenerate features."""

import numpy as np
import pytest
import torch
from deeptime.decomposition import VAMP
from deeptime.decomposition.deep import vamp_score
from torch import Tensor

from gdyn.engines.vamp import score
from gdyn.engines.vamp.score import Inversion

OBJECTIVES = [
    pytest.param(score.vamp1, id="vamp1"),
    pytest.param(score.vamp2, id="vamp2"),
    pytest.param(score.vampe, id="vampe"),
    pytest.param(lambda c, invert: score.vamp_sym(c, invert, legacy=False), id="vamp_sym"),
]
EXACT = Inversion("trunc", 1e-10)


def close(found: Tensor | float, expected: object, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=atol)


def covariances(x: Tensor, y: Tensor) -> score.Covariances:
    return score.covariances(score.moments(x, y))


def gradients(objective, x: Tensor, y: Tensor, invert: Inversion) -> tuple[Tensor, Tensor]:
    """Of the score with respect to every row of x and y, through `share`."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    c = covariances(x.detach(), y.detach())
    score.share(objective(c, invert), c, x, y).backward()
    assert x.grad is not None and y.grad is not None
    return x.grad, y.grad


def legacy(c: score.Covariances, invert: Inversion) -> score.Slope:
    return score.vamp_sym(c, invert, legacy=True)


def random_rows(seed: int, rows: int = 200, d: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated features of very different sizes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, d)) @ random.normal(size=(d, d))
    y = 0.6 * x + random.normal(size=(rows, d)) @ random.normal(size=(d, d))
    return torch.from_numpy(x * np.geomspace(1, 0.05, d)), torch.from_numpy(y)


# Reference numbers, recomputed independently of this program from the original's formulas (thresholds absolute).


@pytest.fixture
def simplex() -> tuple[Tensor, Tensor]:
    """64 rows of 4 probabilities."""
    i, j = torch.arange(64, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)
    x = (2 * torch.sin(0.37 * i * (j + 1) + j)).softmax(1)
    y = (2 * torch.sin(0.37 * (i + 1) * (j + 1) + 0.9 * j)).softmax(1)
    close(x[0], [0.0720946557, 0.3879676221, 0.4443332180, 0.0956045042])
    close(x.sum(0), [15.6063513595, 16.9275371570, 14.8141918928, 16.6519195907])
    return x, y


@pytest.fixture
def waves() -> tuple[Tensor, Tensor]:
    """32 rows of 3 features that are no probabilities."""
    i = torch.arange(32, dtype=torch.float64)
    x = torch.stack([torch.sin(0.5 * i), torch.cos(0.3 * i), torch.sin(0.11 * i**1.5)], 1)
    return x, x.roll(-1, 0)


PLAIN = (1.9130024536, 1.3099528321, 1.8125780017, -7.080382819e-3)


@pytest.mark.parametrize(
    ("mode", "epsilon", "expected"),
    [
        ("trunc", 1e-10, PLAIN),
        ("trunc", 1e-6, PLAIN),
        ("trunc", 1e-2, PLAIN),
        ("regularize", 1e-6, (1.9129714641, 1.3099105513, 1.8125780012, -7.080382817e-3)),
        ("regularize", 1e-2, (1.6484654570, 0.9746967370, 1.7760007343, -6.937502868e-3)),
        ("clamp", 1e-6, PLAIN),
        ("clamp", 1e-2, PLAIN),
    ],
)
def test_scores_of_probabilities_are_the_originals(simplex, mode, epsilon, expected) -> None:
    c, invert = covariances(*simplex), Inversion(mode, epsilon, relative=False)
    symmetrised = legacy(c, invert).score
    found = [score.vamp1(c, invert).score, score.vamp2(c, invert).score, symmetrised, -symmetrised / (64 * 4)]
    close(torch.stack(found), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("mode", "vamp1", "vamp2"),
    [
        ("trunc", 2.5005548392, 2.0938085293),
        ("clamp", 2.5005548392, 2.0938085293),
        ("regularize", 2.5005547843, 2.0938084383),
    ],
)
def test_scores_of_other_features_are_the_originals(waves, mode, vamp1, vamp2) -> None:
    c, invert = covariances(*waves), Inversion(mode, 1e-8, relative=False)
    close(score.vamp1(c, invert).score, vamp1, rtol=1e-10)
    close(score.vamp2(c, invert).score, vamp2, rtol=1e-10)
    close(legacy(c, invert).score, 2.4695386902, rtol=1e-7)


def test_covariances_are_the_originals(waves) -> None:
    c = covariances(*waves)
    close(
        c.c00,
        [
            [0.490705, -0.00364648, 0.1382711],
            [-0.00364648, 0.52539541, 0.10748378],
            [0.1382711, 0.10748378, 0.47259499],
        ],
        atol=5e-9,
    )
    close(
        c.c0t,
        [
            [0.42964072, 0.00967039, 0.1846982],
            [-0.00356797, 0.43874712, 0.14095905],
            [0.05683174, 0.07302816, 0.3710703],
        ],
        atol=5e-9,
    )


@pytest.mark.parametrize(
    ("objective", "first_row"),
    [
        pytest.param(score.vamp2, (0.0304467036, 0.0823954882, -0.1036775159, -0.0091646759), id="vamp2"),
        pytest.param(legacy, (0.0320679093, 0.1254192965, -0.0833355872, -0.0741516186), id="vamp_sym, legacy"),
        pytest.param(
            OBJECTIVES[3].values[0], (0.0370624377, 0.0558117968, -0.0596372843, -0.0332369503), id="vamp_sym"
        ),
    ],
)
def test_gradients_are_the_originals(simplex, objective, first_row) -> None:
    x, _ = gradients(objective, *simplex, Inversion("trunc", 1e-6, relative=False))
    close(x[0], first_row, rtol=1e-8)


def test_vamp_sym_is_scale_invariant_and_its_legacy_field_grows_the_output(simplex) -> None:
    """The legacy field along the output is 2 R_sym where a gradient of an invariant score has 0."""
    invert = Inversion("trunc", 1e-6, relative=False)
    r_sym = float(legacy(covariances(*simplex), invert).score)
    for objective, expected in ((OBJECTIVES[3].values[0], 0.0), (legacy, 2 * r_sym)):
        slopes = gradients(objective, *simplex, invert)
        along = sum((g * (rows - rows.mean(0))).sum() for g, rows in zip(slopes, simplex, strict=True))
        assert float(along) == pytest.approx(expected, abs=1e-9)


# Independent implementations.


@pytest.mark.parametrize("name", ["VAMP1", "VAMP2"])
@pytest.mark.parametrize(("mode", "epsilon"), [("trunc", 1e-6), ("trunc", 0.05), ("regularize", 1e-2), ("clamp", 1e-6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_those_of_deeptimes_vampnet_without_its_one_for_the_constant(name, mode, epsilon, seed) -> None:
    x, y = random_rows(seed)
    found = score.SCORES[name.lower()](covariances(x, y), Inversion(mode, epsilon, relative=False)).score
    close(found, vamp_score(x, y, method=name, epsilon=epsilon, mode=mode) - 1, rtol=1e-9)


# Not its vamp_score: that swaps left and right singular functions in VAMP-E (deeptime 0.4.5).
@pytest.mark.parametrize(("name", "r"), [("vamp1", 1), ("vamp2", 2), ("vampe", "E")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_those_of_deeptimes_estimator(name, r, seed) -> None:
    x, y = random_rows(seed)
    model = VAMP(epsilon=1e-12).fit((x.numpy(), y.numpy())).fetch_model()
    close(score.SCORES[name](covariances(x, y), EXACT).score, model.score(r) - 1, rtol=1e-9)


def test_singular_values_are_those_of_the_whitened_features() -> None:
    x, y = (rows.numpy() for rows in random_rows(3))
    whitened = [np.linalg.svd(rows - rows.mean(0), full_matrices=False)[0] for rows in (x, y)]
    values, rank = score.singular_values(covariances(*map(torch.from_numpy, (x, y))), EXACT)
    close(values, np.linalg.svd(whitened[0].T @ whitened[1], compute_uv=False))
    assert rank == 5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mode", ["trunc", "clamp"])
def test_gradient_is_the_finite_difference_of_the_score(objective, mode) -> None:
    check_by_finite_differences(objective, Inversion(mode, 1e-10))


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_gradient_of_a_regularized_score_is_its_finite_difference(objective) -> None:
    check_by_finite_differences(objective, Inversion("regularize", 0.05, relative=False))


def check_by_finite_differences(objective, invert: Inversion, step: float = 1e-6) -> None:
    rows = random_rows(4, rows=40, d=4)
    slopes = gradients(objective, *rows, invert)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(r.shape, generator=random, dtype=torch.float64) for r in rows]
        moved = [[r + sign * step * d for r, d in zip(rows, direction, strict=True)] for sign in (1, -1)]
        above, below = (float(objective(covariances(*pair), invert).score) for pair in moved)
        along = sum(float((g * d).sum()) for g, d in zip(slopes, direction, strict=True))
        assert along == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)


# One score for the whole window.


@pytest.mark.parametrize("cuts", [[50], [1, 2, 3], [20, 77, 180]])
def test_moments_add_up_over_any_split(cuts) -> None:
    x, y = random_rows(5)
    parts = [score.moments(*pair) for pair in zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True)]
    close(torch.stack(parts).sum(0), score.moments(x, y))
    c = covariances(x, y)
    close(c.c00, np.cov(x.numpy().T))
    close(torch.cat([c.mean_x, c.mean_y]), np.concatenate([x.numpy().mean(0), y.numpy().mean(0)]))


@pytest.mark.parametrize("objective", [*OBJECTIVES, pytest.param(legacy, id="vamp_sym, legacy")])
def test_gradient_of_the_whole_is_that_of_the_shares(objective) -> None:
    x, y = random_rows(6)
    c = covariances(x, y)
    slope = objective(c, EXACT)
    whole = gradients(objective, x, y, EXACT)
    for part in torch.arange(len(x)).tensor_split([33, 120]):
        x_part, y_part = x[part].requires_grad_(), y[part].requires_grad_()
        score.share(slope, c, x_part, y_part).backward()
        close(x_part.grad, whole[0][part])
        close(y_part.grad, whole[1][part])
    shares = [score.share(slope, c, x[part], y[part]) for part in torch.arange(len(x)).tensor_split([33, 120])]
    close(sum(shares), score.share(slope, c, x, y))


# Probabilities, whose covariance is exactly singular.


@pytest.mark.parametrize("states", [2, 3, 10])
def test_simplex_basis_is_orthonormal_and_orthogonal_to_the_constant(states) -> None:
    basis = score.simplex_basis(states)
    close(basis.T @ basis, np.eye(states - 1))
    close(basis.sum(0), np.zeros(states - 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_leaving_out_the_null_direction_changes_neither_score_nor_gradient(simplex, objective) -> None:
    x, y = simplex
    basis = score.simplex_basis(4)
    full, reduced = covariances(x, y), covariances(x @ basis, y @ basis)
    close(objective(reduced, EXACT).score, objective(full, EXACT).score)
    for mine, whole in zip(
        gradients(objective, x @ basis, y @ basis, EXACT), gradients(objective, x, y, EXACT), strict=True
    ):
        close(mine @ basis.T, whole, rtol=1e-6)


STATES, ROWS = 10, 640
SLOW = np.linspace(0.98, 0.6, STATES)


def battery() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Probabilities at t and t + tau, (ROWS, STATES), and the number of functions they span."""
    random = np.random.default_rng(7)
    z = 2.0 * random.normal(size=(ROWS, STATES))
    later = SLOW * z + np.sqrt(1 - SLOW**2) * 2.0 * random.normal(size=(ROWS, STATES))

    def softmax(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    unused = np.r_[np.zeros(STATES - 3), np.full(3, np.log(1e-9))]
    duplicates = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    cases = {
        "well spread": (lambda v: softmax(v), STATES - 1),
        "duplicated states": (lambda v: softmax(v[:, :5])[:, duplicates] / 2, 4),
        "near-collapsed, 1e-3": (lambda v: softmax(1e-3 * v), STATES - 1),
        "near-collapsed, 1e-5": (lambda v: softmax(1e-5 * v), STATES - 1),
        "3 states unused": (lambda v: softmax(v + unused), STATES - 4),
    }
    return {name: (f(z), f(later), rank) for name, (f, rank) in cases.items()}


def rows_of(probabilities: np.ndarray) -> Tensor:
    """As the engine makes them of a network's float32 outputs."""
    outputs = torch.from_numpy(probabilities.astype(np.float32))
    return (outputs.double() - 1 / STATES) @ score.simplex_basis(STATES)


def truth(x: np.ndarray, y: np.ndarray) -> float:
    """VAMP-2 by singular value decompositions of the float64 rows, but for directions below 1e-5 of the largest."""
    bases = []
    for p in (x, y):
        u, size, _ = np.linalg.svd(p - p.mean(0), full_matrices=False)
        bases.append(u[:, size > 1e-5 * size[0]])
    return float(np.linalg.norm(bases[0].T @ bases[1]) ** 2)


@pytest.mark.parametrize("case", battery())
def test_degenerate_probabilities_get_their_true_score(case) -> None:
    x, y, rank = battery()[case]
    c = covariances(rows_of(x), rows_of(y))
    assert float(score.vamp2(c, EXACT).score) == pytest.approx(truth(x, y), rel=1e-3)
    assert score.singular_values(c, EXACT)[1] == rank


@pytest.mark.parametrize("case", battery())
@pytest.mark.parametrize("mode", ["trunc", "regularize", "clamp"])
@pytest.mark.parametrize("objective", [*OBJECTIVES, pytest.param(legacy, id="vamp_sym, legacy")])
def test_degenerate_probabilities_cannot_exceed_the_bound_or_break_the_gradient(case, mode, objective) -> None:
    x, y, _ = battery()[case]
    invert = Inversion(mode, 1e-10)
    assert float(objective(covariances(rows_of(x), rows_of(y)), invert).score) <= STATES - 1 + 1e-6
    for slopes in gradients(objective, rows_of(x), rows_of(y), invert):
        assert torch.isfinite(slopes).all()


@pytest.mark.parametrize("mode", ["trunc", "regularize", "clamp"])
@pytest.mark.parametrize("objective", [*OBJECTIVES, pytest.param(legacy, id="vamp_sym, legacy")])
def test_constant_outputs_score_nothing_and_have_a_finite_gradient(mode, objective) -> None:
    rows = torch.full((50, 3), 0.25, dtype=torch.float64)
    c = covariances(rows, rows)
    invert = Inversion(mode, 1e-10)
    assert float(objective(c, invert).score) == pytest.approx(0.0, abs=1e-9)
    assert all(torch.isfinite(slopes).all() for slopes in gradients(objective, rows, rows, invert))
    assert score.singular_values(c, EXACT)[1] == 0
