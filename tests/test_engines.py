"""What gdyn/engine.py asks of every engine, asked of every engine that is registered."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gdyn.engines
from gdyn.engine import Engine, Step
from gdyn.engines import Diffusion, Monodecoder, Vamp
from gdyn.errors import UserError
from gdyn.evaluation import evaluate
from gdyn.inference import load_weights
from gdyn.loader import Loader
from gdyn.phases import Phase
from gdyn.ranks import ALONE
from tests.complexes import write_complexes
from tests.data import write_trajectory
from tests.proteins import write_proteins
from tests.toy import Toy

Batch = dict[str, Tensor]


def small_vamp(folder: Path, **changes: object) -> Vamp:
    ferro = changes.get("model_type") == "ferro"
    paths = {}
    for seed, split in enumerate(("train", "validation")):
        paths[split] = [str(write_trajectory(folder / split, frames=120, targets=2, ferro=ferro, seed=seed))]
    sizes = {"tau": 3, "state_len": 3, "atom_fea_len": 8, "n_conv": 2, "num_gaussians": 8}
    return Vamp(**paths, **sizes | changes)  # type: ignore[arg-type]


def small_monodecoder(folder: Path, **changes: object) -> Monodecoder:
    paths = {}
    for seed, split in enumerate(("train", "validation")):
        paths[split] = [str(write_proteins(folder / f"{split}.h5", structures=60, residues=(5, 20), seed=seed))]
    sizes = {"codes": 12, "embedding_dim": 8, "hidden": [16, 16, 16], "heads": 2, "feed_forward": 16, "dropout": 0.0}
    return Monodecoder(**paths, **sizes | changes)  # type: ignore[arg-type]


def small_diffusion(folder: Path, **changes: object) -> Diffusion:
    paths = {}
    for seed, split in enumerate(("train", "validation")):
        paths[split] = [str(write_complexes(folder / f"{split}.h5", complexes=60, seed=seed))]
    sizes = {"latent": 4, "hidden": 8, "blocks": 1, "denoiser_hidden": 16, "denoiser_blocks": 1, "cross_attentions": 1}
    return Diffusion(**paths, **sizes | changes)  # type: ignore[arg-type]


SMALL: dict[str, Callable[[Path], Engine]] = {
    "Diffusion": small_diffusion,
    "Diffusion, vlb": lambda folder: small_diffusion(
        folder, diffusion_loss="vlb", schedule="cosine", gradient_checkpointing=True
    ),
    "Monodecoder": small_monodecoder,
    "Monodecoder, plain": lambda folder: small_monodecoder(
        folder, ema=False, mask_plddt=True, output_fft=False, links=["contactPoints", "backbone"]
    ),
    "Vamp": small_vamp,
    "Vamp, shared": lambda folder: small_vamp(folder, lobe_sharing="shared"),
    "Vamp, ferro": lambda folder: small_vamp(folder, model_type="ferro"),
    "Vamp, regularize": lambda folder: small_vamp(folder, mode="regularize", epsilon=1e-6, vamp_sym_gradient="exact"),
}
"""Of every engine at least one, small enough to train in a second, under a name that begins with the engine's."""


OVERFITTED = {"Diffusion": ("ligand_vae", 1.0), "Monodecoder": ("loss", 3.0), "Vamp": ("vamp2", -1.9)}
"""Per engine an objective, and the loss that shows it has learned by heart. Vamp's 3 states can reach -2."""


@pytest.fixture(params=SMALL)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return SMALL[request.param](tmp_path)


@pytest.fixture
def model(engine: Engine) -> nn.Module:
    torch.manual_seed(0)
    return engine.model()


def phases(engine: Engine) -> Iterator[Phase]:
    return (Phase(objective, 1) for objective in engine.objectives())


def a_batch(engine: Engine, size: int = 40) -> Batch:
    return engine.datasets()["train"][np.arange(size)]


def step_of(engine: Engine, model: nn.Module, batch: Batch, phase: Phase) -> Step:
    return engine.loss(model, batch, phase, engine.begin_window(model, [batch], phase, ALONE))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_every_registered_engine_is_asked() -> None:
    assert {name.split(",")[0] for name in SMALL} == set(gdyn.engines.__all__)


def test_it_is_frozen_data(engine: Engine) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.tau = 5  # type: ignore[attr-defined]
    assert engine == dataclasses.replace(engine)


def test_the_model_is_a_function_of_torchs_seed(engine: Engine) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(nn.utils.parameters_to_vector(engine.model().parameters()))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    assert models[0].dtype == torch.float32


