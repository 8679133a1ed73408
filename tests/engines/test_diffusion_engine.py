"""The diffusion engine's network and losses: symmetries, noise, bounds, averages, and what an evaluation says."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdyn.config import parse
from gdyn.engines.diffusion import losses
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.engines.diffusion.network import EVALUATION, LatentDiffusion, Window
from gdyn.errors import UserError
from gdyn.evaluation import evaluate_alone
from gdyn.nn.average import Average
from gdyn.nn.egnn import centred, mean_position
from gdyn.nn.noise import NoiseSchedule
from gdyn.phases import Phase
from gdyn.ranks import ALONE
from tests.complexes import write_complexes

Batch = dict[str, Tensor]
SIZES = {"latent": 4, "hidden": 16, "blocks": 1, "denoiser_hidden": 16, "denoiser_blocks": 2, "cross_attentions": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complexes(tmp_path_factory.mktemp("complexes") / "train.h5", complexes=12)


@pytest.fixture
def data(path: Path) -> Complexes:
    return Complexes([path])


def engine_on(path: Path, **changes: Any) -> Diffusion:
    return Diffusion(train=[str(path)], validation=[str(path)], **SIZES | changes)


def network(engine: Diffusion, seed: int = 0) -> LatentDiffusion:
    """With weights so large that coordinates move, which at the start they hardly do."""
    torch.manual_seed(seed)
    model = engine.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("last.weight"):
                parameter.normal_(0, 0.3)
    model.denoiser_average = Average(model.denoiser)
    return model


def turned(batch: Batch, rotation: Tensor) -> Batch:
    names = ("ligand_positions", "pocket_positions")
    return batch | {name: (batch[name].double() @ rotation.T).float() for name in names}


def a_rotation(seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return torch.from_numpy(q * np.sign(np.linalg.det(q)))


def loss_of(engine: Diffusion, model: nn.Module, batch: Batch, objective: str, **window: Any) -> Tensor:
    phase = Phase(objective, 1)
    chosen = engine.begin_window(model, [batch], phase, ALONE)
    return engine.loss(model, batch, phase, chosen._replace(**window)).loss


# --- symmetries


def test_found_noise_turns_with_the_complex(path: Path, data: Complexes) -> None:
    """From atoms through both encoders, the noising and the denoiser."""
    model, batch, rotation = network(engine_on(path)), data[np.arange(6)], a_rotation()
    t_b = torch.tensor([0, 10, 200, 500, 900, 1000])

    def found(batch: Batch, turn: Tensor) -> tuple[Tensor, Tensor]:
        mask = batch["ligand_mask"]
        z_x, z_h = model.encode_ligand(batch)
        torch.manual_seed(1)
        noise_x = centred(torch.randn_like(z_x), mask) @ turn.float().T
        noise_h = torch.randn_like(z_h)
        noisy = model.add_noise(t_b, z_x, z_h, noise_x, noise_h, mean_position(z_x, mask), mask)
        pocket = *model.encode_pocket(batch), batch["pocket_mask"]
        keep_b = torch.tensor([True, False] * 3)
        return model.predict_noise(t_b, *noisy, mask, *pocket, keep_b, averaged=False)

    with torch.no_grad():
        x, h = found(batch, torch.eye(3))
        other_x, other_h = found(turned(batch, rotation), rotation)
    assert float(x.norm()) > 0.1
    torch.testing.assert_close(other_x, (x.double() @ rotation.T).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_h, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["ligand_vae", "protein_vae", "denoiser", "joint"])
@pytest.mark.parametrize("kind", ["l2", "vlb"])
def test_a_complex_has_the_same_loss_among_any_others(path: Path, data: Complexes, objective: str, kind: str) -> None:
    engine = engine_on(path, diffusion_loss=kind)
    model, phase = network(engine), Phase(objective, 1)
    batch = data[np.arange(12)]
    window = engine.begin_window(model, [batch], phase, ALONE)
    with torch.no_grad():
        together = engine.loss(model, batch, phase, window).loss
        alone = [engine.loss(model, data[np.array([i])], phase, window).loss for i in reversed(range(12))]
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=0)


def test_a_ligand_keeps_its_place_while_it_is_diffused(path: Path, data: Complexes) -> None:
    model, batch = network(engine_on(path)), data[np.arange(6)]
    mask = batch["ligand_mask"]
    centre = mean_position(batch["ligand_positions"], mask)
    with torch.no_grad():
        z_x, z_h = model.encode_ligand(batch)
        noise = centred(torch.randn_like(z_x), mask)
        noisy, _ = model.add_noise(torch.full((6,), 700), z_x, z_h, noise, torch.randn_like(z_h), centre, mask)
        decoded = model.decode_ligand(noisy, z_h, mask)
    assert float(centre.norm(dim=-1).min()) > 0.1
    for x in (z_x, noisy, decoded["positions"]):
        torch.testing.assert_close(mean_position(x, mask), centre, rtol=0, atol=1e-5)


# --- noise


def denoised(engine: Diffusion, model: LatentDiffusion, batch: Batch, **window: Any) -> dict[str, Tensor]:
    chosen = engine.begin_window(model, [batch], Phase("denoiser", 1), ALONE)
    with torch.no_grad():
        return model(batch, "denoiser", chosen._replace(**window))["noise"]


def test_noise_is_a_function_of_complex_and_step(path: Path, data: Complexes) -> None:
    engine = engine_on(path)
    model = network(engine)
    one, other = denoised(engine, model, data[np.arange(6)]), denoised(engine, model, data[np.array([5, 0])])
    n = other["noise_x"].shape[2]
    assert torch.equal(one["t"][:, [5, 0]], other["t"])
    for name in ("noise_x", "noise_h"):
        torch.testing.assert_close(one[name][:, [5, 0], :n], other[name], rtol=0, atol=1e-6)
    later = denoised(engine, model, data[np.arange(6)], step=1)
    assert not torch.equal(one["t"], later["t"]) and not torch.equal(one["noise_h"], later["noise_h"])


def test_draws_are_spread_over_all_times(path: Path, data: Complexes) -> None:
    engine = engine_on(path, timesteps=99)
    t = denoised(engine, network(engine), data[np.arange(12)], draws=4)["t"]
    assert t.shape == (4, 12)
    assert all(sorted((column // 25).tolist()) == [0, 1, 2, 3] for column in t.T)


def test_noisy_latents_have_the_means_and_variances_of_the_schedule(path: Path, data: Complexes) -> None:
    """z_t ~ N(alpha_t z, sigma_t^2), features over 4,000 draws; coordinates lose the variance of their mean, 1 / n."""
    model, batch = network(engine_on(path)), data[np.array([0])]
    mask, n = batch["ligand_mask"], int(batch["ligand_mask"].sum())
    with torch.no_grad():
        z_x, z_h = (tensor.expand(4000, -1, -1) for tensor in model.encode_ligand(batch))
    many = mask.expand(4000, -1)
    centre = mean_position(z_x, many)
    for t in (0, 250, 700, 1000):
        times = torch.full((4000,), t)
        noise = centred(torch.randn_like(z_x), many), torch.randn_like(z_h)
        x, h = model.add_noise(times, z_x, z_h, *noise, centre, many)
        alpha2 = torch.sigmoid(-model.schedule.gamma[t])
        alpha, variance = float(alpha2.sqrt()), float(1 - alpha2)
        bound = 5 * math.sqrt(variance / 4000)
        torch.testing.assert_close(h.mean(0), alpha * z_h[0], rtol=0, atol=bound)
        torch.testing.assert_close((x - centre).mean(0), alpha * (z_x - centre)[0], rtol=0, atol=bound)
        assert float(h.var(0).mean()) == pytest.approx(variance, rel=0.03)
        assert float(x.var(0).mean()) == pytest.approx(variance * (1 - 1 / n), rel=0.03)


def test_pockets_are_dropped_at_the_rate_that_is_asked(path: Path, data: Complexes) -> None:
    engine = engine_on(path, guidance_dropout=0.25)
    model = network(engine)
    seen: list[Tensor] = []
    predict = model.predict_noise
    model.predict_noise = lambda *args: seen.append(args[7]) or predict(*args)  # type: ignore[method-assign,func-returns-value,assignment]
    for step in range(60):
        denoised(engine, model, data[np.arange(12)], step=step)
    kept = torch.cat(seen).double()
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.06)  # 3.7 standard deviations
    assert float(torch.stack(seen).double().mean(1).std()) > 0  # each complex by itself


# --- losses


def test_l2_is_its_formula_and_half_where_nothing_is_predicted(path: Path, data: Complexes) -> None:
    engine = engine_on(path)
    model, batch = network(engine), data[np.arange(12)]
    noise = denoised(engine, model, batch, draws=3)
    atoms = batch["ligand_mask"].sum(1)
    found = losses.l2(noise, atoms).numpy()
    for d in range(3):
        for b in range(12):
            n = int(atoms[b])
            x = (noise["noise_x"] - noise["found_x"])[d, b, :n].numpy()
            h = (noise["noise_h"] - noise["found_h"])[d, b, :n].numpy()
            assert found[d, b] == pytest.approx(0.5 * ((x**2).sum() + (h**2).sum()) / ((3 + 4) * n), rel=1e-5)
    zero = [losses.l2(losses.without_prediction(denoised(engine, model, batch, step=s)), atoms) for s in range(200)]
    expected = 0.5 * ((3 + 4) * atoms - 3) / ((3 + 4) * atoms)
    torch.testing.assert_close(torch.cat(zero).mean(0), expected, rtol=0.05, atol=0)
    original = losses.original_l2(noise)
    torch.testing.assert_close(original, losses.l2(noise, atoms) * atoms / 50)


def test_bound_of_a_perfect_denoiser_of_gaussian_latents() -> None:
    """Latents N(0, s^2), coordinates in the space of mean zero. The denoiser that knows s errs by a known amount, so
    the mean over all times has a closed form, which lies above the entropy."""
    schedule, rng = NoiseSchedule("polynomial_2", 1000, 1e-4), np.random.default_rng(0)
    b, n, d, s = 100, 6, 4, 0.7
    gamma = schedule.gamma.numpy()
    sigma2 = 1 / (1 + np.exp(-gamma))
    alpha2 = 1 - sigma2

    def normal(*shape: int) -> np.ndarray:
        noise = rng.normal(size=shape)
        return noise - noise.mean(-2, keepdims=True) if shape[-1] == 3 else noise

    z = {"x": normal(b, n, 3), "h": normal(b, n, d)}
    for part, dimensions in (("x", 3 * (n - 1)), ("h", d * n)):
        z[part] *= s / np.sqrt((z[part] ** 2).sum() / (b * dimensions))  # the spread is that of these samples
    noise = {"t": np.arange(1001)[:, None].repeat(b, 1), "z_x": z["x"], "z_h": z["h"]}
    for part, width in (("x", 3), ("h", d)):
        eps = normal(1001, b, n, width)
        mixed = np.sqrt(alpha2)[:, None, None, None] * z[part] + np.sqrt(sigma2)[:, None, None, None] * eps
        shrink = np.sqrt(sigma2) / (alpha2 * s**2 + sigma2)
        noise |= {f"noise_{part}": eps, f"found_{part}": shrink[:, None, None, None] * mixed}
    tensors = {name: torch.from_numpy(value) for name, value in noise.items()}
    found = float(losses.vlb(tensors, torch.full((b,), n), schedule).mean())

    errors = alpha2 * s**2 / (alpha2 * s**2 + sigma2)
    steps = 0.5 * (np.expm1(np.diff(gamma)) * errors[1:]).sum() + 0.5 * errors[0]
    likelihood = 0.5 * np.log(2 * np.pi) + 0.5 * np.log(sigma2[0] / alpha2[0])
    prior = 0.5 * (alpha2[-1] * s**2 + sigma2[-1] - 1 - np.log(sigma2[-1]))
    expected = (3 * (n - 1) + d * n) * (steps + likelihood + prior)
    entropy = (3 * (n - 1) + d * n) * 0.5 * (np.log(2 * np.pi * s**2) + 1)
    assert found == pytest.approx(expected, abs=2.5)  # the spread from seed to seed is 0.6
    assert entropy < expected < entropy + 10


@pytest.mark.parametrize("kind", ["l2", "vlb"])
@pytest.mark.parametrize("objective", ["denoiser", "joint", "ligand_vae"])
def test_with_the_same_noise_and_weights_training_and_evaluation_agree(
    path: Path, data: Complexes, kind: str, objective: str
) -> None:
    engine = engine_on(path, diffusion_loss=kind, validation_draws=2)
    model, phase = network(engine), Phase(objective, 1)
    batch = data[np.arange(12)]
    trained = loss_of(engine, model.train(), batch, objective, step=EVALUATION, draws=2)
    evaluated = evaluate_alone(engine, model.eval(), data, phase, batch=5)
    assert float(trained.detach()) == pytest.approx(evaluated[objective], rel=1e-5)
    assert evaluated["loss"] == evaluated[objective]


def test_the_originals_ligand_loss_by_hand(path: Path, data: Complexes) -> None:
    """Elements only, padding to 50 with ln 11 each, KL not divided."""
    engine = engine_on(path, compat=True, posterior_sigma=0.0)
    model, batch = network(engine), data[np.array([0, 1])]
    with torch.no_grad():
        z_x, z_h = model.encode_ligand(batch)
        decoded = model.decode_ligand(z_x, z_h, batch["ligand_mask"])
    expected = 0.0
    for b in range(2):
        n = int(batch["ligand_mask"][b].sum())
        logits = torch.cat([decoded["element"][b, :n, :10], decoded["aromatic"][b, :n, 1:]], -1)
        element = torch.where(batch["ligand_element"][b, :n] == 10, 1, batch["ligand_element"][b, :n])
        entropy = float(F.cross_entropy(logits, element, reduction="sum")) + (50 - n) * math.log(11)
        offset = float((decoded["positions"][b, :n] - batch["ligand_positions"][b, :n]).square().sum())
        kl = 0.5 * float(z_x[b, :n].square().sum() + z_h[b, :n].square().sum())
        expected += ((offset + entropy) / (15 * 50) + 0.01 * kl) / 2
    assert float(loss_of(engine, model, batch, "ligand_vae")) == pytest.approx(expected, rel=1e-4)


# --- the average of the weights


def test_average_is_the_sum_of_its_steps() -> None:
    """m_k = d_k m_(k-1) + (1 - d_k) w_k with d_k = min(decay, (1 + k) / (10 + k)), in NumPy."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    average, expected = Average(linear), linear.weight.detach().double().numpy().copy()
    for k in range(30):
        with torch.no_grad():
            linear.weight.normal_()
        average.update(linear, 0.6)
        decay = min(0.6, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * linear.weight.detach().double().numpy()
    found = dict(average.named_buffers())
    np.testing.assert_allclose(found["network.weight"].numpy(), expected, rtol=1e-5)
    assert list(average.parameters()) == [] and int(found["updates"]) == 30
    x = torch.randn(4, 3)
    torch.testing.assert_close(average(x), x @ found["network.weight"].T + found["network.bias"])


def test_average_stays_float32_in_a_half_precision_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["average"] = Average(model["a"])
    model.bfloat16()
    assert model["a"].weight.dtype == torch.bfloat16
    assert model["average"].network.weight.dtype == torch.float32
    before = model["average"].network.weight.clone()
    with torch.no_grad():
        model["a"].weight += 1
    model["average"].update(model["a"], 0.999)
    assert not torch.equal(before, model["average"].network.weight)


def test_evaluations_denoise_with_the_average_and_always_the_same_noise(path: Path, data: Complexes) -> None:
    engine = engine_on(path)
    model, phase = network(engine), Phase("denoiser", 1)
    first = evaluate_alone(engine, model, data, phase)
    model.steps_done += 5
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.5)
    assert evaluate_alone(engine, model, data, phase) == first
    model.denoiser_average = Average(model.denoiser)
    assert evaluate_alone(engine, model, data, phase) != first
    assert not model.evaluating


