"""RunConfig: everything a run file may say, and the parser that reads it.

Precedence: command line > run file > values left "auto" in the DeepSpeed JSON. A value stated in two of them
differently is an error that names both.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

import gdyn.engines  # noqa: F401  importing the engines makes them known to the parser
from gdyn import gdynet, recipes
from gdyn.engine import Engine
from gdyn.errors import MissingFile, UserError
from gdyn.learning_rate import LearningRateSchedule
from gdyn.phases import Phase, Plan, covered
from gdyn.schedules import Schedule


@dataclass(frozen=True)
class Optimization:
    """What fills the "auto" values of the DeepSpeed JSON, and compilation."""

    batch_size: PositiveInt | None = None
    """Samples per rank and micro-batch (train_micro_batch_size_per_gpu)."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimizer step."""
    learning_rate: PositiveFloat | None = None
    """The optimizer's lr and the schedule's peak."""
    lr_schedule: LearningRateSchedule | None = None
    """Warm-up and decay of the learning rates, where the DeepSpeed JSON has no scheduler."""
    mixed_precision: bool | None = None
    """true: bf16 autocast, unless the JSON names a precision."""
    torch_compile: bool = False
    """Compile the network (the first epoch is slower)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Passed to torch.compile."""
    max_skipped_windows: PositiveInt = 5
    """Optimizer steps in a row that may be skipped because a loss or gradient is not finite; so many end the job."""


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written and which are kept."""

    every_epochs: PositiveInt = 1
    """Save after every so many epochs; the best and the end of a phase are always saved."""
    every_steps: PositiveInt | None = None
    """Also save within epochs."""
    keep: PositiveInt = 2
    """How many of the newest to keep beside the best, the latest and the end of each phase."""
    save_best_only: bool = False
    """Keep only the best and the latest."""


def _read_switch(section: Any, name: str) -> None:
    """YAML reads on and off as true and false; they stay words."""
    value = getattr(section, name)
    if isinstance(value, bool):
        object.__setattr__(section, name, "on" if value else "off")


@dataclass(frozen=True)
class Logging:
    """What is written while training."""

    every_steps: PositiveInt = 10
    """A line of metrics.jsonl and a TensorBoard point after so many optimizer steps."""
    style: Literal["table", "gdynet", "lines"] = "table"
    """How an epoch is printed: one table row, the original GDyNet block, or a line for scripts, "Epoch 1: Train Loss =
    0.1234, Test Loss = 0.1456", numbered within its phase, where Test is the validation set."""
    progress: Literal["auto", "on", "off"] | bool = "auto"
    """A progress bar per epoch; auto: only on a terminal."""

    def __post_init__(self) -> None:
        _read_switch(self, "progress")


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases, needs the extra `wandb`."""

    enabled: bool = False
    project: str | None = None
    entity: str | None = None
    run_name: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """A run: engine, phases, DeepSpeed recipe, and where results go."""

    engine: Engine
    """The model family and its hyper-parameters: `class_path: Vamp` and `init_args`."""

    deepspeed: str
    """DeepSpeed JSON: a path, or the name of a bundled recipe such as fp32_zero1."""

    run_dir: str
    """Folder for everything the run writes."""

    phases: list[Phase] | None = None
    """What is trained, in order. Or use loss_schedule and epochs."""

    loss_schedule: list[str] | None = None
    """Short form of phases: one objective per phase, `epochs` each."""

    epochs: PositiveInt | None = None
    """Epochs of each phase of loss_schedule."""

    seed: NonNegativeInt = 1234
    """Of the weights and the order of samples."""

    resume: str = "auto"
    """auto: continue if the run folder holds checkpoints; never: refuse to; or a tag such as p1-vamp1-e0015."""

    init_from: dict[str, str] | str | None = None
    """Start from another run's best weights (a run folder) or from a .safetensors file; or parts from several:
    {"encoder.*": runs/one, "decoder.*": runs/two}, globs over names of weights, of which the last that matches counts;
    what none matches begins fresh."""

    allow_schedule_change: bool = False
    """Accept that phases already trained differ from the run file's."""

    optimization: Optimization = field(default_factory=Optimization)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    logging: Logging = field(default_factory=Logging)
    wandb: Wandb = field(default_factory=Wandb)

    report: bool = False
    """After training, make the HTML report as `gdyn analyze` does."""

    export: bool = False
    """After training, write weights and a stand-alone predictor as `gdyn export` does."""

    workers: NonNegativeInt = 0
    """Processes per rank that read ahead; 0 reads in the training process, which is fastest for memory-mapped
    frames."""

    wall_time: PositiveFloat | None = None
    """Seconds after which to stop with a checkpoint and exit code 75."""

    hang_timeout: PositiveFloat = 600
    """Seconds without a finished step, evaluation batch or checkpoint after which every rank writes where it stands and
    the job ends with exit code 71."""

    preflight: Literal["auto", "on", "off"] | bool = "auto"
    """Check ranks, devices, network, storage and memory before training; auto: in a job of several ranks."""

    limit_windows: PositiveInt | None = None
    """A quick run: at most so many optimizer steps per epoch, and as many samples of each split that is evaluated."""

    overfit_windows: PositiveInt | None = None
    """A sanity check: train on the same few windows in every epoch."""

    def __post_init__(self) -> None:
        _read_switch(self, "preflight")

    @property
    def plan(self) -> Plan:
        """What is trained, with every phase's `trains` spelt out.

        Raises: UserError if phases are given twice, not at all, with an objective the engine does not know, or before
        what they need.
        """
        if self.phases and (self.loss_schedule or self.epochs):
            raise UserError("give either phases, or loss_schedule with epochs, not both.")
        if self.loss_schedule and not self.epochs:
            raise UserError("loss_schedule needs epochs (per phase).")
        phases = self.phases or [Phase(word, self.epochs or 0) for word in self.loss_schedule or []]
        known = self.engine.objectives()
        for i, phase in enumerate(phases):
            if phase.objective not in known:
                raise UserError(
                    f'phases[{i}].objective is "{phase.objective}"; {type(self.engine).__name__} knows '
                    f"{', '.join(known)}."
                )
        plan = Plan(tuple(dataclasses.replace(phase, trains=self._trains(phase)) for phase in phases))
        self._check_needs(plan)
        return plan

    def _trains(self, phase: Phase) -> tuple[str, ...]:
        return self.engine.trains(phase.objective) if tuple(phase.trains) == ("*",) else tuple(phase.trains)

    def _check_needs(self, plan: Plan) -> None:
        """Raises: UserError if a phase builds on weights that nothing has trained by then."""
        given = self.init_from or ()
        trained = ["*"] if isinstance(given, str) else list(given)
        for i, phase in enumerate(plan.phases):
            missing = [glob for glob in self.engine.needs(phase.objective) if not covered(glob, trained)]
            if missing:
                raise UserError(
                    f"phases[{i}] ({phase.label}) builds on {', '.join(missing)}, which no phase before it trains. Put "
                    "such a phase before it (its trains must cover each of these), or take them from another run: "
                    f'init_from: {{"{missing[0]}": runs/other}}.'
                )
            trained += phase.trains

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Flat, for TensorBoard and the report."""
        flat = {"engine": type(self.engine).__name__, "deepspeed": self.deepspeed, "seed": self.seed}
        flat |= {f.name: getattr(self.engine, f.name) for f in dataclasses.fields(self.engine)}
        return flat | dataclasses.asdict(self.optimization)

    def to_dict(self) -> dict[str, Any]:
        """The run file in full, as plain values: every value that holds, with absolute paths."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in values.items()
            if value is not None
        }
        plain["engine"] = {"class_path": type(self.engine).__name__, "init_args": dataclasses.asdict(self.engine)}
        if self.phases is not None:
            plain["phases"] = [dataclasses.asdict(phase) | {"trains": list(phase.trains)} for phase in self.phases]
        # Through JSON, because the parser's restricted numbers are subclasses that YAML does not know.
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result

    def to_yaml(self) -> str:
        """A run file that can be used again from anywhere."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))


@dataclass(frozen=True)
class Command:
    """What a command line came to."""

    config: RunConfig
    mode: Literal["train", "evaluate"]
    notices: list[str]


def make_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help is what stands below each field
    parser = ArgumentParser(
        prog="gdyn train",
        description="Train the engine of a run file. Every key of the run file is also an option, e.g. --engine.tau 5.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="The run file (YAML).")
    parser.add_argument(
        "--mode", choices=["train", "evaluate"], default="train", help="evaluate: score the best checkpoint."
    )
    parser.add_argument("--local_rank", type=int, help="Accepted because launchers pass it; the environment is used.")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(argv: list[str]) -> Command:
    """Read command line and run file.

    Raises: UserError naming the key, for anything that is not understood.
    """
    words = _run_file_first(argv)
    run_file = Path(words[1]) if words[:1] == ["--config"] else None
    words, notices = gdynet.translate_arguments(words)
    _refuse_list_items(words)
    parser = make_parser()
    try:
        values = parser.parse_args(words)
        objects = parser.instantiate(values)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises many kinds; every one of them is about the user's input
        raise UserError(_explain(str(error), words, run_file)) from None
    fields = {f.name: objects[f.name] for f in dataclasses.fields(RunConfig)}
    # A DeepSpeed JSON may lie beside the run file.
    fields["deepspeed"] = str(recipes.find_recipe(fields["deepspeed"], run_file and run_file.parent))
    fields["run_dir"] = str(Path(fields["run_dir"]).absolute())
    fields["init_from"] = _absolute(fields["init_from"])
    return Command(RunConfig(**fields), objects["mode"], notices)


def _absolute(init_from: dict[str, str] | str | None) -> dict[str, str] | str | None:
    if isinstance(init_from, dict):
        return {glob: str(Path(source).absolute()) for glob, source in init_from.items()}
    return init_from and str(Path(init_from).absolute())


def load(path: Path) -> RunConfig:
    """The run.yaml of a run folder.

    Raises: MissingFile, UserError.
    """
    if not path.is_file():
        raise MissingFile(f"{path} does not exist.")
    return parse(["--config", str(path)]).config


def _run_file_first(argv: list[str]) -> list[str]:
    """The same arguments with the run file in front, because jsonargparse lets later ones win, wherever they come
    from."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    front: list[str] = []
    while "--config" in words[:-1]:
        i = words.index("--config")
        front += words[i : i + 2]
        del words[i : i + 2]
    return front + words


