"""Every JSON of ds_configs/ is clean, does what its name says, and really trains."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from gdyn import ds_config, ds_machine
from gdyn.errors import UserError
from gdyn.ranks import RankContext
from gdyn.recipes import bundled
from tests.harness import run_ranks
from tests.test_ds_config import Wishes


def wishes(name: str, learning_rate: float = 1e-3, **given: Any) -> Wishes:
    """Muon's recipe has two learning rates of its own."""
    return Wishes(learning_rate=None if name.endswith("muon") else learning_rate, **given)


@pytest.mark.parametrize("name", bundled())
def test_recipe_is_clean_and_named_after_what_it_does(name: str) -> None:
    recipe = ds_config.read(bundled()[name])
    assert ds_config.check(recipe) == []
    values = ds_config.complete(recipe, wishes(name), total_steps=100)
    precision, stage, *rest = name.split("_")
    assert ds_config.precision(values).removeprefix("autocast-") == precision
    assert stage == f"zero{ds_config.zero_stage(values)}"
    assert ("offload" in rest) == (ds_config.offload_device(values, "offload_param") == "cpu")
    assert ("muon" in rest) == (ds_config.optimizer_type(values) == "Muon")
    assert ("warmup" in rest) == (ds_config.scheduler_type(values) is not None)
    assert ds_machine.ops_needed(values) == []


def test_recipes_cover_the_precisions_and_stages_promised() -> None:
    promised = {f"{p}_zero{stage}" for p in ("fp32", "bf16", "fp16") for stage in (0, 1, 2)}
    promised |= {f"{p}_zero3{offload}" for p in ("fp32", "bf16") for offload in ("", "_offload")}
    assert promised <= bundled().keys()


STEPS, BATCH = 6, 16


def batches() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, generator=random)
    return [(inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]))] * STEPS


def model() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(3, 1)


def losses_without_deepspeed() -> list[float]:
    module = model()
    adam = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for inputs, targets in batches():
        adam.zero_grad()
        loss = torch.nn.functional.mse_loss(module(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    return losses


def losses_of(name: str) -> list[float] | str:
    """The losses DeepSpeed gets with a recipe, or why this machine refuses it."""
    import deepspeed

    recipe, machine = ds_config.read(bundled()[name]), ds_machine.look()
    values = ds_config.complete(recipe, wishes(name, 0.1, batch_size=BATCH), total_steps=STEPS)
    try:
        ds_machine.check_hardware(recipe, values, machine, ds_machine.build_directories(values, machine))
    except UserError as refused:
        return str(refused)
    module = model()
    ds, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=values)
    losses = []
    for inputs, targets in batches():
        loss = torch.nn.functional.mse_loss(ds(inputs).float(), targets)
        ds.backward(loss)
        ds.step()
        losses.append(loss.item())
    return losses


def losses_of_all(here: RankContext) -> dict[str, list[float] | str]:
    return {"plain": losses_without_deepspeed()} | {name: losses_of(name) for name in bundled()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[float] | str]:
    """Recipe -> its losses, and "plain" for PyTorch without DeepSpeed; all in one process."""
    return run_ranks(1, losses_of_all)[0]


@pytest.mark.parametrize("name", bundled())
def test_recipe_trains_like_plain_pytorch_or_says_why_it_cannot(trained: dict[str, Any], name: str) -> None:
    losses, expected = trained[name], trained["plain"]
    if isinstance(losses, str):
        assert name.startswith("fp16") and "precision fp16 is not supported" in losses
    elif name.endswith(("warmup", "muon")):
        assert losses[-1] < losses[0]
    else:
        assert losses == pytest.approx(expected, rel=1e-5 if name.startswith("fp32") else 3e-2)
