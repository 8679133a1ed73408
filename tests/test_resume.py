"""Interrupted equals uninterrupted: bit for bit on the same ranks, within 1e-5 on others; killed, stopped or "
"extended."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from gdyn.config import Logging
from gdyn.errors import UserError
from gdyn.inference import load_run
from gdyn.phases import Phase
from gdyn.rundir import RunDir
from tests import runs
from tests.harness import REPOSITORY, RanksFailed, clean_environment
from tests.runs import as_new, step

ON_RANKS = {1: (1, 1), 2: (2, 1), 4: (4, 1)}
READOUT = Phase("vamp_sym", 1, name="readout", trains=("lobe_?.readout*",))
LINES = Logging(every_steps=3, progress="off")  # three steps to a line, four to an epoch: lines straddle what happens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted(run_ranks, folder):
    """uninterrupted(stage, ranks, **changes): the run file of a run that nothing happened to."""
    done = {}

    def get(stage=0, ranks=1, **changes):
        key = str((stage, ranks, changes))
        if key not in done:
            done[key] = runs.small_run(folder, f"whole{len(done)}", stage=stage, split=ON_RANKS[ranks], **changes)
            run_ranks(ranks, runs.run, done[key])
        return done[key]

    return get


def determined(weights):
    """Without the biases that cancel in a softmax: their gradient is rounding noise, which Adam makes full steps of."""
    return [weight for name, weight in weights.items() if not name.endswith("score.bias")]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 1), (1, 2), *(slow(*case) for case in ((0, 2), (1, 1), (2, 1), (2, 2), (3, 1), (3, 2)))]
)
def test_stopped_within_epochs_and_phases_continues_bit_for_bit(run_ranks, uninterrupted, tmp_path, stage, ranks):
    expected = uninterrupted(stage, ranks, logging=LINES)
    config = as_new(expected, tmp_path)
    # Counted from each start: in the middle of the first epoch, and in the validation after the phase's last window.
    for stop_after, reached in ((2, 2), (6, 8)):
        run_ranks(ranks, runs.run, config, stop_after)
        assert step(config) == reached
    run_ranks(ranks, runs.run, config)
    runs.assert_same(config, expected)


@pytest.mark.parametrize(
    ("stage", "splits"),
    [(1, [(2, 1), (1, 2)]), *(slow(stage, [(2, 1), (1, 2), (2, 2), (4, 1)]) for stage in (0, 1, 2, 3))],
)
def test_other_numbers_of_ranks_continue_within_1e_5(run_ranks, uninterrupted, tmp_path, stage, splits):
    expected, config = uninterrupted(), as_new(runs.small_run(tmp_path, "", stage=stage), tmp_path)
    for split, stop_after, reached in zip(splits, (5, 3, 2, None), (5, 8, 10, 16), strict=False):
        last = split == splits[-1]
        sizes = runs.small_run(tmp_path, "", split=split).optimization
        run_ranks(split[0], runs.run, dataclasses.replace(config, optimization=sizes), None if last else stop_after)
        assert step(config) == (16 if last else reached)
    one, other = (torch.cat([w.flatten() for w in determined(runs.weights(c))]) for c in (config, expected))
    assert float((one - other).norm() / other.norm()) <= 1e-5
    found, reference = runs.metrics(config), runs.metrics(expected)
    assert [r["step"] for r in found] == [r["step"] for r in reference]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in reference], rel=1e-5)


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
def test_a_phase_that_trains_other_parameters_resumes_at_its_boundaries(run_ranks, uninterrupted, tmp_path, stage):
    expected = uninterrupted(stage, phases=[Phase("vamp2", 1), READOUT, Phase("vamp1", 1)])
    config = as_new(expected, tmp_path)
    for reached in (4, 8):
        run_ranks(1, runs.run, config, 4, True)
        assert step(config) == reached
    run_ranks(1, runs.run, config)
    runs.assert_same(config, expected)


def test_appended_phases_continue_as_if_they_had_always_been_planned(run_ranks, uninterrupted, tmp_path):
    expected = uninterrupted()
    short = as_new(expected, tmp_path, phases=expected.phases[:1])
    run_ranks(1, runs.run, short)
    config = as_new(expected, tmp_path)
    run_ranks(1, runs.run, config)
    runs.assert_same(config, expected)


def test_a_changed_past_is_refused_unless_asked_for(run_ranks, uninterrupted, tmp_path):
    original = as_new(uninterrupted(), tmp_path)
    run_ranks(1, runs.run, original, 2)
    changed = as_new(original, tmp_path, phases=[Phase("vamp1", 2), *original.phases[1:]])
    with pytest.raises(RanksFailed, match="loss schedule mismatch") as failure:
        run_ranks(1, runs.run, changed)
    assert isinstance(failure.value.errors[0], UserError)
    run_ranks(1, runs.run, dataclasses.replace(changed, allow_schedule_change=True))
    assert {record["phase"] for record in runs.metrics(changed) if record["step"] > 2} == {"vamp1", "vamp_sym"}


def test_another_seed_is_refused_within_an_epoch(run_ranks, uninterrupted, tmp_path):
    config = as_new(uninterrupted(), tmp_path)
    run_ranks(1, runs.run, config, 2)
    with pytest.raises(RanksFailed, match="Restore the seed"):
        run_ranks(1, runs.run, dataclasses.replace(config, seed=config.seed + 1))


def test_resuming_a_finished_run_changes_nothing(run_ranks, uninterrupted, folder):
    config = uninterrupted()
    before = runs.metrics(config), runs.summary(config), runs.weights(config)
    run_ranks(1, runs.run, config)
    assert (runs.metrics(config), runs.summary(config)) == before[:2]
    assert all(torch.equal(weight, before[2][name]) for name, weight in runs.weights(config).items())


def test_init_from_starts_with_another_runs_best_weights(run_ranks, uninterrupted, tmp_path):
    """Only the readout is trained, so that everything else shows where the run came from."""
    source = uninterrupted()
    config = as_new(source, tmp_path, init_from=source.run_dir, phases=[READOUT])
    run_ranks(1, runs.run, config)
    trained, given = runs.weights(config), load_run(source.run_dir).model.state_dict()
    moved = {name for name in given if not torch.equal(trained[name], given[name])}
    assert moved == {f"{lobe}.readout.{part}" for lobe in ("lobe_0", "lobe_t") for part in ("weight", "bias")}


# Real processes, as a user starts them


def start(config, ranks=1, *options):
    """launch/train.py, under torchrun for more than one rank. psutil, because torchrun's ranks have sessions of "
    "their own."""
    run_file = Path(config.run_dir).with_suffix(".yaml")
    run_file.write_text(config.to_yaml())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "launch/train.py", "--config", run_file, *options]
    return psutil.Popen(
        command, cwd=REPOSITORY, env=clean_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: psutil.Popen) -> tuple[int, str]:
    """(exit code, output)."""
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def kill_9(process: psutil.Popen, when: Callable[[], bool]) -> None:
    """All processes of a job at once, as soon as `when` is true."""
    while not when():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    process.communicate()