def test_datasets_give_the_samples_asked_for(engine: Engine) -> None:
    splits = engine.datasets()
    assert {"train", "validation"} <= splits.keys() <= {"train", "validation", "test"}
    for dataset in splits.values():
        last = len(dataset) - 1
        for name, tensor in dataset[np.array([last, 0])].items():
            assert tensor.device.type == "cpu", name
        with pytest.raises(IndexError):
            dataset[np.array([last + 1])]


def test_loss_is_finite_and_every_parameter_gets_a_gradient(engine: Engine, model: nn.Module) -> None:
    for phase in phases(engine):
        step = step_of(engine, model, a_batch(engine), phase)
        assert step.loss.shape == ()
        assert all(torch.isfinite(value).all() and not value.requires_grad for value in step.metrics.values())
        step.loss.backward()
        found = gradients(model)
        trained = {name for glob in engine.trains(phase.objective) for name in fnmatch.filter(found, glob)}
        assert trained and all(torch.isfinite(found[name]).all() for name in trained), phase
        assert all(found[name] is None for name in found.keys() - trained), phase
        assert sum(float(g.norm()) for g in found.values() if g is not None) > 0, phase


def test_the_network_is_called_once_per_loss(engine: Engine, model: nn.Module) -> None:
    """DeepSpeed's hooks, which gather and release parameters, sit on the root module."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    batch, phase = a_batch(engine), next(phases(engine))
    window = engine.begin_window(model, [batch], phase, ALONE)
    calls.clear()
    engine.loss(model, batch, phase, window)
    assert len(calls) == 1


def test_training_and_validation_agree_on_a_batch(engine: Engine, model: nn.Module) -> None:
    batch = a_batch(engine)
    for phase in phases(engine):
        trained = step_of(engine, model.train(), batch, phase)
        validated = step_of(engine, model.eval(), batch, phase)
        torch.testing.assert_close(trained.loss, validated.loss)
        for name, value in trained.metrics.items():
            torch.testing.assert_close(value, validated.metrics[name])


def test_micro_batches_add_up_to_the_window(engine: Engine, model: nn.Module) -> None:
    for phase in phases(engine):
        step_of(engine, model, a_batch(engine), phase).loss.backward()
        whole = gradients(model)
        dataset = engine.datasets()["train"]
        parts = [dataset[indices] for indices in np.array_split(np.arange(40), [7, 20])]
        window = engine.begin_window(model, parts, phase, ALONE)
        for part in parts:
            engine.loss(model, part, phase, window).loss.backward()
        largest = max(float(g.abs().max()) for g in whole.values() if g is not None)
        for name, found in gradients(model).items():
            assert (found is None) == (whole[name] is None)
            torch.testing.assert_close(
                found, whole[name], rtol=1e-4, atol=1e-5 * largest, msg=f"{phase.objective} {name}"
            )


def test_every_objective_is_a_score_of_the_validation(engine: Engine, model: nn.Module) -> None:
    """By which the best checkpoint is chosen; statistics are summed, so the size of the batches does not show."""
    for phase in phases(engine):
        loaders = [Loader(engine.datasets()["validation"], size, 1, ALONE) for size in (30, 1000)]
        parts, whole = (evaluate(engine, model.eval(), loader, phase, ALONE)[0] for loader in loaders)
        assert isinstance(whole[phase.objective], float)
        assert parts[phase.objective] == pytest.approx(whole[phase.objective], rel=1e-4)


def test_it_overfits_a_few_samples(engine: Engine, model: nn.Module) -> None:
    """As a model, a loss and a gradient that belong together can."""
    objective, reached = OVERFITTED[type(engine).__name__]
    phase, batch = Phase(objective, 1), engine.datasets()["train"][7 * np.arange(8)]
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(400):
        loss = step_of(engine, model, batch, phase).loss
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    assert float(step_of(engine, model, batch, phase).metrics["loss"]) < reached


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda toy: toy.evaluate(None, []), "Toy has no evaluation"),
        (lambda toy: toy.report(None), "Toy has no report"),
        (lambda toy: toy.predictor(toy.model()), "Toy has no stand-alone predictor"),
        (lambda toy: toy.encode(None, [], Path(), ALONE), "Toy learns no alphabet"),
    ],
)
def test_what_an_engine_does_not_have_is_one_sentence(asked: Callable[[Engine], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked(Toy())


def test_saved_weights_give_the_same_loss(engine: Engine, model: nn.Module, tmp_path: Path) -> None:
    phase, batch = next(phases(engine)), a_batch(engine)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(99)
    other = engine.model()
    assert not torch.equal(step_of(engine, other, batch, phase).loss, step_of(engine, model, batch, phase).loss)
    load_weights(other, load_file(tmp_path / "weights.safetensors"), "a file")
    assert torch.equal(step_of(engine, other, batch, phase).loss, step_of(engine, model, batch, phase).loss)
