"""A stopped run of the diffusion engine goes on as if nothing had happened, also from one phase to the next, averages
of the weights included: bit for bit on as many ranks, within 1e-5 on others."""

from typing import Any

import pytest
import torch

from gdyn.config import Optimization
from gdyn.engines.diffusion.engine import Diffusion
from gdyn.phases import Phase
from tests import runs
from tests.runs import as_new, step


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), slow(2, 2)])
def test_stopped_around_phase_boundaries_it_continues_bit_for_bit(run_ranks, tmp_path, stage, ranks) -> None:
    """Phases end after 3, 6 and 12 steps; it stops after 2, after 6 and after 10."""
    settings = {"optimization": Optimization(4, 2 // ranks, learning_rate=0.005)}
    expected = runs.small_run(tmp_path, "whole", engine=Diffusion, stage=stage, **settings)
    config = as_new(expected, tmp_path)
    run_ranks(ranks, runs.run, expected)
    stops = {2: 2, 6: 4, 10: 4}
    for reached, windows in stops.items():
        run_ranks(ranks, runs.run, config, windows)
        assert step(config) == reached
    halfway = runs.weights(config)
    run_ranks(ranks, runs.run, config)
    runs.assert_same(config, expected)
    final = runs.weights(config)
    assert int(final["denoiser_average.updates"]) == 6 and int(final["steps_done"]) == 12
    name = "denoiser_average.network.embedding.weight"
    assert not torch.equal(final[name], halfway[name])
    assert not torch.equal(final[name], final["denoiser.embedding.weight"])


@pytest.mark.parametrize("stage", [slow(0), 1, slow(2)])
def test_other_numbers_of_ranks_continue_within_1e_5(run_ranks, tmp_path, stage) -> None:
    def run(name: str, split: tuple[int, int]) -> Any:
        optimization = Optimization(8 // split[0] // split[1], split[1], learning_rate=0.0005)
        return runs.small_run(tmp_path, name, engine=Diffusion, stage=stage, optimization=optimization)

    expected, first, second = run("whole", (1, 2)), run("run", (2, 1)), run("run", (1, 2))
    run_ranks(1, runs.run, expected)
    run_ranks(2, runs.run, first, 8)
    assert step(first) == 8
    run_ranks(1, runs.run, second)
    found, reference = runs.metrics(second), runs.metrics(expected)
    assert [line["step"] for line in found] == [line["step"] for line in reference]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in reference], rel=1e-5)
    one, other = runs.weights(second), runs.weights(expected)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_phases_change_their_own_part_only_and_the_optimizer_holds_nothing_else(run_ranks, tmp_path) -> None:
    config = runs.small_run(tmp_path, "run", engine=Diffusion, stage=1)
    run_ranks(2, runs.run, config)
    by_tag = {one.tag: one for one in runs.store(config).whole()}
    ends = [by_tag[tag].weights() for tag in ("p1-protein_vae-e0000", "p2-denoiser-e0000", "p3-done-e0000")]
    torch.manual_seed(config.seed)
    before = {name: value.detach() for name, value in config.engine.model().state_dict().items()}
    for after, part in zip(ends, ("ligand_vae", "protein_vae", "denoiser"), strict=True):
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        averaged = {"denoiser_average"} if part == "denoiser" else set()
        assert changed - averaged == {part, "steps_done"} and averaged <= changed
        before = after
    network = config.engine.model()
    parts = {name: sum(p.numel() for p in getattr(network, name).parameters()) for name in ("ligand_vae", "denoiser")}
    for tag, part in (("p1-protein_vae-e0000", "ligand_vae"), ("p3-done-e0000", "denoiser")):
        files = sorted((by_tag[tag].path).glob("*optim_states.pt"))
        assert len(files) == 2
        held = sum(optimizer_numbers(torch.load(file, weights_only=False)) for file in files)
        assert 2 * parts[part] <= held <= 2 * parts[part] + 64  # Adam's two moments, and padding


def optimizer_numbers(state: dict[str, Any]) -> int:
    """How many numbers the moments are."""
    moments = state["optimizer_state_dict"]["base_optimizer_state"]["state"].values()
    return sum(group[name].numel() for group in moments for name in ("exp_avg", "exp_avg_sq"))


def test_joint_training_moves_every_part(run_ranks, tmp_path) -> None:
    config = runs.small_run(tmp_path, "run", engine=Diffusion, phases=[Phase("joint", 1)])
    run_ranks(1, runs.run, config)
    torch.manual_seed(config.seed)
    before, after = config.engine.model().state_dict(), runs.weights(config)
    still = [name for name in before if torch.equal(before[name], after[name]) and name != "ligand_sizes"]
    assert still == []
