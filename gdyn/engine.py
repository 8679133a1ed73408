"""Engine and Step: what a model family must say to be trained.

    @dataclass(frozen=True)
    class Mean(Engine):
        data: str
        def model(self): return nn.Linear(3, 1)
        def datasets(self): return {"train": Rows(self.data), "validation": Rows(self.data)}
        def begin_window(self, model, batches, phase, here): return here.world_size * sum(len(b) for b in batches)
        def loss(self, model, batch, phase, window):
            squares = model(batch).square()
            return Step(loss=squares.sum() / window, metrics={"loss": squares.mean().detach()}, weight=len(batch))

Three promises an engine makes:
1. one call of the root module per micro-batch, so that DeepSpeed's hooks see it;
2. no branch on `model.training` or on the split: the same batch gives the same number in training and in validation;
3. linear algebra that dislikes half precision is done in float32 or float64 inside the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from gdyn.errors import UserError
from gdyn.phases import Phase

if TYPE_CHECKING:
    from gdyn.inference import Run
    from gdyn.ranks import RankContext


class Dataset(Protocol):
    """Samples that are fetched a batch at a time.

    Where samples differ in size it may also have `sizes`, (N,) int: what each costs (residues, atoms). Then the samples
    of a window are dealt to the ranks so that their sizes balance, and `Engine.max_size` may bound them. A list
    `identifiers` of N names lets a message say which sample it is about.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of these samples, as named tensors on the CPU."""
        ...


@dataclass(frozen=True)
class Step:
    """What one micro-batch contributes.

    The objective of an optimizer step is the *sum* of `loss` over all micro-batches of all ranks in the window: a loss
    that is a mean over samples divides by the samples of the whole window (`begin_window` can count them). The trainer
    undoes DeepSpeed's averaging over ranks and micro-batches. That is why the same global batch gives the same gradient
    for any split.
    """

    loss: torch.Tensor
    """Scalar with a graph: this micro-batch's share of the objective."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars; logged as means weighted by `weight`."""
    weight: float = 1.0
    """How many samples the metrics stand for."""
    statistics: torch.Tensor | None = None
    """Detached numbers that add up over micro-batches and ranks; `Engine.pooled` turns their sum over a whole split
    into scores that are no means."""


@dataclass(frozen=True)
class Predictor:
    """A network with positional tensors in and out, and what torch.export must know of it."""

    network: nn.Module
    example: tuple[torch.Tensor, ...]
    other: tuple[torch.Tensor, ...]
    """Inputs of other sizes, with which the exported program is checked."""
    dynamic_shapes: tuple[Any, ...]
    inputs: dict[str, str]
    """Name and meaning of every input, in order."""
    output: str


