"""VAMP scores and their gradients from additive statistics, in float64.

A VAMP score depends on a batch only through sums over its rows. The sums of micro-batches and ranks add up to the sums
of the global window, so score and gradient are those of the window, however it is split. References: Wu and Noé, J.
Nonlinear Sci. 30 (2020) 23 (VAMP-1, -2, -E); Mardt et al., Nat. Commun. 9 (2018) 5 (VAMPnets); Xie et al., Nat. Commun.
10 (2019) 2667 (GDyNet).

Legend: x (N, d) features at t, y (N, d) at t + tau; C00, C0t, Ctt (d, d) their covariances with the mean removed, so
that no score includes the constant singular function (deeptime adds 1 for it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["trunc", "regularize", "clamp"]


def simplex_basis(states: int, device: torch.device | None = None) -> Tensor:
    """Orthonormal basis (k, k - 1) of the directions in which k probabilities that sum to one can vary, float64
    (Helmert).

    Scores are invariant under the change of basis, and the exact null direction of C00, whose rounding noise would
    count as a state, is gone: no score can exceed k - 1.
    """
    column = torch.arange(1, states, dtype=torch.float64, device=device)
    row = torch.arange(states, dtype=torch.float64, device=device)[:, None]
    basis = (row < column).double() - column * (row == column).double()
    return basis / (column * (column + 1)).sqrt()


def moments(x: Tensor, y: Tensor) -> Tensor:
    """Additive statistics of rows: N, sum x, sum y, x'x, x'y, y'y as one flat float64 vector (1 + 2 d + 3 d d)."""
    x, y = x.double(), y.double()
    count = x.new_tensor([x.shape[0]])
    return torch.cat([count, x.sum(0), y.sum(0), (x.T @ x).flatten(), (x.T @ y).flatten(), (y.T @ y).flatten()])


class Covariances(NamedTuple):
    """Of N rows: means (d,) and covariances (d, d) with the means removed, normalised by N - 1."""

    n: float
    mean_x: Tensor
    mean_y: Tensor
    c00: Tensor
    c0t: Tensor
    ctt: Tensor


def covariances(sums: Tensor) -> Covariances:
    """From (summed) `moments`, on the CPU: d x d float64 algebra is cheap there and eigh is fragile on some GPUs."""
    sums = sums.cpu()
    d = round((math.sqrt(1 + 3 * (len(sums) - 1)) - 1) / 3)
    count, sum_x, sum_y, xx, xy, yy = sums.split([1, d, d, d * d, d * d, d * d])
    n = float(count)
    mean_x, mean_y = sum_x / max(n, 1), sum_y / max(n, 1)

    def centred(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (products.view(d, d) - n * torch.outer(left, right)) / max(n - 1, 1)

    return Covariances(
        n, mean_x, mean_y, centred(xx, mean_x, mean_x), centred(xy, mean_x, mean_y), centred(yy, mean_y, mean_y)
    )


@dataclass(frozen=True)
class Inversion:
    """How symmetric matrices are inverted: eigenvalues at or below the threshold are dropped (trunc), the threshold is
    added to all (regularize), or they are raised to it (clamp)."""

    mode: Mode = "trunc"
    epsilon: float = 1e-10
    relative: bool = True
    """The threshold is epsilon times the largest eigenvalue; else epsilon itself, the original program's rule, which
    loses the gradient of nearly collapsed states."""

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor, int]:
        """(inverse, inverse square root, rank above the threshold) of a symmetric matrix."""
        values, vectors = torch.linalg.eigh(matrix)
        largest = float(values[-1])
        threshold = self.epsilon * largest if self.relative else self.epsilon
        # A constant output has no covariance at all; a tiny floor keeps what follows finite.
        floor = max(threshold, torch.finfo(matrix.dtype).tiny)
        above = values > floor
        if self.mode == "regularize":
            kept = (values + threshold).abs().clamp_min(floor)
        elif self.mode == "clamp":
            kept = values.clamp_min(floor)
        else:
            vectors, kept = vectors[:, above], values[above]
        return (vectors / kept) @ vectors.T, (vectors / kept.sqrt()) @ vectors.T, int(above.sum())


class Slope(NamedTuple):
    """A score and its derivatives with respect to the covariances."""

    score: Tensor
    g00: Tensor
    g0t: Tensor
    gtt: Tensor


