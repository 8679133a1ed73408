"""Run file and command line: what wins, what round-trips, and the original's run files as they are."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdyn import config, ds_config, gdynet
from gdyn.config import RunConfig, parse
from gdyn.engines import Vamp
from gdyn.errors import UserError
from gdyn.phases import Phase
from tests.toy import Toy

RUN = {
    "engine": {"class_path": "Vamp", "init_args": {"train": ["a"], "validation": ["b"], "tau": 5, "state_len": 4}},
    "deepspeed": "fp32_zero1",
    "run_dir": "runs/one",
    "loss_schedule": ["vamp2", "vamp1"],
    "epochs": 3,
    "optimization": {"batch_size": 16, "learning_rate": 0.002},
}

# The "Basic Configuration" of the original's training guide, to the letter.
GDYNET = """
# configs/my_experiment.yaml

# Model selection (automatically pairs with correct dataset)
model_type: 'gdynet_vanilla'  # or 'gdynet_ferro'

# Architecture
model:
  atom_fea_len: 64      # Embedding dimension
  n_conv: 3             # Number of graph conv layers
  state_len: 10         # Output dimension
  cutoff: 6.0           # Neighbor cutoff (Angstroms)
  num_gaussians: 50     # Distance encoding resolution
  tau: 10               # Time lag for dynamics
  epsilon: 1.0e-10      # Numerical stability
  batch_size: 32        # Batch size
  learning_rate: 0.001  # Adam learning rate

# Data paths
data:
  train_fnames: ['/path/to/train']
  val_fnames: ['/path/to/val']
  test_fnames: ['/path/to/test']

# Training schedule
training:
  epochs: 30                                  # Per loss type
  loss_schedule: ['vamp2', 'vamp1', 'vamp2']  # 90 total epochs
  seed: 1234

# Optimization (all optional)
optimization:
  torch_compile: false
  mixed_precision: false
  torchscript: false

# Checkpointing
checkpointing:
  frequency: 1              # Save every N epochs
  save_best_only: false     # Save all or only best

# Output
output:
  folder: './output/my_experiment'
