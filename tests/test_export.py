"""What leaves a run predicts the same, without the package that trained it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gdyn import ranks
from gdyn.config import Command
from gdyn.engines.vamp.frames import Trajectory
from gdyn.errors import UserError
from gdyn.inference import load_run
from gdyn.rundir import RunDir, read_json
from gdyn.signals import StopRequest
from launch import export, train
from tests.harness import run_ranks
from tests.runs import run, small_run
from tests.toy import toy_run

ALONE = """
import sys, numpy as np, torch
frames = {name: torch.from_numpy(np.load(f"{sys.argv[2]}/{name}.npy")) for name in sys.argv[4:]}
inputs = [t.long() if name in ("atom_types", "target_index") else t for name, t in frames.items()]
states = torch.export.load(f"{sys.argv[1]}/predictor.pt2").module()(*inputs)
assert not any(name.split(".")[0] in ("gdyn", "deepspeed") for name in sys.modules)
np.save(sys.argv[3], states.detach().numpy())
"""


@pytest.fixture(scope="module", params=["vanilla", "ferro"])
def exported(request, tmp_path_factory):
    """The folder of an exported small run, and the run."""
    config = small_run(tmp_path_factory.mktemp("runs"), "exported", model_type=request.param)
    run_ranks(1, run, config)
    assert export.main([config.run_dir]) == 0
    return load_run(config.run_dir)


def test_the_predictor_gives_the_networks_states_without_this_package(exported, tmp_path):
    directory = exported.engine.test[0] if exported.engine.test else exported.engine.validation[0]
    trajectory = Trajectory(directory, exported.engine.ferro)
    inputs = list(read_json(exported.dir.export / "predictor.json")["inputs"])
    command = [sys.executable, "-c", ALONE, exported.dir.export, directory, tmp_path / "states.npy", *inputs]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "states.npy"), exported.engine.predict(exported, trajectory), atol=1e-6
    )


def test_a_run_that_cannot_be_exported_is_refused_before_it_trains(tmp_path):
    config = toy_run(tmp_path, "run", export=True)
    with pytest.raises(UserError, match="export: Toy has no stand-alone predictor"):
        train.prepare(Command(config, "train", []), RunDir(tmp_path / "run"), ranks.ALONE, StopRequest())
    assert not (tmp_path / "run").exists()


def test_the_weights_are_those_of_the_best_checkpoint(exported):
    weights = load_file(exported.dir.export / "weights.safetensors")
    for name, tensor in exported.model.state_dict().items():
        assert torch.equal(weights[name], tensor)