# --- what a run says


def test_scores_of_a_split_are_those_of_its_complexes(path: Path, data: Complexes) -> None:
    """RMSD and accuracies counted in NumPy, complex by complex."""
    engine = engine_on(path, posterior_sigma=0.0)
    model = network(engine).eval()
    scores = evaluate_alone(engine, model, data, Phase("ligand_vae", 1), batch=5)
    deviations, right, atoms, squares = [], 0, 0, 0.0
    for i in range(12):
        batch = data[np.array([i])]
        with torch.no_grad():
            decoded = model.decode_ligand(*model.encode_ligand(batch), batch["ligand_mask"])
        off = (decoded["positions"] - batch["ligand_positions"])[0].numpy().astype(float)
        deviations.append(np.sqrt((off**2).sum(1).mean()))
        squares += (off**2).sum()
        right += int((decoded["element"].argmax(-1) == batch["ligand_element"]).sum())
        atoms += off.shape[0]
    assert scores["ligand_rmsd"] == pytest.approx(np.mean(deviations), rel=1e-5)
    assert scores["ligand_element_accuracy"] == pytest.approx(right / atoms)
    assert scores["ligand_positions"] == pytest.approx(squares / atoms, rel=1e-5)


def test_sizes_of_the_training_ligands_are_in_the_network(path: Path, data: Complexes) -> None:
    found = engine_on(path).model().ligand_sizes
    assert found.sum() == 12 and torch.equal(found[: len(data.ligand_sizes)], torch.from_numpy(data.ligand_sizes))
    elsewhere = dataclasses.replace(engine_on(path), train=["/nowhere/train.h5"])
    assert elsewhere.model().ligand_sizes.sum() == 0  # until weights are loaded