def _refuse_list_items(argv: list[str]) -> None:
    for word in argv:
        # jsonargparse would silently change the last phase only
        if word.startswith("--phases."):
            raise UserError(
                f"{word}: items of a list cannot be set from the command line; edit phases in the run file."
            )


def _explain(message: str, argv: list[str], run_file: Path | None) -> str:
    """jsonargparse's nested message as one line: where the key stands, what is wrong with it, and for a misspelt one
    the nearest known name."""
    engines = {engine.__name__: engine for engine in Engine.__subclasses__()}
    unknown = re.search(r"dot import path string: (\S+)|Import path (\S+)", message)
    lines = [line.strip(" -") for line in message.strip().splitlines()]
    keys = re.findall(r'Parser key "([^"]+)"', message)
    # Of a union the first alternative is meant that could be; the last is null.
    reason = next(line for line in [*lines, lines[-1]] if line and not re.match(_NO_REASON, line))
    if unknown and keys[-1:] == ["engine"]:
        reason = f'unknown engine "{unknown[1] or unknown[2]}"; known: {", ".join(sorted(engines))}'
    elif reason.endswith("is abstract"):
        reason = "the keys class_path and init_args are expected"
    elif reason.endswith("no attribute 'keys'") or "must be a mapping" in reason:
        reason = "a section is one value; keys and values are expected"
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", reason))
    given = re.search(r"Given value: (.{1,60})$", message)
    stranger = re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: -*([\w.]+)", reason)
    place = keys[:1] + ([stranger[1] or stranger[2]] if stranger else []) + re.findall(r"argument --(\w+)", reason)
    typed = any(word.startswith(f"--{name}") for word in argv for name in place)
    parts = [str(run_file)] if run_file and not typed else []
    parts += [".".join(keys)] if keys else []
    # Of a section the reason says which of its keys is wrong.
    found = f" Found: {given[1]}." if given and not given[1].startswith(("{", "Namespace(")) else ""
    return ": ".join([*parts, reason.rstrip(".")]) + "." + found + _hint(stranger and place[-1], engines)


_NO_REASON = (
    "Parser key|Problem with|Does not validate|Subtypes|Errors|Expected a <class 'NoneType'>"
    "|.* must be a string or a real number, not '(dict|Namespace)'"
)


def _hint(stranger: str | None, engines: dict[str, type[Engine]]) -> str:
    """The name that an unknown key resembles, if there is one."""
    if stranger is None:
        return ""
    groups: list[Any] = [RunConfig, Optimization, LearningRateSchedule, Checkpointing, Logging, Wandb, Phase, Schedule]
    groups += engines.values()
    sections = [f.default_factory for engine in engines.values() for f in dataclasses.fields(engine)]
    groups += [section for section in sections if dataclasses.is_dataclass(section)]
    known = [f.name for group in groups for f in dataclasses.fields(group)]
    near = difflib.get_close_matches(stranger.split(".")[-1], known, 1)
    return (
        f' Did you mean "{near[0]}"?'
        if near
        else f" See gdyn train --help and --engine.help {' or '.join(sorted(engines))}."
    )
