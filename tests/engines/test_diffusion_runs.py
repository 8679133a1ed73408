"""Runs of the diffusion engine: evaluation, report, separate training of the parts, precision, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdyn.config import RunConfig
from gdyn.engines.diffusion.complexes import Complexes
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.engines.diffusion.network import LatentDiffusion, normal_like
from gdyn.engines.diffusion.report import TIMES, found_noise
from gdyn.inference import Run, load_run
from gdyn.phases import Phase
from gdyn.recipes import bundled
from launch import analyze, evaluate
from tests import runs
from tests.harness import RanksFailed

KEYS = {"ligand_rmsd", "ligand_element_accuracy", "protein_rmsd", "denoiser_loss", "predict_zero_loss"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusion")


@pytest.fixture(scope="module")
def run(run_ranks, folder: Path) -> Run:
    config = runs.small_run(folder, "whole", engine=Diffusion)
    run_ranks(1, runs.run, config)
    return load_run(config.run_dir)


def test_evaluate_writes_the_keys_that_scripts_read(run: Run, folder: Path) -> None:
    output = folder / "scores.json"
    assert evaluate.main([str(run.dir.path), "--data", str(folder / "validation.h5"), "--json", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found.keys() >= KEYS and all(np.isfinite(found[key]) for key in KEYS)
    assert found["predict_zero_loss"] == pytest.approx(0.5, abs=0.1) and found["complexes"] == 8
    assert found["denoiser_loss"] == pytest.approx(runs.summary(run.config)["test"]["denoiser"], rel=1e-5)


def test_what_was_not_trained_is_not_scored(run_ranks, folder: Path) -> None:
    config = runs.small_run(folder, "ligands", engine=Diffusion, phases=[Phase("ligand_vae", 1)])
    run_ranks(1, runs.run, config)
    found = config.engine.evaluate(load_run(config.run_dir), [str(folder / "validation.h5")])
    assert found["ligand_rmsd"] is not None
    assert found["protein_rmsd"] is None and found["denoiser_loss"] is None and found.keys() >= KEYS


def test_analyze_makes_a_page(run: Run) -> None:
    assert analyze.main([str(run.dir.path)]) == 0
    page = run.dir.report_html.read_text()
    assert "What the denoiser finds" in page and page.count("data:image/png") == 2
    summary = json.loads((run.dir.analysis / "analysis_summary.json").read_text())
    assert summary.keys() >= KEYS and summary["split"] == "test"


def test_the_share_of_noise_found_is_1_for_who_knows_it_and_0_for_who_says_nothing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = run.model, Complexes([folder / "validation.h5"])
    assert isinstance(model, LatentDiffusion)
    keys = data[np.arange(8)]["keys"]

    def known(t_b: torch.Tensor, z_x: torch.Tensor, z_h: torch.Tensor, mask: torch.Tensor, *_: Any, **__: Any) -> Any:
        return normal_like(z_x, z_h, mask, keys, int(t_b[0]), 0)

    monkeypatch.setattr(model, "predict_noise", known)
    times, x, h = found_noise(model, data)
    assert len(times) == TIMES and times[[0, -1]].tolist() == [0, 1000]
    np.testing.assert_allclose([x, h], 1)
    monkeypatch.setattr(model, "predict_noise", lambda t_b, z_x, z_h, *_, **__: (0 * z_x, 0 * z_h))
    np.testing.assert_allclose(found_noise(model, data)[1:], 0)


def test_parts_trained_in_runs_of_their_own_make_one_network(run_ranks, folder: Path, run: Run) -> None:
    """Two autoencoders from two runs; they stay as they are while the denoiser learns."""
    names = {"ligand_vae": "alone_l", "protein_vae": "alone_p"}
    for objective, name in names.items():
        run_ranks(1, runs.run, runs.small_run(folder, name, engine=Diffusion, phases=[Phase(objective, 1)], seed=7))
    begun = {f"{objective}.*": str(folder / name) for objective, name in names.items()}
    config = runs.small_run(folder, "third", engine=Diffusion, phases=[Phase("denoiser", 1)], init_from=begun)
    run_ranks(1, runs.run, config)
    weights = runs.weights(config)
    for objective, name in names.items():
        source = load_run(folder / name).model.state_dict()
        same = [key for key in weights if key.startswith(objective)]
        assert same and all(torch.equal(weights[key], source[key]) for key in same)


def test_an_autoencoder_of_another_size_is_refused_with_its_keys(run_ranks, folder: Path, run: Run) -> None:
    begun = {"ligand_vae.*": str(run.dir.path), "protein_vae.*": str(run.dir.path)}
    config = runs.small_run(folder, "wide", engine=Diffusion, phases=[Phase("denoiser", 1)], init_from=begun, hidden=12)
    with pytest.raises(RanksFailed, match=r"ligand_vae\.encoder.*has shape.*expected"):
        run_ranks(1, runs.run, config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_denoiser_phase_does_not_train_autoencoders(run_ranks, folder: Path, run: Run, ranks: int) -> None:
    phase = Phase("denoiser", 1, trains=("denoiser.*", "ligand_vae.*"))
    config = runs.small_run(
        folder, f"mixed{ranks}", engine=Diffusion, phases=[phase], init_from=str(run.dir.path), split=(ranks, 1)
    )
    with pytest.raises(RanksFailed, match="the objective denoiser trains the denoiser only"):
        run_ranks(ranks, runs.run, config)


def test_zero_3_is_refused(run_ranks, folder: Path) -> None:
    with pytest.raises(RanksFailed, match="Diffusion cannot be trained with ZeRO stage 3"):
        run_ranks(2, runs.run, runs.small_run(folder, "three", engine=Diffusion, stage=3, split=(2, 1)))


def losses_of(config: RunConfig) -> list[float]:
    return [line["loss"] for line in runs.metrics(config) if line["split"] == "train"]


def test_bf16_autocast_gives_nearly_the_same_losses(run_ranks, folder: Path, run: Run) -> None:
    config = runs.small_run(folder, "half", engine=Diffusion, split=(2, 1), deepspeed=str(bundled()["bf16_zero1"]))
    run_ranks(2, runs.run, config)
    assert losses_of(config) == pytest.approx(losses_of(run.config), rel=0.1)


def test_compat_trains_with_unused_heads(run_ranks, folder: Path) -> None:
    config = runs.small_run(folder, "compat", engine=Diffusion, stage=1, compat=True)
    run_ranks(2, runs.run, config)
    assert all(np.isfinite(losses_of(config)))
