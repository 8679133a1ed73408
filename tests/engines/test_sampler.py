"""Both samplers against a Gaussian whose noise is known, their formulas, and what a sample may depend on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdyn.engines.diffusion.sampler import DATA, coefficients, counted_noise, descending, draw, guided
from gdyn.nn.noise import NoiseSchedule

KINDS = ("ancestral", "ddim")
SCHEDULE = NoiseSchedule(timesteps=1000)
FEATURES = 2


def mask_of(sizes: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(sizes)[:, None]


class Gaussian:
    """Data N(mean, covariance) of the coordinates, about their mean, and features of `atoms` atoms, side by side."""

    def __init__(self, atoms: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.atoms, size = atoms, atoms * (3 + FEATURES)
        centring = np.eye(atoms) - 1 / atoms
        self.subspace = np.eye(size)
        self.subspace[: 3 * atoms, : 3 * atoms] = np.kron(centring, np.eye(3))
        root = self.subspace @ rng.normal(size=(size, size)) * 0.5
        self.mean, self.covariance = self.subspace @ rng.normal(size=size), root @ root.T

    def predict(self, t_b: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """E[eps | z_t] = sigma (alpha^2 C + sigma^2)^-1 (z_t - alpha mu), within the subspace."""
        alpha, sigma = SCHEDULE.alpha(t_b[0]).item(), SCHEDULE.sigma(t_b[0]).item()
        spread = alpha**2 * self.covariance + sigma**2 * self.subspace
        z = self.flat(x, h) - alpha * self.mean
        eps = sigma * z @ np.linalg.pinv(spread)
        eps_x, eps_h = np.split(eps, [3 * self.atoms], axis=1)
        padding = (0, 0, 0, x.shape[1] - self.atoms)
        clouds = (eps_x.reshape(len(x), -1, 3), eps_h.reshape(len(x), -1, FEATURES))
        # The noise of a real network need not have mean zero, and at padding it is anything.
        noise = [F.pad(torch.from_numpy(cloud).float(), padding, value=7.0) for cloud in clouds]
        return noise[0] + 0.3, noise[1]

    def flat(self, x: Tensor, h: Tensor) -> np.ndarray:
        real = (x[:, : self.atoms].flatten(1), h[:, : self.atoms].flatten(1))
        return torch.cat(real, 1).double().numpy()


def sample(predict, keys, sizes, centre=None, kind="ancestral", steps=1000, n=None, turn=None):
    """Samples of these sizes, with noise that is turned."""
    mask = mask_of(sizes, n or max(sizes))
    noise = counted_noise(torch.as_tensor(keys), mask, FEATURES)
    turn = torch.eye(3) if turn is None else turn

    def turned(time: int) -> tuple[Tensor, Tensor]:
        x, h = noise(time)
        return x @ turn.T, h

    centre = torch.zeros(len(sizes), 3) if centre is None else centre
    return draw(predict, SCHEDULE, turned, mask, centre, descending(1000, steps), kind)


@pytest.mark.parametrize(
    ("kind", "steps", "tolerance"),
    [("ancestral", 250, 0.03), ("ancestral", 100, 0.06), ("ddim", 1000, 0.01), ("ddim", 100, 0.05)],
)
def test_a_gaussian_comes_back_with_its_mean_and_covariance(kind: str, steps: int, tolerance: float) -> None:
    """A sample is a linear function of all its noise, so it is enough to see what each number of it does. One atom is
    padding."""
    toy, atoms = Gaussian(3), 3
    times = descending(1000, steps)
    size, arrivals = len(toy.mean), [*times, DATA] if kind == "ancestral" else times[:1]
    rows = 1 + size * len(arrivals)

    def noise(time: int) -> tuple[Tensor, Tensor]:
        """Row 1 + size k + j has 1 in place j on the k-th arrival, nothing else."""
        flat, first = torch.zeros(rows, size), 1 + size * arrivals.index(time)
        flat[first : first + size] = torch.eye(size)
        x, h = flat.split([3 * atoms, FEATURES * atoms], 1)
        return tuple(F.pad(part.reshape(rows, atoms, -1), (0, 0, 0, 1)) for part in (x, h))

    mask = mask_of([atoms] * rows, atoms + 1)
    x, h = draw(toy.predict, SCHEDULE, noise, mask, torch.zeros(rows, 3), times, kind)
    mean, *columns = toy.flat(x, h)
    root = np.array(columns) - mean
    assert not x[:, atoms:].any() and not h[:, atoms:].any()
    # z_T has a hundredth of the data in it, but is drawn without
    np.testing.assert_allclose(mean, toy.mean, atol=0.03 * math.sqrt(toy.covariance.max()))
    np.testing.assert_allclose(root.T @ root, toy.covariance, atol=tolerance * toy.covariance.max())


def test_coefficients_are_those_of_the_papers() -> None:
    """Ancestral: Ho et al.'s (2020) posterior of z_s given z_t and the predicted data. DDIM: equation 12 of Song et al.
    (2021) without noise."""
    abar = {t: SCHEDULE.alpha(torch.tensor(t)).item() ** 2 for t in range(1001)}
    for t, s in [(1000, 999), (1000, 990), (500, 0), (500, 490), (1, 0)]:
        # z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t): 1 of z_t and none of eps, and the other way round
        alpha = abar[t] / abar[s]
        of_data = math.sqrt(abar[s]) * (1 - alpha) / (1 - abar[t])
        of_now = math.sqrt(alpha) * (1 - abar[s]) / (1 - abar[t])
        spread = math.sqrt((1 - abar[s]) / (1 - abar[t]) * (1 - alpha))
        noise = -math.sqrt(1 - abar[t]) / math.sqrt(abar[t])
        posterior = (of_data / math.sqrt(abar[t]) + of_now, of_data * noise, spread)
        np.testing.assert_allclose(coefficients(SCHEDULE, t, s, "ancestral"), posterior, rtol=1e-6)
        song = (math.sqrt(abar[s] / abar[t]), math.sqrt(abar[s]) * noise + math.sqrt(1 - abar[s]), 0.0)
        np.testing.assert_allclose(coefficients(SCHEDULE, t, s, "ddim"), song, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_what_the_schedule_says_of_any_time(kind: str) -> None:
    """z_t = alpha_t z + sigma_t eps with that very eps predicted becomes alpha_s z + noise of the size sigma_s, for any
    s, and at last z."""
    for t, s in [(1000, 999), (1000, 300), (300, 0), (1, 0), (0, DATA)]:
        keep, change, spread = coefficients(SCHEDULE, t, s, kind)
        now = torch.tensor(t)
        of_data = keep * SCHEDULE.alpha(now).item()
        of_noise = keep * SCHEDULE.sigma(now).item() + change
        alpha_s = 1.0 if s == DATA else SCHEDULE.alpha(torch.tensor(s)).item()
        np.testing.assert_allclose(of_data, alpha_s, rtol=1e-12)
        if s != DATA:
            np.testing.assert_allclose(math.hypot(of_noise, spread), SCHEDULE.sigma(torch.tensor(s)).item(), rtol=1e-6)
    last = [coefficients(SCHEDULE, 0, DATA, kind)[i] for i in range(3)]
    alpha_0, sigma_0 = (f(torch.tensor(0)).item() for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    spread = sigma_0 / alpha_0 if kind == "ancestral" else 0.0
    np.testing.assert_allclose(last, [1 / alpha_0, -sigma_0 / alpha_0, spread], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 999, 1000])
def test_times_descend_from_the_last_to_0_in_steps_of_about_one_length(steps: int) -> None:
    times = np.array(descending(1000, steps))
    assert (times[0], times[-1], len(times)) == (1000, 0, steps + 1)
    gaps = -np.diff(times)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def wiggly(t_b: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """An equivariant function of each sample alone, which looks at real atoms (those with features) only."""
    real = (h != 0).any(-1, keepdim=True)
    lengths = x.square().sum(-1, keepdim=True)
    return 0.3 * x * (1 + lengths).rsqrt() * real, (0.5 * h + 0.1 * (t_b / 1000).sin()[:, None, None] * lengths) * real


SIZES, KEYS = [5, 3, 8, 1], [11, -4, 2**62, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_neither_on_its_batch_nor_on_padding(kind: str) -> None:
    centre = torch.arange(12.0).view(4, 3)
    x, h = sample(wiggly, KEYS, SIZES, centre, kind, steps=20)
    for i, size in enumerate(SIZES):
        own_x, own_h = sample(wiggly, KEYS[i : i + 1], SIZES[i : i + 1], centre[i : i + 1], kind, steps=20, n=11)
        torch.testing.assert_close(own_x[0, :size], x[i, :size], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own_h[0, :size], h[i, :size], rtol=1e-4, atol=1e-4)
        assert not own_x[0, size:].any() and not own_h[0, size:].any()
    again, _ = sample(wiggly, KEYS, SIZES, centre, kind, steps=20)
    assert torch.equal(again, x)
    other, _ = sample(wiggly, [key + 1 for key in KEYS], SIZES, centre, kind, steps=20)
    assert (other - x)[:3].abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_turns_with_its_noise(kind: str) -> None:
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    x, h = sample(wiggly, KEYS, SIZES, kind=kind, steps=20)
    turned_x, turned_h = sample(wiggly, KEYS, SIZES, kind=kind, steps=20, turn=turn)
    torch.testing.assert_close(turned_x, x @ turn.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned_h, h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_centre_of_a_sample_is_the_one_given_and_the_network_sees_it(kind: str) -> None:
    centre = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    mask = mask_of(SIZES, 8)

    def mean(x: Tensor) -> Tensor:
        return torch.stack([row[real].mean(0) for row, real in zip(x, mask, strict=True)])

    def predict(t_b: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close(mean(x), centre, rtol=0, atol=1e-5)
        return 0.1 * x + 3.0, 0.1 * h  # has a mean of its own

    x, _ = sample(predict, KEYS, SIZES, centre, kind, steps=50)
    torch.testing.assert_close(mean(x), centre, rtol=0, atol=1e-5)


def test_guidance_asks_the_network_once_where_once_suffices() -> None:
    asked = []

    def told(name: str, value: float):
        def predict(t_b, x, h):
            asked.append(name)
            return x + value, h - value

        return predict

    t, x, h = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 3), torch.zeros(1, 1, 1)
    for scale, expected, names in (
        (0, 2.0, ["null"]),
        (1, 3.0, ["pocket"]),
        (7.5, 9.5, ["pocket", "null"]),
        (0.5, 2.5, ["pocket", "null"]),
    ):
        asked.clear()
        eps_x, eps_h = guided(told("pocket", 3.0), told("null", 2.0), scale)(t, x, h)
        assert sorted(asked) == sorted(names)
        assert eps_x[0, 0, 0] == expected and eps_h[0, 0, 0] == -expected