@dataclass(frozen=True)
class Engine(ABC):
    """A model family. Its fields are its hyper-parameters: they are the run file's schema, the command line and the
    manual."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A plain module for one device, freshly initialized from torch's global generator."""

    @abstractmethod
    def datasets(self) -> dict[str, Dataset]:
        """The splits: train, validation and, if there is one, test.

        Raises: UserError, MissingFile for data that cannot be used.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor], phase: Phase, window: Any) -> Step:
        """This micro-batch's share of the objective, for training and validation alike."""

    shown: ClassVar[tuple[str, ...]] = ()
    """Validation scores that get a column in the epoch table, beside the objective."""

    size_key: ClassVar[str] = "max_size"
    """The engine's field that `max_size` comes from, for messages."""

    calls_depend_on_data: ClassVar[bool] = False
    """How often modules within the network are called differs from batch to batch, and so from rank to rank. ZeRO 3,
    which gathers their weights in every call, is then refused: its ranks would not call the same collectives."""

    like_sizes: ClassVar[bool] = False
    """Whether windows hold samples of like `Dataset.sizes`, so that batches have little padding. An epoch then has the
    same samples in an order that is less random."""

    @property
    def max_size(self) -> int | None:
        """The largest sum of `Dataset.sizes` per rank and micro-batch; None: only the batch size bounds it."""
        return None

    def objectives(self) -> tuple[str, ...]:
        """The words `Phase.objective` may be. Each is also a score in `pooled` or `Step.metrics`."""
        return ("loss",)

    def higher_is_better(self, objective: str) -> bool:
        """Which way the validation score of an objective improves."""
        return False

    def trains(self, objective: str) -> tuple[str, ...]:
        """Globs over parameter names: what a phase with this objective trains where the run file does not say."""
        return ("*",)

    def needs(self, objective: str) -> tuple[str, ...]:
        """Globs over parameter names: what a phase with this objective builds on, and an earlier phase or `init_from`
        must therefore have trained; a run file that forgets it is refused."""
        return ()

    def evaluating(self, model: nn.Module) -> AbstractContextManager[object]:
        """What holds while a split is scored, e.g. averaged weights in place of the present ones, or noise that is the
        same every time. Entered around every evaluation, of training as of finished runs, by every rank; on leaving,
        training goes on as if nothing had happened. `model`: DeepSpeed's engine or the plain network."""
        return nullcontext()

    def begin_window(
        self, model: nn.Module, batches: list[dict[str, torch.Tensor]], phase: Phase, here: RankContext
    ) -> Any:
        """What `loss` needs to know of the whole window (all ranks x all micro-batches). Every rank calls this;
        validation calls it for one batch with `here` a world of one."""
        return None

    def end_window(self, model: nn.Module, steps: list[Step], phase: Phase, window: Any, here: RankContext) -> None:
        """What a network learns without gradients, after an optimizer step that was applied: an average, a counter, in
        buffers of `model` (the network itself), which checkpoints hold. `steps`: what `loss` said of this rank's
        micro-batches. Every rank calls this, with torch's autograd off, in training only; buffers must come out the
        same on all ranks, so sum what they are made of with `gdyn.collectives.sum_over_ranks`."""
        return None

    def gauges(self, model: nn.Module, phase: Phase) -> dict[str, float]:
        """Numbers of the network's present state for the train lines of the metrics, e.g. a scheduled weight. Every
        rank calls this when a line is due; rank 0's are written."""
        return {}

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Parts of the network whose gradient norms the train lines tell apart, as `grad_norm_<name>`: globs over
        parameter names."""
        return {}

    def pooled(self, statistics: torch.Tensor) -> dict[str, Any]:
        """Scores of a whole split from the summed `Step.statistics`: each computed once, never a mean of batch
        scores."""
        return {}

    def notices(self, train: Dataset, samples_per_window: int) -> list[str]:
        """What a user should know before the first step, one sentence each.

        Raises: UserError if this batch cannot work.
        """
        return []

    def param_groups(self, model: nn.Module, phase: Phase) -> list[dict[str, Any]] | None:
        """Optimizer parameter groups, which together hold every parameter once; None: one group. A `name` stands in
        the log and in `lr_<name>`. `use_muon`, true in the groups of weight matrices (two dimensions) whose
        optimizer may be Muon, counts where the DeepSpeed JSON says Muon; learning rates and such are the JSON's."""
        return None

    def figures(self, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Matplotlib figures for TensorBoard, from the final scores of each split."""
        return {}

    def headline(self, summary: dict[str, Any]) -> list[str]:
        """What a person wants to read at the end of a run, from summary.json."""
        return []

    def evaluate(self, run: Run, sources: list[str]) -> dict[str, Any]:
        """Scores of a run's weights on other data, for `gdyn evaluate`.

        Raises: UserError for data that cannot be used, or if the engine has none.
        """
        raise UserError(f"{type(self).__name__} has no evaluation; its scores are in summary.json of the run folder.")

    def evaluation_lines(self, result: dict[str, Any]) -> list[str]:
        """What `gdyn evaluate` prints of it."""
        return plain_lines(result)

    def predictor(self, model: nn.Module) -> Predictor:
        """What `gdyn export` makes a program of.

        Raises: UserError if the engine has none.
        """
        raise UserError(
            f"{type(self).__name__} has no stand-alone predictor to export; its weights are in the run folder, "
            "checkpoints/*/weights.safetensors."
        )

    report_options: ClassVar[tuple[str, ...]] = ()
    """Options of `gdyn analyze` that `report` understands beside `split`."""

    def report(self, run: Run, **options: Any) -> dict[str, Any]:
        """What `gdyn analyze` shows of a run.

        Raises: UserError if there are no data to show, or the engine has none.
        """
        raise UserError(f"{type(self).__name__} has no report; its scores are in summary.json of the run folder.")

    def report_lines(self, summary: dict[str, Any]) -> list[str]:
        """What `gdyn analyze` prints of it."""
        return plain_lines(summary)

    def encode(self, run: Run, inputs: list[Path], output: Path, here: RankContext, **options: Any) -> list[str]:
        """Write `inputs` as strings over the run's alphabet, for `gdyn encode`. Returns what to print.

        Raises: UserError if the engine learns none.
        """
        raise UserError(f"{type(self).__name__} learns no alphabet; gdyn encode is for engines that do.")

    def sample(self, run: Run, pockets: Path, output: Path, here: RankContext, **options: Any) -> list[str]:
        """Write new molecules for `pockets` into the folder `output`, for `gdyn sample`. Every rank must call this.
        Returns what to print, on rank 0.

        Raises: UserError if the engine makes none.
        """
        raise UserError(f"{type(self).__name__} makes no molecules; gdyn sample is for engines that do.")


def plain_lines(values: Mapping[str, Any]) -> list[str]:
    """ "name  value", aligned; what is neither number nor word is left out."""
    shown = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    width = max(map(len, shown), default=0)
    texts = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in shown.values())
    return [f"{name:<{width}}  {text}" for name, text in zip(shown, texts, strict=True)]
