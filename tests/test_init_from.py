"""Weights from elsewhere: a whole run, a file, or parts of several."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdyn.errors import MissingFile, UserError
from gdyn.inference import begin_from, load_run
from gdyn.phases import Phase
from gdyn.rundir import RunDir
from tests import runs
from tests.toy import Network, toy_run


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network()


def state(seed: int) -> dict[str, torch.Tensor]:
    return network(seed).state_dict()


def stored(path: Path, seed: int, **changes: torch.Tensor | None) -> str:
    """A file of weights; `changes`: what stands there instead, None: nothing. Dots are written as __."""
    weights = state(seed) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    return str(path)


def origin(model: Network, *seeds: int) -> dict[str, set[int]]:
    """Part of the network -> the seeds whose weights it has; buffers are the same for all."""
    found: dict[str, set[int]] = {}
    for name, tensor in model.named_parameters():
        part = ".".join(name.split(".")[:-1])
        found.setdefault(part, set()).update(seed for seed in seeds if torch.equal(state(seed)[name], tensor))
    return found


def test_parts_come_from_their_sources_and_the_rest_stays_fresh(tmp_path) -> None:
    model = network(0)
    sources = {
        "encoder.body.*": stored(tmp_path / "one.safetensors", 1, head__weight=None),
        "head.*": stored(tmp_path / "two.safetensors", 2, encoder__input__weight=torch.zeros(99)),
        "step": stored(tmp_path / "three.safetensors", 3, step=torch.tensor(7)),
    }
    begin_from(sources, model)
    expected = {"encoder.input": {0}, "encoder.body.0": {1}, "encoder.body.2": {1}, "head": {2}}
    assert origin(model, 0, 1, 2) == expected
    assert int(model.step) == 7


def test_of_several_globs_the_last_counts(tmp_path) -> None:
    model = network(0)
    one, two = (stored(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    begin_from({"*": one, "head.*": two}, model)
    assert origin(model, 0, 1, 2)["encoder.input"] == {1} and origin(model, 0, 1, 2)["head"] == {2}


@pytest.mark.parametrize("form", ["whole", "part"])
def test_what_does_not_fit_is_listed_with_its_source_and_a_cure(tmp_path, form) -> None:
    wrong = {"encoder__body__0__weight": torch.zeros(3, 4), "head__bias": None}
    path = stored(tmp_path / "w.safetensors", 1, **wrong, extra=torch.zeros(1))
    with pytest.raises(UserError) as failure:
        begin_from(path if form == "whole" else {"encoder.*": path, "head.*": path}, network(0))
    said = str(failure.value)
    shape = "encoder.body.0.weight has shape (3, 4), (12, 8) expected"
    assert path in said and shape in said
    if form == "whole":
        assert "head.bias is missing" in said and "extra is unknown" in said
        assert "Take the parts that fit" in said
    else:  # the part that is refused, and nothing else
        assert 'init_from {"encoder.*": ' in said and "head.bias" not in said and "extra" not in said
        assert "Narrow the glob" in said


@pytest.mark.parametrize("form", ["whole", "part"])
def test_of_many_that_do_not_fit_ten_are_listed(tmp_path, form) -> None:
    save_file({}, tmp_path / "w.safetensors")
    path, count = str(tmp_path / "w.safetensors"), len(state(0))
    with pytest.raises(UserError, match=rf"; and {count - 10} more\.") as failure:
        begin_from(path if form == "whole" else {"*": path}, network(0))
    assert str(failure.value).count("is missing") == 10 < count


def test_nothing_changes_where_something_does_not_fit(tmp_path) -> None:
    model = network(0)
    good = stored(tmp_path / "good.safetensors", 1)
    with pytest.raises(MissingFile, match="nowhere"):
        begin_from({"encoder.*": good, "head.*": str(tmp_path / "nowhere")}, model)
    assert set().union(*origin(model, 0).values()) == {0}


@pytest.mark.parametrize("form", ["whole", "part"])
@pytest.mark.parametrize("content", ["cut", "text", "empty"])
def test_a_damaged_file_is_said(tmp_path, form, content) -> None:
    path = Path(stored(tmp_path / "w.safetensors", 1))
    path.write_bytes({"cut": path.read_bytes()[:-100], "text": b"x" * 500, "empty": b""}[content])
    with pytest.raises(UserError, match=r"w\.safetensors is not a \.safetensors file, or damaged"):
        begin_from(str(path) if form == "whole" else {"*": str(path)}, network(0))


def test_a_glob_that_matches_nothing_is_said(tmp_path) -> None:
    path = stored(tmp_path / "w.safetensors", 1)
    with pytest.raises(UserError, match=r'"decoder\.\*" matches no weight of the network; the first are '):
        begin_from({"head.*": path, "decoder.*": path}, network(0))


# Run folders


@pytest.fixture(scope="module")
def trained(run_ranks, tmp_path_factory):
    """A run whose best checkpoint is not its newest."""
    config = toy_run(tmp_path_factory.mktemp("trained"), "run", uphill=True)
    run_ranks(1, runs.run, config)
    return config


def best(config) -> Path:
    checkpoints = RunDir(Path(config.run_dir)).checkpoints
    return checkpoints / json.loads((checkpoints / "best.json").read_text())["loss"]["tag"]


def test_of_a_run_folder_the_best_weights_are_taken(trained) -> None:
    expected = load_run(trained.run_dir).model.state_dict()
    for form in (trained.run_dir, {"*": trained.run_dir}):
        model = network(0)
        begin_from(form, model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(expected["head.weight"], runs.weights(trained)["head.weight"])


def test_a_runs_weights_are_read_though_its_run_file_cannot_be_any_more(trained, tmp_path) -> None:
    """Its recipe has gone, its engine has other settings, or is one this installation does not have."""
    run_yaml = RunDir(Path(trained.run_dir)).run_yaml
    before = run_yaml.read_text()
    try:
        run_yaml.write_text("engine: {class_path: Another}\n")
        model = network(0)
        begin_from({"head.*": trained.run_dir}, model)
    finally:
        run_yaml.write_text(before)
    given = load_file(best(trained) / "weights.safetensors")
    assert torch.equal(model.head.weight, given["head.weight"])


@pytest.mark.parametrize("form", ["whole", "part"])
def test_a_damaged_or_empty_run_folder_is_said(trained, tmp_path, form) -> None:
    folder = tmp_path / "copy"
    run_dir = RunDir(folder)
    run_dir.create()
    init_from = str(folder) if form == "whole" else {"head.*": str(folder)}
    with pytest.raises(MissingFile, match="copy is not a run folder"):
        begin_from(init_from, network(0))
    run_dir.run_yaml.write_text(trained.to_yaml())
    with pytest.raises(MissingFile, match="holds no whole checkpoint"):
        begin_from(init_from, network(0))
    source, copy = RunDir(Path(trained.run_dir)).checkpoints, run_dir.checkpoints
    for path in source.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(source)).write_bytes(path.read_bytes())
    weights = copy / best(trained).name / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="best checkpoint .* is damaged: weights.safetensors has changed"):
        begin_from(init_from, network(0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_begins_with_parts_of_others_and_goes_on_with_its_own(run_ranks, trained, tmp_path, ranks) -> None:
    """Only the head is trained, so that everything else shows where the run came from."""
    sources = {"encoder.body.*": trained.run_dir, "encoder.input.*": stored(tmp_path / "w.safetensors", 5)}
    head = [Phase("loss", 2, trains=("head.*",))]
    expected, run = (
        replace(toy_run(tmp_path, name, stage=1, split=(ranks, 1)), init_from=sources, phases=head)
        for name in ("whole", "run")
    )
    run_ranks(ranks, runs.run, expected)
    found, body = runs.weights(expected), load_file(best(trained) / "weights.safetensors")
    assert torch.equal(found["encoder.body.0.weight"], body["encoder.body.0.weight"])
    assert torch.equal(found["encoder.input.weight"], state(5)["encoder.input.weight"])
    run_ranks(ranks, runs.run, run, 1)
    Path(sources["encoder.input.*"]).unlink()  # it is needed at the beginning only
    run_ranks(ranks, runs.run, run)
    runs.assert_same(run, expected)