"""


def write(folder: Path, content: str | dict[str, Any], name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    return write(tmp_path, RUN)


# Our own run files.


def test_a_run_file_becomes_typed_objects(run_file) -> None:
    command = parse(["--config", run_file])
    found = command.config
    assert isinstance(found.engine, Vamp)
    assert (found.engine.tau, found.engine.state_len, found.engine.mode) == (5, 4, "trunc")
    assert found.plan.phases == (Phase("vamp2", 3), Phase("vamp1", 3))
    assert found.optimization.learning_rate == 0.002
    assert (command.mode, command.notices) == ("train", [])


def test_phases_say_more_than_a_schedule(tmp_path) -> None:
    phases = [
        {"objective": "vamp2", "epochs": 2},
        {"objective": "vamp1", "epochs": 1, "name": "end", "trains": ["*readout*"]},
    ]
    content = {key: value for key, value in RUN.items() if key not in ("loss_schedule", "epochs")} | {"phases": phases}
    plan = parse(["--config", write(tmp_path, content)]).config.plan
    assert plan.phases == (Phase("vamp2", 2), Phase("vamp1", 1, "end", ("*readout*",)))


@pytest.mark.parametrize("order", [0, 1])
def test_the_command_line_wins_wherever_it_stands(run_file, order) -> None:
    options = [
        "--seed",
        "7",
        "--engine.tau=9",
        "--optimization.learning_rate",
        "0.5",
        "--resume",
        "never",
        "--run_dir=x",
    ]
    found = parse([["--config", run_file, *options], [*options, f"--config={run_file}"]][order]).config
    assert (found.seed, found.engine.tau, found.optimization.learning_rate, found.resume) == (7, 9, 0.5, "never")
    assert found.run_dir == str(Path("x").absolute())
    assert (found.engine.state_len, found.optimization.batch_size) == (4, 16)


def test_the_run_file_fills_what_the_json_leaves_open(run_file) -> None:
    found = parse(["--config", run_file, "--optimization.learning_rate", "0.5"]).config
    values = ds_config.complete(ds_config.read(found.deepspeed), found.optimization, total_steps=10)
    assert ds_config.micro_batch(values) == 16
    assert ds_config.get(values, "optimizer.params.lr") == 0.5


def test_a_contradiction_of_json_and_run_file_names_both(tmp_path) -> None:
    json = tmp_path / "mine.json"
    recipe = Path(parse(["--config", write(tmp_path, RUN)]).config.deepspeed)
    json.write_text(
        recipe.read_text().replace('"train_micro_batch_size_per_gpu": "auto"', '"train_micro_batch_size_per_gpu": 8')
    )
    found = parse(["--config", write(tmp_path, RUN | {"deepspeed": "mine.json"})]).config
    assert found.deepspeed == str(json)  # found beside the run file
    with pytest.raises(
        UserError, match=r"mine\.json: train_micro_batch_size_per_gpu = 8.*optimization\.batch_size = 16"
    ):
        ds_config.complete(ds_config.read(found.deepspeed), found.optimization)


def test_paths_of_data_hold_from_any_folder(run_file) -> None:
    engine = parse(["--config", run_file]).config.engine
    assert engine.train == [str(Path("a").absolute())]


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("on", "on"), ("auto", "auto"), ("'off'", "off")])
def test_on_and_off_are_words_though_yaml_reads_them_as_true_and_false(tmp_path, written, meant) -> None:
    text = yaml.safe_dump(RUN) + f"preflight: {written}\nlogging: {{progress: {written}}}\n"
    found = parse(["--config", write(tmp_path, text)]).config
    assert (found.preflight, found.logging.progress) == (meant, meant)
    assert parse(["--config", write(tmp_path, found.to_yaml(), "own.yaml")]).config == found


def test_the_runs_own_copy_is_the_same_run(run_file, tmp_path) -> None:
    found = parse(["--config", run_file, "--engine.epsilon", "1e-7"]).config
    assert config.load(Path(write(tmp_path, found.to_yaml(), "copy.yaml"))) == found


def test_print_config_round_trips(run_file, tmp_path, capsys) -> None:
    argv = ["--config", run_file, "--engine.tau", "9", "--seed", "7"]
    with pytest.raises(SystemExit) as stop:
        parse([*argv, "--print_config"])
    assert stop.value.code in (None, 0)
    printed = write(tmp_path, capsys.readouterr().out, "printed.yaml")
    assert parse(["--config", printed]).config == parse(argv).config


def test_help_explains_every_key_of_the_run_file() -> None:
    text = " ".join(config.make_parser().format_help().split())
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name}" in text, field.name
    for group in (config.Optimization, config.Checkpointing, config.Logging):
        for field in dataclasses.fields(group):
            assert f".{field.name}" in text, field.name
    assert "Samples per rank and micro-batch" in text


def test_help_of_an_engine_explains_every_field(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--engine.help", "Vamp"])
    assert stop.value.code in (None, 0)
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Vamp):
        assert f"--engine.init_args.{field.name}" in text or f"--engine.{field.name}" in text, field.name
    for said in ("Lag, in frames", "Range of the Gaussian distance features, Å", "Number of states"):
        assert said in text


# Phases that build on each other, and weights from elsewhere.


@dataclass(frozen=True)
class Staged(Toy):
    """An encoder, then a head on top of it."""

    def objectives(self) -> tuple[str, ...]:
        return ("loss", "encode", "decode")

    def trains(self, objective: str) -> tuple[str, ...]:
        return {"encode": ("encoder.*",), "decode": ("head.*",)}.get(objective, ("*",))

    def needs(self, objective: str) -> tuple[str, ...]:
        return ("encoder.input.*", "encoder.body.*") if objective == "decode" else ()


ENCODE, DECODE = Phase("encode", 1), Phase("decode", 1)


def staged(*phases: Phase, **changes: Any) -> Any:
    return RunConfig(Staged(), "fp32_zero1", "run", phases=list(phases), **changes).plan.phases


def test_a_phase_trains_what_its_objective_says_unless_it_says_so_itself() -> None:
    given = (ENCODE, Phase("decode", 1, trains=("head.weight",)), Phase("loss", 1))
    assert [phase.trains for phase in staged(*given)] == [("encoder.*",), ("head.weight",), ("*",)]


@pytest.mark.parametrize(
    ("before", "init_from", "missing"),
    [
        ([], None, "encoder.input.*, encoder.body.*"),
        ([Phase("loss", 1, trains=("head.*",))], None, "encoder.input.*, encoder.body.*"),
        ([Phase("encode", 1, trains=("encoder.body.*",))], None, "encoder.input.*"),
        ([], {"encoder.input.*": "x", "encoder.body.0.*": "x", "head.*": "x"}, "encoder.body.*"),
    ],
)
def test_a_phase_before_what_it_needs_is_refused_with_the_cures(before, init_from, missing) -> None:
    said = re.escape(f"phases[{len(before)}] (late) builds on {missing}, which no phase before it trains. Put")
    with pytest.raises(UserError, match=rf'{said}.*init_from: {{"encoder'):
        staged(*before, Phase("decode", 1, "late"), ENCODE, init_from=init_from)


def test_what_a_phase_needs_an_earlier_one_or_init_from_gives() -> None:
    narrow = Phase("encode", 1, trains=("encoder.input.*",))
    for phases, init_from in [
        ((ENCODE, DECODE), None),
        ((Phase("loss", 1), DECODE), None),
        ((DECODE,), "runs/other"),
        ((DECODE,), {"encoder.*": "runs/other"}),
        ((narrow, DECODE), {"encoder.body.*": "runs/other"}),
    ]:
        assert staged(*phases, init_from=init_from)


@pytest.mark.parametrize("where", ["run file", "command line"])
@pytest.mark.parametrize("given", ["a", {"lobe_0.*": "a", "*": "b/w.safetensors"}])
def test_init_from_is_a_path_or_a_mapping_and_holds_from_any_folder(tmp_path, where, given) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    content, argv = (RUN | {"init_from": given}, []) if where == "run file" else (RUN, ["--init_from", text])
    found = parse(["--config", write(tmp_path, content), *argv]).config
    here = str(Path().absolute())
    meant = f"{here}/a" if given == "a" else {"lobe_0.*": f"{here}/a", "*": f"{here}/b/w.safetensors"}
    assert found.init_from == meant
    assert parse(["--config", write(tmp_path, found.to_yaml(), "own.yaml")]).config == found


def test_phases_of_the_runs_own_copy_are_the_same(tmp_path) -> None:
    content = {key: value for key, value in RUN.items() if key not in ("loss_schedule", "epochs")}
    phase = {"objective": "vamp2", "epochs": 9, "patience": 3, "restore_best": True}
    found = parse(["--config", write(tmp_path, content | {"phases": [phase]})]).config
    assert found.plan.phases == (Phase("vamp2", 9, patience=3, restore_best=True),)
    assert config.load(Path(write(tmp_path, found.to_yaml(), "copy.yaml"))).plan == found.plan


# The original's run files.


def test_the_guides_run_file_trains_unmodified(tmp_path) -> None:
    command = parse(["--config", write(tmp_path, GDYNET), "--mode", "train"])
    found, engine = command.config, command.config.engine
    assert engine == Vamp(
        train=["/path/to/train"],
        validation=["/path/to/val"],
        test=["/path/to/test"],
        model_type="vanilla",
        tau=10,
        state_len=10,
        atom_fea_len=64,
        n_conv=3,
        cutoff=6.0,
        num_gaussians=50,
        epsilon=1e-10,
        mode="trunc",
    )
    # Its "vamp1" follows the gradient of the symmetrised score.
    assert found.plan.phases == (Phase("vamp2", 30), Phase("vamp_sym", 30), Phase("vamp2", 30))
    assert Path(found.deepspeed).stem == "fp32_zero0"
    assert (found.optimization.batch_size, found.optimization.learning_rate) == (32, 0.001)
    assert (found.seed, found.checkpointing.every_epochs, found.logging.style) == (1234, 1, "gdynet")
    assert found.run_dir == str(Path("output/my_experiment").absolute())
    assert len(command.notices) == 1
    assert "translated" in command.notices[0]


def test_the_originals_options_are_understood(tmp_path) -> None:
    words = [
        "--config",
        write(tmp_path, GDYNET),
        "--mode",
        "evaluate",
        "--output",
        "./custom",
        "--resume",
        "p1-vamp1-e0015",
    ]
    command = parse(words)
    assert command.mode == "evaluate"
    assert command.config.run_dir == str(Path("custom").absolute())
    assert command.config.resume == "p1-vamp1-e0015"
    assert parse([*words[:2], "--output=elsewhere"]).config.run_dir == str(Path("elsewhere").absolute())


def test_what_the_originals_run_file_leaves_out_has_its_defaults() -> None:
    least = {"model_type": "gdynet_ferro", "data": {"train_fnames": ["a"], "val_fnames": ["b"]}}
    new = gdynet.translate(least, "run.yaml")
    assert new["engine"]["init_args"] == {"model_type": "ferro", "train": ["a"], "validation": ["b"]}
    assert (new["loss_schedule"], new["epochs"], new["seed"]) == (["vamp2", "vamp_sym", "vamp2"], 30, 1234)
    assert (new["optimization"]["batch_size"], new["optimization"]["learning_rate"]) == (32, 1e-3)


def test_the_originals_performance_options_become_ours(tmp_path) -> None:
    old = yaml.safe_load(GDYNET)
    old["optimization"] = {
        "mixed_precision": True,
        "torch_compile": True,
        "compile_mode": "max-autotune",
        "torchscript": True,
    }
    old["training"] |= {"seed": None, "loss_schedule": ["vamp2"]}
    old["checkpointing"] = {"frequency": 10, "save_best_only": True}
    old["wandb"] = {"enabled": True, "project": "gdynet-production", "entity": "your_team", "run_name": "one"}
    path = write(tmp_path, old)
    found, again = parse(["--config", path]).config, parse(["--config", path]).config
    assert Path(found.deepspeed).stem == "bf16_zero0"
    assert (found.optimization.torch_compile, found.optimization.compile_mode, found.export) == (
        True,
        "max-autotune",
        True,
    )
    assert (found.checkpointing.every_epochs, found.checkpointing.save_best_only) == (10, True)
    assert dataclasses.asdict(found.wandb) == old["wandb"]
    assert found.seed != again.seed  # null: another one in every run


def test_the_originals_list_of_files_is_one_trajectory(tmp_path) -> None:
    names = [f"/data/{name}.npy" for name in ("atom_types", "target_index", "nbr_lists", "nbr_dists")]
    old = yaml.safe_load(GDYNET) | {"data": {"train_fnames": names, "val_fnames": names}}
    engine = parse(["--config", write(tmp_path, old)]).config.engine
    with pytest.raises(UserError, match="missing /data/atom_types.npy"):
        engine.trajectories(engine.train)
