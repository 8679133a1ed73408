"""The alphabet: nearest codes, moving averages against NumPy, codes that die and are revived, and states that continue.

The original's start-up collapse is simulated from its formulas, so that the claim that ours has none can fail.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdyn.ds_engine import whole
from gdyn.engines.monodecoder.quantizer import Quantizer
from gdyn.errors import UserError

K, D = 40, 128
NEVER = 10**9


def step(quantizer: Quantizer, x: Tensor) -> Tensor:
    """One optimizer step's worth of learning; returns the codes the vectors had before it."""
    _, codes = quantizer(x)
    quantizer.update(quantizer.statistics(x, codes))
    return codes


def clusters(seed: int, rows: int, dim: int = 8, number: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(number, dim, generator=torch.Generator().manual_seed(7))
    return centres[torch.randint(number, (rows,), generator=g)] + 0.1 * torch.randn(rows, dim, generator=g)


# ---- nearest codes


@pytest.mark.parametrize("ema", [True, False])
def test_the_nearest_code_is_chosen_and_the_first_of_equals(ema):
    torch.manual_seed(0)
    quantizer, x = Quantizer(11, 6, ema=ema), 0.1 * torch.randn(300, 6)
    table = quantizer.sums if ema else quantizer.weight.data
    table[7] = table[2]
    quantized, codes = quantizer(x)
    codebook = quantizer.codebook().double().numpy()
    squares = ((x.double().numpy()[:, None] - codebook) ** 2).sum(-1)
    assert codes.dtype == torch.int64
    np.testing.assert_array_equal(codes, squares.argmin(1))
    assert 2 in codes
    assert 7 not in codes
    np.testing.assert_array_equal(quantized.detach(), quantizer.codebook()[codes])


def test_codes_close_together_and_far_from_the_origin_are_told_apart():
    torch.manual_seed(0)
    quantizer, centre = Quantizer(K, D), torch.randn(D)
    quantizer.sums.copy_(centre + 1e-3 * torch.randn(K, D))
    x = centre + 1e-3 * torch.randn(400, D)
    squares = (x.double()[:, None] - quantizer.codebook().double()).square().sum(-1)
    assert torch.equal(quantizer(x)[1], squares.argmin(1))
    expanded = x.square().sum(1, keepdim=True) - 2 * x @ quantizer.codebook().T + quantizer.codebook().square().sum(1)
    assert (expanded.argmin(1) != squares.argmin(1)).float().mean() > 0.05


def test_an_alphabet_of_one_code_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        Quantizer(1, 4)


# ---- what the codes learn


def test_moving_averages_are_those_of_numpy():
    """Oord et al. 2017, appendix A.1, with Laplace smoothing of the counts when they are used, never in the state."""
    torch.manual_seed(1)
    decay, epsilon = 0.95, 1e-3
    quantizer = Quantizer(12, 8, decay=decay, epsilon=epsilon, revive_after=NEVER)
    counts, sums = np.ones(12), quantizer.sums.double().numpy().copy()
    for t in range(40):
        x = clusters(t, 60)
        smoothed = (counts + epsilon) / (counts.sum() + 12 * epsilon) * counts.sum()
        codebook = sums / smoothed[:, None]
        np.testing.assert_allclose(quantizer.codebook(), codebook, rtol=2e-5, atol=1e-7)
        codes = ((x.double().numpy()[:, None] - codebook) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(step(quantizer, x), codes)
        chosen = np.eye(12)[codes]
        counts = decay * counts + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ x.double().numpy()
    assert len(set(codes)) > 1
    np.testing.assert_allclose(quantizer.usage(), counts / counts.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ema", [True, False])
def test_micro_batches_teach_what_the_whole_batch_does(ema):
    torch.manual_seed(2)
    whole_batch = Quantizer(12, 8, ema=ema, revive_after=3)
    parts = copy.deepcopy(whole_batch)
    for t in range(30):
        x = clusters(t, 64)
        step(whole_batch, x)
        micro_batches = [(part, parts(part)[1]) for part in x.split([10, 30, 1, 23])]
        parts.update(torch.stack([parts.statistics(*batch) for batch in micro_batches]).sum(0))
    assert not torch.equal(whole_batch.seed, Quantizer(12, 8).seed)
    torch.testing.assert_close(parts.codebook(), whole_batch.codebook(), rtol=1e-6, atol=1e-7)
    assert torch.equal(parts.idle, whole_batch.idle)
    assert whole_batch.statistics(x, whole_batch(x)[1]).shape == (whole_batch.statistics_width,)


def test_no_optimizer_can_touch_moving_averages():
    quantizer = Quantizer(12, 8)
    assert not list(quantizer.parameters())
    quantized, _ = quantizer(clusters(0, 20).requires_grad_())
    assert not quantized.requires_grad


def test_without_moving_averages_the_codes_follow_the_gradient_of_their_vectors():
    torch.manual_seed(3)
    quantizer, x = Quantizer(12, 8, ema=False), clusters(0, 50)
    assert [name for name, _ in quantizer.named_parameters()] == ["weight"]
    quantized, codes = quantizer(x.requires_grad_())
    (quantized - x.detach()).square().sum().backward()
    chosen = F.one_hot(codes, 12).float()
    expected = 2 * (chosen.sum(0)[:, None] * quantizer.codebook() - chosen.T @ x.detach())
    assert quantizer.weight.grad is not None
    torch.testing.assert_close(quantizer.weight.grad, expected)
    assert x.grad is None
    before = quantizer.codebook()
    step(quantizer, x.detach())
    assert torch.equal(quantizer.codebook(), before)


def test_usage_and_perplexity_of_known_shares():
    quantizer = Quantizer(4, 2)
    assert float(quantizer.perplexity()) == pytest.approx(4)
    quantizer.counts.copy_(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    assert quantizer.usage().tolist() == [0.75, 0.25, 0, 0]
    assert float(quantizer.perplexity()) == pytest.approx(0.75**-0.75 * 0.25**-0.25)


# ---- codes that die


def alive_originally(windows: Iterator[Tensor], steps: int) -> int:
    """Codes in use in the last 5 windows of the original's moving averages: counts start at 0, the smoothed ones are
    written back, nothing is revived."""
    rng = np.random.default_rng(0)
    counts, sums = np.zeros(K), rng.uniform(-1 / K, 1 / K, (K, D))
    codebook, used = sums.copy(), []
    for _ in range(steps):
        x = next(windows).double().numpy()
        codes = ((x**2).sum(1)[:, None] - 2 * x @ codebook.T + (codebook**2).sum(1)).argmin(1)
        chosen = np.eye(K)[codes]
        counts = 0.99 * counts + 0.01 * chosen.sum(0)
        total = counts.sum()
        counts = (counts + 1e-5) / (total + K * 1e-5) * total
        sums = 0.99 * sums + 0.01 * chosen.T @ x
        codebook = sums / counts[:, None]
        used.append(set(codes))
    return len(set.union(*used[-5:]))


def alive(quantizer: Quantizer, windows: Iterator[Tensor], steps: int, optimizer: str = "") -> int:
    """Codes in use in the last 5 of `steps` windows, fewer than it takes to be revived."""
    rates = {"Adam": 1e-3, "SGD": 100.0}
    descent = getattr(torch.optim, optimizer)(quantizer.parameters(), rates[optimizer]) if optimizer else None
    used: list[set[int]] = []
    for _ in range(steps):
        x = next(windows)
        quantized, codes = quantizer(x)
        if descent:
            descent.zero_grad()
            (quantized - x).square().mean().backward()
            descent.step()
        quantizer.update(quantizer.statistics(x, codes))
        used.append(set(codes.tolist()))
    return len(set.union(*used[-5:]))


def encoder_outputs(kind: str, rows: int = 400) -> Iterator[Tensor]:
    """One window after the other of what an encoder may say."""
    g = torch.Generator().manual_seed(5)
    centre = torch.randn(D, generator=g).tanh()
    number, weights = 12, torch.randn(12, generator=g).softmax(0)
    means = 0.5 * centre + 0.3 * torch.randn(number, D, generator=g)
    axes = 0.15 * torch.randn(number, D, 6, generator=g)
    for t in range(NEVER):
        noise = torch.randn(rows, D, generator=g)
        if kind == "mixture":
            # a dozen kinds of residues, some rare, that each vary along six directions
            which = torch.multinomial(weights, rows, replacement=True, generator=g)
            coordinates = torch.randn(rows, 6, 1, generator=g)
            yield (means[which] + (axes[which] @ coordinates).squeeze(-1) + 0.02 * noise).tanh()
        else:
            yield centre + (5e-5 * t if kind == "drifting" else 0) + 0.01 * noise


@pytest.mark.parametrize("kind", ["concentrated", "drifting", "mixture"])
@pytest.mark.parametrize("optimizer", ["", "Adam", "SGD"], ids=["ema", "Adam", "SGD"])
def test_most_codes_are_in_use_after_200_steps(kind, optimizer):
    torch.manual_seed(0)
    quantizer = Quantizer(K, D, ema=not optimizer)
    assert alive(quantizer, encoder_outputs(kind), 200, optimizer) >= 30


def test_the_original_loses_nearly_all_codes_and_so_do_we_without_revival():
    assert alive_originally(encoder_outputs("concentrated"), 200) <= 5
    torch.manual_seed(0)
    assert alive(Quantizer(K, D, revive_after=NEVER), encoder_outputs("concentrated"), 200) <= 5


def test_codes_unused_at_first_stay_where_they_were():
    """The original threw them 1e5 times too far."""
    torch.manual_seed(0)
    quantizer = Quantizer(K, D, revive_after=NEVER)
    before = quantizer.codebook()
    codes = torch.cat([step(quantizer, x) for x, _ in zip(encoder_outputs("concentrated"), range(19), strict=False)])
    unused = [code for code in range(K) if code not in codes]
    assert len(unused) > 30
    torch.testing.assert_close(quantizer.codebook()[unused], before[unused], rtol=1e-3, atol=0)


@pytest.mark.parametrize("ema", [True, False])
def test_a_dead_code_takes_a_share_of_another_ones_vectors(ema):
    """Beside a mean, as far as the vectors scatter in one dimension: in 128 dimensions a code as far away as they are
    would get none. Of an isotropic cell it gets P(N(0, 1) > 1/2) = 31 %."""
    torch.manual_seed(4)
    quantizer, centre, spread = Quantizer(2, D, ema=ema, revive_after=2), torch.randn(D), 0.3
    (quantizer.sums if ema else quantizer.weight.data).copy_(torch.stack([centre, centre + 100]))
    windows = [centre + spread * torch.randn(4000, D) for _ in range(3)]
    assert [int(step(quantizer, x).sum()) for x in windows[:2]] == [0, 0]
    distance = (quantizer.codebook()[1] - windows[1].mean(0)).norm()
    assert float(distance) == pytest.approx(spread, rel=0.25)
    assert float(quantizer(windows[2])[1].float().mean()) == pytest.approx(0.31, abs=0.08)
    assert quantizer.idle.tolist() == [0, 0]


def test_codes_revived_together_lie_apart():
    torch.manual_seed(4)
    quantizer, centre = Quantizer(6, D, revive_after=1), torch.randn(D)
    quantizer.sums[0] = centre
    step(quantizer, centre + 0.1 * torch.randn(500, D))
    distances = torch.pdist(quantizer.codebook()[1:])
    assert 0.1 < distances.min() < distances.max() < 0.2


def test_vectors_that_are_all_the_same_revive_nothing():
    quantizer = Quantizer(3, 4, revive_after=1)
    for _ in range(3):
        step(quantizer, torch.full((5, 4), 0.5))
    assert quantizer.codebook().isfinite().all()
    assert int(quantizer.idle.max()) == 3


# ---- state


@pytest.mark.parametrize("ema", [True, False])
def test_a_saved_state_continues_bit_for_bit_also_with_revivals(ema, tmp_path):
    """Whatever torch's own generator has been doing: ranks agree for the same reason."""
    torch.manual_seed(5)
    quantizer = Quantizer(12, 8, ema=ema, revive_after=1)
    for t in range(7):
        step(quantizer, clusters(t, 10))
    save_file(quantizer.state_dict(), tmp_path / "state.safetensors")
    torch.manual_seed(99)
    resumed = Quantizer(12, 8, ema=ema, revive_after=1)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    seed = int(quantizer.seed)
    for t in range(7, 20):
        for one in (quantizer, resumed):
            step(one, clusters(t, 10))
    assert int(quantizer.seed) > seed
    for name, expected in quantizer.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name


def test_runs_with_other_seeds_revive_elsewhere():
    torch.manual_seed(1)
    one = Quantizer(12, 8).seed
    torch.manual_seed(2)
    assert int(one) != int(Quantizer(12, 8).seed)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_leaves_moving_averages_in_float32(cast):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(8, 8), Quantizer(12, 8), Quantizer(12, 8, ema=False))
    before = copy.deepcopy(model)
    cast(model)
    for quantizer, original in zip(model[1:], before[1:], strict=True):
        for (name, found), expected in zip(quantizer.named_buffers(), original.buffers(), strict=True):
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
    assert model[0].weight.dtype == model[2].weight.dtype != torch.float32
    x = clusters(0, 20).to(model[0].weight.dtype)
    for quantizer in model[1:]:
        step(quantizer, x)
        assert quantizer(x)[0].dtype == x.dtype
        assert quantizer.codebook().dtype == torch.float32
    assert all(buffer.device.type == "meta" for buffer in model[1].to("meta").buffers())


def codebooks(here, stage: int) -> list[list[list[float]]]:
    """Of a quantizer that is trained, and revived, for some steps under DeepSpeed: one per step."""
    import deepspeed

    torch.manual_seed(7)
    model = Quantizer(6, 4, ema=False, revive_after=2)
    ds, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    seed, found = int(model.seed), []
    for t in range(8):
        x = clusters(t, 30, dim=4, number=3)
        quantized, codes = ds(x)
        ds.backward((quantized - x).square().mean())
        ds.step()
        model.update(model.statistics(x, codes))
        found.append(model.codebook().tolist())
    assert int(model.seed) > seed
    if stage == 3:
        assert model.weight.numel() == 0
        with whole(model.parameters()):
            assert model.weight.shape == (6, 4)
    return found


@pytest.mark.slow
def test_a_sharded_codebook_is_revived_like_a_whole_one(run_ranks):
    expected = run_ranks(1, codebooks, 0)[0]
    for found in run_ranks(2, codebooks, 3):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