def vamp1(c: Covariances, invert: Inversion) -> Slope:
    """Sum of the singular values of C00^-1/2 C0t Ctt^-1/2."""
    _, l0, _ = invert(c.c00)
    _, lt, _ = invert(c.ctt)
    u, sigma, v = _svd(l0 @ c.c0t @ lt)
    left, right = l0 @ u, lt @ v
    return Slope(sigma.sum(), -0.5 * (left * sigma) @ left.T, left @ right.T, -0.5 * (right * sigma) @ right.T)


def vamp2(c: Covariances, invert: Inversion) -> Slope:
    """Sum of the squared singular values, tr(C00^-1 C0t Ctt^-1 Ct0). The closed form of the gradient needs no
    derivative of an eigen-decomposition, which is not finite for equal eigenvalues."""
    a, _, _ = invert(c.c00)
    b, _, _ = invert(c.ctt)
    model = a @ c.c0t @ b
    return Slope((model * c.c0t).sum(), -model @ c.c0t.T @ a, 2 * model, -b @ c.c0t.T @ model)


def vampe(c: Covariances, invert: Inversion) -> Slope:
    """VAMP-E, 2 tr(M' C0t) - tr(M' C00 M Ctt), of the Koopman model M = C00^-1 C0t Ctt^-1 estimated from the same
    statistics. Without regularization it equals VAMP-2; with it, it is the honest one of the two. The gradient holds M,
    which is optimal, fixed."""
    a, _, _ = invert(c.c00)
    b, _, _ = invert(c.ctt)
    model = a @ c.c0t @ b
    score = 2 * (model * c.c0t).sum() - (model * (c.c00 @ model @ c.ctt)).sum()
    return Slope(score, -model @ c.ctt @ model.T, 2 * model, -model.T @ c.c00 @ model)


def vamp_sym(c: Covariances, invert: Inversion, legacy: bool = True) -> Slope:
    """GDyNet's symmetrised score: the sum of the singular values D of A^-1/2 C A^-1/2 = U D V', A = (C00 + Ctt)/2,
    C = (C0t + Ct0)/2. With A regularized, 2 tr D - tr(U D U' A^-1/2 A A^-1/2), the number behind the original's printed
    loss -score/(N k). `legacy` doubles the cross term of the gradient as the original program does: that is not the
    gradient of any score, and rewards crisper states."""
    mean = (c.c00 + c.ctt) / 2
    _, root, _ = invert(mean)
    u, sigma, v = _svd(root @ ((c.c0t + c.c0t.T) / 2) @ root)
    left, right = root @ u, root @ v
    diagonal = -0.5 * (left * sigma) @ left.T
    cross = left @ right.T
    value = 2 * sigma.sum() + 2 * (diagonal * mean).sum()
    return Slope(value, diagonal, 2 * cross if legacy else cross, diagonal)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V without the directions whose singular value is rounding noise: their sign is noise, too."""
    u, sigma, vh = torch.linalg.svd(matrix)
    kept = sigma > 1e-14 * sigma.max().clamp_min(1e-300)
    return u[:, kept], sigma[kept], vh.T[:, kept]


SCORES: dict[str, Callable[[Covariances, Inversion], Slope]] = {
    "vamp1": vamp1,
    "vamp2": vamp2,
    "vamp_sym": vamp_sym,
    "vampe": vampe,
}


def singular_values(c: Covariances, invert: Inversion) -> tuple[Tensor, int]:
    """Singular values of the whitened Koopman matrix, largest first (d,), and the effective rank: how many independent
    functions the features really span."""
    _, l0, rank0 = invert(c.c00)
    _, lt, rankt = invert(c.ctt)
    return torch.linalg.svdvals(l0 @ c.c0t @ lt), min(rank0, rankt)


def share(slope: Slope, c: Covariances, x: Tensor, y: Tensor) -> Tensor:
    """A scalar whose gradient with respect to the rows x, y (n, d) is exactly that of the score of all N rows. The
    shares of all rows add up. The means are constants here: their own gradient cancels in the sum over all rows."""

    def on_device(constant: Tensor) -> Tensor:
        return constant.to(x.device)

    x = x.double() - on_device(c.mean_x)
    y = y.double() - on_device(c.mean_y)
    products = (x @ on_device(slope.g00)) * x + (x @ on_device(slope.g0t)) * y + (y @ on_device(slope.gtt)) * y
    return products.sum() / max(c.n - 1, 1)
