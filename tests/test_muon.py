"""Muon trains the matrices an engine names, and AdamW everything else: as an independent reference does, on any split
and at every ZeRO stage."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdyn import ds_config, optimizer
from gdyn.errors import UserError
from gdyn.learning_rate import LearningRateSchedule
from gdyn.phases import Phase
from gdyn.ranks import RankContext
from gdyn.recipes import bundled
from tests import runs
from tests.harness import RanksFailed
from tests.toy import Network, Rows, Toy, toy_run

RECIPE = ds_config.read(bundled()["fp32_zero1_muon"]).values
MUON = RECIPE["optimizer"]
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
STEPS = 3
ONE = [Phase("loss", STEPS)]
MATRICES = {"encoder.body.0.weight", "encoder.body.2.weight"}


def muon_run(folder: Any, name: str = "run", **changes: Any) -> Any:
    """Three steps, each on all rows, so that their order does not matter."""
    return toy_run(folder, name, **{"groups": True, "optimizer": MUON, "samples": 24, "phases": ONE} | changes)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Jordan et al.: five steps of the quintic Newton-Schulz iteration, and the scale for tall matrices."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    rows, columns = matrix.shape
    return x * max(1.0, rows / columns) ** 0.5


def reference() -> dict[str, Tensor]:
    """Weights after the same steps in float64, without DeepSpeed."""
    torch.manual_seed(1234)
    model, x = Network().double(), Rows(24, 0).rows.double()
    matrices = {name: p for name, p in model.named_parameters() if name in MATRICES}
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    others = [p for name, p in model.named_parameters() if name not in MATRICES]
    adam = torch.optim.AdamW(others, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for _ in range(STEPS):
        model.zero_grad()
        (model(x)[0] - x).square().sum(1).mean().backward()
        adam.step()
        with torch.no_grad():
            for name, p in matrices.items():
                momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
                update = orthogonalized(0.05 * p.grad + 0.95 * momenta[name])  # Nesterov
                p.copy_((1 - 0.02 * 0.01) * p - 0.02 * update)
    return {name: p.detach() for name, p in model.named_parameters()}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("stage", "split", "zero"),
    [*((stage, split, {}) for stage in range(4) for split in ((1, 2), (2, 1))), (1, (1, 1), OFFLOAD)],
)
def test_weights_follow_the_reference_at_every_stage_and_split(run_ranks, tmp_path, stage, split, zero) -> None:
    run = muon_run(tmp_path, stage=stage, split=split, zero=zero)
    run_ranks(split[0], runs.run, run)
    found = runs.weights(run)
    for name, expected in reference().items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-5, msg=name)


def test_without_tags_deepspeed_chooses_and_takes_the_head_too(run_ranks, tmp_path) -> None:
    """So the test above can fail: only the tags keep Muon from the head."""
    run = muon_run(tmp_path, groups=False)
    run_ranks(1, runs.run, run)
    assert float((runs.weights(run)["head.weight"] - reference()["head.weight"]).abs().max()) > 1e-3


def test_with_adamw_the_tags_mean_nothing(run_ranks, tmp_path) -> None:
    tagged, plain = (muon_run(tmp_path, f"{groups}", groups=groups, optimizer=ADAM) for groups in (True, False))
    for run in (tagged, plain):
        run_ranks(1, runs.run, run)
    one, other = runs.weights(tagged), runs.weights(plain)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert runs.metrics(tagged)[0]["lr_rest"] == 0.01 and "lr_rest" not in runs.metrics(plain)[0]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 1), (1, 2), slow(0, 2), slow(1, 1), slow(2, 1), slow(2, 2), slow(3, 1), slow(3, 2)]
)
def test_stopped_within_an_epoch_it_continues_bit_for_bit(run_ranks, tmp_path, stage, ranks) -> None:
    changes = {"stage": stage, "split": (ranks, 1), "samples": 48, "phases": [Phase("loss", 2)]}
    expected, run = (muon_run(tmp_path, name, **changes) for name in ("whole", "run"))
    run_ranks(ranks, runs.run, expected)
    run_ranks(ranks, runs.run, run, 3)
    run_ranks(ranks, runs.run, run)
    runs.assert_same(run, expected)


def test_another_number_of_ranks_is_refused_where_state_is_sharded(run_ranks, tmp_path) -> None:
    changes = {"stage": 1, "samples": 48, "phases": [Phase("loss", 2)]}
    run_ranks(2, runs.run, muon_run(tmp_path, split=(2, 1), **changes), 3)
    with pytest.raises(RanksFailed, match="written by 2 ranks, and there are now 1; DeepSpeed cannot reshape Muon"):
        run_ranks(1, runs.run, muon_run(tmp_path, **changes))


def test_another_number_of_ranks_continues_at_stage_0(run_ranks, tmp_path) -> None:
    changes = {"samples": 48, "phases": [Phase("loss", 2)]}
    whole = muon_run(tmp_path, "whole", **changes)
    run_ranks(1, runs.run, whole)
    run_ranks(2, runs.run, muon_run(tmp_path, split=(2, 1), **changes), 3)
    run_ranks(1, runs.run, muon_run(tmp_path, **changes))
    one, other = runs.weights(muon_run(tmp_path, **changes)), runs.weights(whole)
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in other)


def test_rates_of_both_groups_are_scheduled_and_written(run_ranks, tmp_path) -> None:
    run = muon_run(tmp_path, stage=1, lr_schedule=LearningRateSchedule("linear"))
    run_ranks(1, runs.run, run)
    lines = [record for record in runs.metrics(run) if record["split"] == "train"]
    assert [line["lr"] for line in lines] == pytest.approx([0.02 * left / 3 for left in (2, 1, 0)])
    assert [line["lr_rest"] for line in lines] == pytest.approx([3e-4 * left / 3 for left in (2, 1, 0)])


# Groups


def groups_of(model: nn.Module, values: Any = RECIPE, **tags: Any) -> list[dict[str, Any]]:
    wanted = Toy(groups=True).param_groups(model, ONE[0])
    assert wanted is not None
    wanted[0] |= tags
    return optimizer.param_groups(model, wanted, values, "first")


def test_the_log_says_how_large_the_groups_are() -> None:
    assert optimizer.described(groups_of(Network())) == (
        "body: 2 matrices with Muon, 192 parameters; rest: 6 tensors, 130 parameters"
    )


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Network()
    model.head.requires_grad_(False)
    model.encoder["input"].requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(name in MATRICES)
    [group] = groups_of(model)
    assert group["name"] == "body" and len(group["params"]) == 2


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="phase first: .* is Muon, but this phase trains none of the matrices"):
        groups_of(Network(), use_muon=False)


def test_a_forgotten_parameter_is_a_bug() -> None:
    model = Network()
    model.extra = nn.Parameter(torch.ones(1))
    wanted = [{"params": list(model.head.parameters())}]
    with pytest.raises(AssertionError, match="every trained parameter once"):
        optimizer.param_groups(model, wanted, RECIPE, "first")


def uncompiled(here: RankContext) -> bool:
    from deepspeed.runtime.zero.muon import original_muon

    optimizer.run_muon_eagerly()
    kernels = (original_muon.muon_update, original_muon.zeropower_via_gram_newtonschulz)
    return all(inspect.unwrap(kernel) is kernel for kernel in kernels)


def test_its_kernels_are_not_compiled(run_ranks) -> None:
    assert run_ranks(1, uncompiled) == [True]