def status(config):
    return json.loads(RunDir(Path(config.run_dir)).status_json.read_text())


@pytest.mark.slow
def test_wall_time_and_signals_stop_with_75_and_the_run_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    expected = uninterrupted(logging=LINES)
    config = as_new(expected, tmp_path)
    assert finish(start(config, 1, "--wall_time=0.001"))[0] == 75
    assert status(config)["state"] == "stopped" and "wall time" in status(config)["reason"]
    process = start(config)
    while not any(record["step"] >= 3 for record in runs.metrics(config)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75 and "SIGUSR1 received" in status(config)["reason"], output
    assert 3 <= step(config) < 16
    code, output = finish(start(config))
    assert code == 0 and "resuming from checkpoint" in output, output
    assert status(config)["state"] == "done"
    runs.assert_same(config, expected)


@pytest.mark.slow
def test_killed_while_training_nothing_is_lost_beyond_the_last_checkpoint(uninterrupted, tmp_path):
    expected = uninterrupted()
    config = as_new(expected, tmp_path)
    kill_9(start(config), when=lambda: any(record["step"] >= 6 for record in runs.metrics(config)))
    assert 4 <= step(config) < 16
    code, output = finish(start(config))
    assert code == 0 and "resuming from checkpoint" in output, output
    runs.assert_same(config, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2)])
def test_killed_while_saving_the_half_checkpoint_does_not_count(uninterrupted, tmp_path, stage, ranks):
    expected = uninterrupted(stage, ranks)
    config = as_new(expected, tmp_path)
    checkpoints = RunDir(Path(config.run_dir)).checkpoints

    def saving_the_second() -> bool:
        """The first is whole, another has begun."""
        tags = [path for path in checkpoints.glob("*") if path.is_dir()]
        return len(tags) > 1 and not all((path / "position.json").exists() for path in tags)

    kill_9(start(config, ranks), saving_the_second)
    assert saving_the_second()
    code, output = finish(start(config, ranks))
    assert code == 0 and "resuming from checkpoint" in output, output
    runs.assert_same(config, expected)