def run_file(folder: Path, phases: str, **engine: Any) -> list[str]:
    settings = "".join(f", {name}: {value}" for name, value in engine.items())
    text = f"""
        engine: {{class_path: Diffusion, init_args: {{train: [a.h5]{settings}}}}}
        phases: {phases}
        deepspeed: fp32_zero1
        run_dir: run
    """
    (folder / "run.yaml").write_text("\n".join(line.strip() for line in text.splitlines()))
    return ["--config", str(folder / "run.yaml")]


def test_phases_train_their_part(tmp_path: Path) -> None:
    phases = ", ".join(f"{{objective: {part}, epochs: 2}}" for part in ("ligand_vae", "protein_vae", "denoiser"))
    plan = parse(run_file(tmp_path, f"[{phases}]")).config.plan
    assert [phase.trains for phase in plan.phases] == [("ligand_vae.*",), ("protein_vae.*",), ("denoiser.*",)]
    assert parse(run_file(tmp_path, "[{objective: joint, epochs: 1}]")).config.plan.phases[0].trains == ("*",)


MISTAKES = {
    "a denoiser of untrained autoencoders": ("[{objective: denoiser, epochs: 1}]", {}, "ligand_vae"),
    "one autoencoder is missing": (
        "[{objective: ligand_vae, epochs: 1}, {objective: denoiser, epochs: 1}]",
        {},
        "protein_vae",
    ),
    "unknown objective": ("[{objective: vae, epochs: 1}]", {}, "ligand_vae, protein_vae, denoiser, joint"),
    "latent 0": ("[{objective: joint, epochs: 1}]", {"latent": 0}, r"engine\.latent"),
    "hidden a word": ("[{objective: joint, epochs: 1}]", {"hidden": "wide"}, r"engine\.hidden"),
    "schedule unknown": ("[{objective: joint, epochs: 1}]", {"schedule": "linear"}, r"engine\.schedule"),
    "loss unknown": ("[{objective: joint, epochs: 1}]", {"diffusion_loss": "l1"}, r"engine\.diffusion_loss"),
    "timesteps 0": ("[{objective: joint, epochs: 1}]", {"timesteps": 0}, r"engine\.timesteps"),
    "precision 0": ("[{objective: joint, epochs: 1}]", {"precision": 0.0}, r"engine\.precision"),
    "cutoff negative": ("[{objective: joint, epochs: 1}]", {"cutoff": -8}, r"engine\.cutoff"),
    "dropout above 1": ("[{objective: joint, epochs: 1}]", {"guidance_dropout": 1.5}, r"engine\.guidance_dropout"),
    "decay above 1": ("[{objective: joint, epochs: 1}]", {"ema_decay": 2}, r"engine\.ema_decay"),
    "draws 0": ("[{objective: joint, epochs: 1}]", {"validation_draws": 0}, r"engine\.validation_draws"),
    "misspelt key": ("[{objective: joint, epochs: 1}]", {"denoiser_width": 3}, "denoiser_width"),
    "normalization unknown": ("[{objective: joint, epochs: 1}]", {"normalization": "max"}, r"engine\.normalization"),
}


@pytest.mark.parametrize(("phases", "engine", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_run_file_is_one_sentence(tmp_path: Path, phases: str, engine: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        assert parse(run_file(tmp_path, phases, **engine)).config.plan
    assert "\n" not in str(error.value)


def test_a_window_counts_all_its_micro_batches(path: Path, data: Complexes) -> None:
    engine = engine_on(path)
    model = network(engine)
    batches = [data[np.arange(5)], data[np.arange(5, 12)]]
    window: Window = engine.begin_window(model, batches, Phase("joint", 1), ALONE)
    ligands, pockets = (sum(int(batch[f"{part}_mask"].sum()) for batch in batches) for part in ("ligand", "pocket"))
    assert {name: int(count) for name, count in window.counts.items()} == {
        "ligand_atoms": ligands,
        "protein_atoms": pockets,
        "complexes": 12,
    }
