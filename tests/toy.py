"""The smallest engine that uses all of the contract, for tests of the trainer: an autoencoder of random rows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdyn.collectives import sum_over_ranks
from gdyn.config import Checkpointing, Logging, Optimization, RunConfig
from gdyn.engine import Dataset, Engine, Step
from gdyn.phases import Phase
from gdyn.recipes import bundled

WIDTH, HIDDEN = 6, 8
PARTS = {"encoder": ("encoder.*",), "head": ("head.*",)}


class Network(nn.Module):
    """Beside parameters it has what it learns without gradients: a counter and two averages, one in double."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(HIDDEN, 12), nn.Tanh(), nn.Linear(12, HIDDEN))
        self.encoder = nn.ModuleDict({"input": nn.Linear(WIDTH, HIDDEN), "body": body})
        self.head = nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.register_buffer("precise", torch.zeros(HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder["body"](self.encoder["input"](x))
        return self.head(hidden), hidden


class Rows(Dataset):
    def __init__(self, count: int, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(count, WIDTH, generator=random) * torch.arange(1, WIDTH + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"x": self.rows[torch.from_numpy(indices)]}


@dataclass(frozen=True)
class Toy(Engine):
    """An autoencoder of random rows."""

    samples: int = 48
    """Rows to learn from."""

    groups: bool = False
    """Whether it tells body matrices and everything else apart for the optimizer."""

    divided: bool = False
    """Whether it has parts."""

    uphill: bool = False
    """Whether a higher validation loss counts as better, so that training never improves it."""

    def model(self) -> Network:
        return Network()

    def datasets(self) -> dict[str, Dataset]:
        return {"train": Rows(self.samples, 0), "validation": Rows(24, 1)}

    def higher_is_better(self, objective: str) -> bool:
        return self.uphill

    def begin_window(self, model: nn.Module, batches: Any, phase: Phase, here: Any) -> int:
        return here.world_size * sum(len(batch["x"]) for batch in batches)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], phase: Phase, window: int) -> Step:
        x = batch["x"]
        y, hidden = model(x)
        squares = (y - x).square().sum(1)
        sums = hidden.detach().double().sum(0)
        return Step(
            loss=squares.sum() / window,
            metrics={"loss": squares.mean().detach()},
            weight=float(len(x)),
            statistics=torch.cat([sums, sums.new_tensor([len(x)])]),
        )

    def end_window(self, model: nn.Module, steps: list[Step], phase: Phase, window: int, here: Any) -> None:
        assert not torch.is_grad_enabled() and not any(step.loss.requires_grad for step in steps)
        *sums, count = sum_over_ranks(torch.stack([step.statistics for step in steps]).sum(0))
        assert count == window
        average = torch.stack(sums) / count
        model.precise.lerp_(average, 0.1)
        model.mean.copy_(model.precise)
        model.step += 1

    def gauges(self, model: nn.Module, phase: Phase) -> dict[str, float]:
        return {"counted": float(model.step)}

    def parts(self) -> dict[str, tuple[str, ...]]:
        return PARTS if self.divided else {}

    def param_groups(self, model: nn.Module, phase: Phase) -> list[dict[str, Any]] | None:
        if not self.groups:
            return None
        named = dict(model.named_parameters())
        body = [name for name, p in named.items() if name.startswith("encoder.body.") and p.ndim == 2]
        return [
            {"params": [named[name] for name in body], "name": "body", "use_muon": True},
            {"params": [p for name, p in named.items() if name not in body], "name": "rest"},
        ]


def toy_run(folder: Path, name: str, *, stage: int = 0, split: tuple[int, int] = (1, 1), **changes: Any) -> RunConfig:
    """A run of 2 x 2 epochs of 2 steps on 24 rows each. `split`: (ranks, micro-batches) of a step. `changes`: fields of
    RunConfig, of its optimization or of Toy, by name; `optimizer`, what the DeepSpeed JSON has under that key; `zero`,
    what it has in zero_optimization besides."""

    def taken(kind: type) -> dict[str, Any]:
        return {field: changes.pop(field) for field in kind.__dataclass_fields__ if field in changes}

    engine = Toy(**taken(Toy))
    values = json.loads(bundled()[f"fp32_zero{stage}"].read_text())
    if "optimizer" in changes:
        values |= {"optimizer": changes.pop("optimizer"), "gradient_clipping": 0.0}
        values["zero_optimization"]["reduce_scatter"] = False
    values["zero_optimization"] |= changes.pop("zero", {})
    folder.mkdir(exist_ok=True)
    recipe = folder / f"{name}.json"
    recipe.write_text(json.dumps(values))
    ranks, micro_batches = split
    sizes = {"batch_size": 24 // ranks // micro_batches, "gradient_accumulation_steps": micro_batches}
    sizes |= {} if "muon_lr" in values["optimizer"]["params"] else {"learning_rate": 0.01}
    given = {
        "phases": [Phase("loss", 2), Phase("loss", 2, name="again")],
        "checkpointing": Checkpointing(keep=20),
        "logging": Logging(every_steps=1, progress="off"),
        "optimization": Optimization(**sizes | taken(Optimization)),
    }
    return RunConfig(engine=engine, deepspeed=str(recipe), run_dir=str(folder / name), **given | changes)
