"""gdyn submit: scripts as they were approved, the machines' rules, nothing a user writes becomes a command, and the
folder a job leaves behind.

The approved scripts are in tests/golden; `python -m tests.test_submit` writes them anew, and git shows what changed.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdyn import jobs, planning, run_files, sites, submission
from gdyn.config import RunConfig, parse
from gdyn.errors import UserError
from gdyn.jobs import Job, Request
from gdyn.rundir import RunDir
from launch import submit
from tests.test_planning import MEASURED

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
RUN = {
    "engine": {"class_path": "Vamp", "init_args": {"train": ["data/train"], "validation": ["data/val"], "tau": 10}},
    "loss_schedule": ["vamp2"],
    "epochs": 15,
    "deepspeed": "fp32_zero1",
    "optimization": {"batch_size": 32, "learning_rate": 0.01},
}
PAID = {"time": "2:00:00", "account": "ABC123", "env": "none"}


def write_run(folder: Path, name: str = "run.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**RUN, "run_dir": str(folder / "run"), **changes}, allow_unicode=True))
    return path


def request(site: str, run_file: Path, **changes: Any) -> Request:
    return Request(site=sites.read(site), run_file=run_file, **changes)


def prepare(site: str, folder: Path, launch: Path = ROOT / "launch", **changes: Any) -> Job:
    return jobs.prepare(request(site, write_run(folder), **changes), launch)


# Approved scripts


def golden_jobs(folder: Path) -> dict[str, Job]:
    """File name -> a job, as it is on any machine and in any folder."""
    run_file = write_run(folder, run_dir="/lustre/project/run")
    (folder / "venv" / "bin").mkdir(parents=True)
    for name in ("venv/bin/activate", "env.tar.gz", "data.tar"):
        (folder / name).touch()
    hosts = folder / "hosts"
    hosts.write_text("node1\nnode2\nnode3\n")
    staged = {"stage_env": str(folder / "env.tar.gz"), "stage_data": str(folder / "data.tar")}
    wanted: dict[str, dict[str, Any]] = {
        "frontier.sbatch": PAID | {"nodes": 64, "env": "conda:gdyn"},
        "frontier-staged.sbatch": PAID | {"nodes": 184, "time": "12:00:00", "spares": 2, "options": staged},
        "frontier-debug.sbatch": PAID | {"queue": "debug", "time": "0:30:00", "requeue": True},
        "perlmutter.sbatch": PAID | {"nodes": 32, "queue": "regular", "options": {"gpu_memory": "80"}},
        "perlmutter-shifter.sbatch": PAID | {"queue": "regular", "env": "shifter:nersc/pytorch:25.06.01"},
        "aurora.pbs": PAID | {"nodes": 256},
        "aurora-seeds.pbs": PAID | {"nodes": 2, "queue": "capacity", "array": "seeds=5", "spares": 1},
        "slurm.sbatch": {"time": "30", "env": "none", "nodes": 2, "ranks_per_node": 2},
        "slurm-gpu.sbatch": PAID
        | {"nodes": 4, "ranks_per_node": 4, "queue": "gpu", "requeue": True, "spares": 1, "env": f"venv:{folder}/venv"}
        | {"options": {"gpus_per_node": "4", "cores_per_rank": "16", "mpi": "pmix", "modules": "cuda/12.9 openmpi"}},
        "mpirun.sh": {"env": "none", "nodes": 2, "ranks_per_node": 4, "spares": 1, "options": {"hostfile": str(hosts)}},
        "mpirun-mpich.sh": {"env": "none", "ranks_per_node": 4, "options": {"mpi_flavour": "mpich", "bind": "none"}},
        "mpirun-intel.sh": {"env": "none", "ranks_per_node": 4, "time": "60", "options": {"mpi_flavour": "intel"}},
        "workstation.sh": {"env": f"venv:{folder}/venv", "ranks_per_node": 2},
        "workstation-seeds.sh": {"env": "none", "ranks_per_node": 2, "array": "seeds=3"},
    }
    return {
        name: jobs.prepare(
            request(re.split(r"[-.]", name)[0], run_file, directory=Path("/lustre/project"), **changes),
            Path("/opt/gdyn/launch"),
        )
        for name, changes in wanted.items()
    }


def golden_scripts(folder: Path) -> dict[str, str]:
    return {name: job.script.replace(str(folder), "/home/user") for name, job in golden_jobs(folder).items()}


NAMES = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.is_dir() else []


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return golden_scripts(tmp_path_factory.mktemp("golden"))


def test_every_site_has_an_approved_script(scripts: dict[str, str]) -> None:
    assert sorted(scripts) == NAMES
    assert {re.split(r"[-.]", name)[0] for name in scripts} == set(sites.sites())


@pytest.mark.parametrize("name", NAMES)
def test_script_is_the_approved_one(name: str, scripts: dict[str, str]) -> None:
    assert scripts[name] == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_script_is_clean_bash(name: str) -> None:
    subprocess.run(["bash", "-n", GOLDEN / name], check=True)
    if shutil.which("shellcheck") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("shellcheck is not installed")
    found = subprocess.run(["shellcheck", "--shell=bash", GOLDEN / name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", NAMES)
def test_script_ends_in_the_supervisor_and_leaves_no_mark_of_the_template(name: str) -> None:
    text = (GOLDEN / name).read_text()
    assert "@@" not in text and "#?" not in text and "#:" not in text
    last = text[text.index("\nexec ") :].replace("\\\n", " ").strip()
    assert last.startswith("exec python3 /opt/gdyn/launch/supervise.py --run_dir ") and "\n" not in last
    assert " -- " in last and "{ranks}" in last and last.endswith('/opt/gdyn/launch/train.py --config "$run_file"')


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".sbatch")])
def test_slurm_script_warns_the_batch_shell_and_appends(name: str) -> None:
    lines = (GOLDEN / name).read_text().splitlines()
    assert "#SBATCH --signal=B:USR2@300" in lines and "#SBATCH --open-mode=append" in lines
    body = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    # Slurm reads directives up to the first command only.
    assert not any(line.startswith("#SBATCH") for line in lines[body:])


# Rules


@pytest.mark.parametrize(
    ("site", "nodes", "queue", "longest"),
    [
        ("frontier", 1, None, "2:00:00"),
        ("frontier", 64, None, "2:00:00"),
        ("frontier", 1024, None, "12:00:00"),
        ("frontier", 9000, None, "12:00:00"),
        ("perlmutter", 1, "regular", "48:00:00"),
        ("perlmutter", 32, "regular", "48:00:00"),
        ("perlmutter", 1000, "regular", "48:00:00"),
    ],
)
def test_dry_run_respects_the_limits_of_size(
    site: str, nodes: int, queue: str | None, longest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path)
    words = ["--site", site, "--nodes", str(nodes), "--account", "ABC123", "--env", "none", "--dry_run", str(run_file)]
    words += ["--queue", queue] if queue else []
    assert submit.main([*words, "--time", longest]) == 0
    shown = capsys.readouterr()
    assert f"#SBATCH -t {longest}\n" in shown.out and f"#SBATCH -N {nodes}\n" in shown.out
    assert f"= {nodes * (8 if site == 'frontier' else 4)}\n" in shown.err
    assert submit.main([*words, "--time", sites.clock(sites.seconds(longest) + 60)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"may run for {longest} at most" in shown.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("site", "changes", "message"),
    [
        ("frontier", {"account": None}, "which project pays"),
        ("frontier", {"time": None}, "how long may the job run"),
        ("frontier", {"nodes": 91, "spares": 1, "time": "6:00:01"}, "92 nodes may run for 6:00:00"),
        ("frontier", {"nodes": 9472, "spares": 1}, "ends at 9472 nodes, asked for 9473"),
        ("frontier", {"queue": "debug", "chain": 2}, "one job of a user at a time"),
        ("frontier", {"queue": "debug", "array": "seeds=2"}, "one job of a user at a time"),
        ("frontier", {"queue": "bath"}, "no queue"),
        ("frontier", {"ranks_per_node": 4}, "has 8, one per device"),
        ("frontier", {"nodes": 0}, "--nodes is 0"),
        ("frontier", {"spares": -1}, "--spares is -1"),
        ("frontier", {"chain": 2, "requeue": True}, "exclude each other"),
        ("frontier", {"chain": 2, "array": "seeds=2"}, "exclude each other"),
        ("frontier", {"signal_seconds": 60, "checkpoint_seconds": 31.0}, "expected twice that, 62"),
        ("frontier", {"time": "9:59"}, "too little to train"),
        ("frontier", {"time": "tomorrow"}, "no wall time"),
        ("frontier", {"options": {"gpu_memory": "40"}}, "no option --gpu_memory; its own: stage_env, stage_data"),
        ("perlmutter", {}, "give --queue"),
        ("perlmutter", {"queue": "regular", "nodes": 300, "options": {"gpu_memory": "80"}}, "256 such nodes"),
        ("aurora", {"requeue": True, "nodes": 256}, "qrerun needs privileges"),
        ("aurora", {"queue": "small", "nodes": 256}, "prod routes to it"),
        ("slurm", {}, "give --ranks_per_node"),
        ("workstation", {"account": None, "ranks_per_node": 2, "requeue": True}, "nothing queues"),
        ("workstation", {"account": None, "ranks_per_node": 2, "chain": 2}, "no scheduler to start a successor"),
        ("workstation", {"account": None, "ranks_per_node": 2, "spares": 1}, "it is one machine"),
        ("workstation", {"ranks_per_node": 2}, "no place for --account"),
        ("mpirun", {"account": None, "ranks_per_node": 2, "nodes": 2}, "give --hostfile"),
        ("mpirun", {"account": None, "ranks_per_node": 2, "env": "apptainer:x.sif"}, "--env is 'apptainer:x.sif'"),
    ],
)
def test_request_that_the_machine_would_refuse_is_refused(
    site: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(site, tmp_path, **PAID | changes)


def test_requeue_and_chain_are_alternatives_that_each_work(tmp_path: Path) -> None:
    assert "#SBATCH --requeue" in prepare("frontier", tmp_path, **PAID, requeue=True).script
    chain = prepare("frontier", tmp_path, **PAID, chain=3)
    assert "#SBATCH --requeue" not in chain.script and chain.node_hours == 6


def test_a_host_file_must_have_the_hosts_asked_for(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb\n")
    options = {"hostfile": str(tmp_path / "hosts")}
    prepare("mpirun", tmp_path, env="none", ranks_per_node=1, nodes=1, spares=1, options=options)
    with pytest.raises(UserError, match="has 2 hosts, asked for 3"):
        prepare("mpirun", tmp_path, env="none", ranks_per_node=1, nodes=2, spares=1, options=options)


def test_arithmetic_counts_spares_and_jobs(tmp_path: Path) -> None:
    job = prepare("frontier", tmp_path, **PAID, nodes=64, spares=2, chain=3)
    rows = jobs.arithmetic(job, 0.5, "as given")
    assert rows["ranks"] == "64 x 8 = 512"
    assert rows["global batch"].startswith("32 x 1 x 512 = 16384 ")
    assert rows["node-hours"] == "66 x 2 h x 3 jobs = 396 at most"
    assert rows["steps"].startswith(f"about {(7200 - 300) * 2} per job")


# What a user writes stays data

NASTY = 'it\'s "q" $(touch pwned) `touch pwned` ;touch pwned; & | > pwned #SBATCH -x\\ é {a,b} *~'
NASTY_NAMES = ["a b", "$(id)", "a;b", "-x", "--wrap", "a\n#SBATCH -p x", "é", "a'b", 'a"b', "a`b", "a/b", "", "a" * 65]


@pytest.mark.parametrize("value", NASTY_NAMES)
@pytest.mark.parametrize("key", ["account", "queue", "name"])
def test_names_are_letters_digits_dots_and_dashes(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--{key} is "):
        prepare("slurm", tmp_path, **PAID | {"ranks_per_node": 1, key: value})


@pytest.mark.parametrize("value", ["a b", "$(id)", "-x\n#SBATCH -p x", "gpu'", "a;b", "a#b"])
@pytest.mark.parametrize("key", ["qos", "constraint", "memory"])
def test_options_of_a_site_cannot_add_a_directive(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot stand in a job script's directive"):
        prepare("slurm", tmp_path, **PAID, ranks_per_node=1, options={key: value})


@pytest.mark.parametrize("name", ["a b", "a'b", "$(id)", "a%j", "é", "a#b", "a\\b", "-a "])
@pytest.mark.parametrize("site", ["slurm", "aurora"])
def test_run_folder_that_a_directive_cannot_name_is_refused(site: str, name: str, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, run_dir=str(tmp_path / name))
    fitting = {"ranks_per_node": 1} if site == "slurm" else {"nodes": 256}
    with pytest.raises(UserError, match="run_dir is .* cannot stand in a job script's directive"):
        jobs.prepare(request(site, run_file, **PAID | fitting), ROOT)


@pytest.mark.parametrize("value", ["a\nb", "a\n#SBATCH -x\nb", "a\x1bb"])
def test_paths_with_control_characters_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / value).mkdir()
    with pytest.raises(UserError, match="control character"):
        prepare("workstation", tmp_path, env="none", ranks_per_node=1, directory=tmp_path / value)


def test_run_folder_cannot_hold_what_the_supervisor_fills_in(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, run_dir=str(tmp_path / "{hosts}"))
    with pytest.raises(UserError, match="which the script fills in"):
        jobs.prepare(request("workstation", run_file, env="none", ranks_per_node=1), ROOT)


def test_what_is_no_image_and_no_environment_is_refused(tmp_path: Path) -> None:
    for env in ("conda:a b", "conda:-n", "conda:$(id)", "venv:/nowhere", "shifter:a b", "shifter:-x", "conda", "x:y"):
        with pytest.raises(UserError, match="--env"):
            prepare("perlmutter", tmp_path, **PAID | {"queue": "regular", "env": env})


RECORD = """import json, os, sys
json.dump({"words": sys.argv[1:], "place": os.getcwd()}, open(os.environ["RECORD"], "w"))
"""


def run_script(job: Job, folder: Path, script: Path, *words: str, **programs: str) -> tuple[int, dict[str, Any]]:
    """Run a job's script among stand-ins for the machine's programs. Returns the exit code and what the supervisor was
    given; empty if it was not started."""
    machine = folder / "machine"
    machine.mkdir(exist_ok=True)
    for name, body in {"module": "", "srun": "", "mpiexec": "", "activate": "", **programs}.items():
        (machine / name).write_text(f"#!/bin/bash\n{body}\n")
        (machine / name).chmod(stat.S_IRWXU)
    record = folder / "record.json"
    record.unlink(missing_ok=True)
    environment = {"PATH": f"{machine}:{os.environ['PATH']}", "RECORD": str(record), "USER": "user"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "PBS_NODEFILE": "/dev/null", "PBS_JOBID": "7"}
    environment |= {"SLURM_ARRAY_TASK_ID": "1", "PBS_ARRAY_INDEX": "1"}
    done = subprocess.run(["bash", script, *words], env=environment, cwd=folder, timeout=60)
    return done.returncode, json.loads(record.read_text()) if record.exists() else {}


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A folder with a name that a careless script would run, with a supervisor in it that records its arguments."""
    folder = tmp_path / NASTY.replace("/", "")
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").touch()
    (folder / "launch").mkdir()
    (folder / "launch" / "supervise.py").write_text(RECORD)
    return folder


def hosts(folder: Path) -> str:
    (folder / "hosts").write_text("a\nb\n")
    return str(folder / "hosts")


@pytest.mark.parametrize("site", ["workstation", "mpirun"])
@pytest.mark.parametrize("array", [None, "seeds=2"])
def test_hostile_paths_reach_the_supervisor_as_they_are(site: str, array: str | None, nasty: Path) -> None:
    options = {"hostfile": hosts(nasty)} if site == "mpirun" else {}
    job = prepare(
        site, nasty, nasty / "launch", env=f"venv:{nasty}/venv", ranks_per_node=2, array=array, directory=nasty,
        options=options,
    )  # fmt: skip
    code, seen = run_script(job, nasty, submission.write(job), *(["1"] if array else []))
    assert code == 0 and seen["place"] == str(nasty)
    member, run_file = ("/seed1235", "members/1") if array else ("", "run")
    words, command = seen["words"][: seen["words"].index("--")], seen["words"][seen["words"].index("--") + 1 :]
    assert words[:2] == ["--run_dir", f"{nasty}/run{member}"]
    assert words[2:6] == ["--nodes", "1", "--ranks_per_node", "2"]
    assert command[-3:] == [f"{nasty}/launch/train.py", "--config", f"{nasty}/run/job/{run_file}.yaml"]
    assert {"{ranks}"} <= set(command)
    assert list(nasty.rglob("pwned*")) == [] and not (nasty.parent / "pwned").exists()


@pytest.mark.parametrize("site", ["frontier", "perlmutter", "aurora", "slurm"])
def test_hostile_paths_in_a_schedulers_script_are_quoted(site: str, nasty: Path, tmp_path: Path) -> None:
    """Where directives name the run folder it must be harmless; everything else may be called anything."""
    plain = Path(tmp_path / "plain")
    plain.mkdir()
    fitting = {"perlmutter": {"queue": "regular"}, "slurm": {"ranks_per_node": 2}, "aurora": {"queue": "capacity"}}
    asked = PAID | fitting.get(site, {}) | {"nodes": 2, "directory": nasty, "env": f"venv:{nasty}/venv"}
    job = prepare(site, plain, nasty / "launch", **asked, array="seeds=2")
    code, seen = run_script(job, tmp_path, submission.write(job))
    assert code == 0 and seen["place"] == str(nasty)
    assert seen["words"][:2] == ["--run_dir", f"{plain}/run/seed1235"]
    assert seen["words"][-2:] == ["--config", f"{plain}/run/job/members/1.yaml"]
    assert seen["words"][-3] == f"{nasty}/launch/train.py"
    assert list(tmp_path.rglob("pwned*")) == []


def test_nothing_starts_after_a_failed_sbcast(nasty: Path, tmp_path: Path) -> None:
    archive = nasty / "env.tar.gz"
    archive.touch()
    plain = Path(tmp_path / "plain")
    plain.mkdir()
    options = {"stage_env": str(archive)}
    job = prepare("frontier", plain, nasty / "launch", **PAID, options=options, directory=tmp_path)
    sbcast = f'printf "%s" "$2" >{shlex.quote(str(tmp_path / "seen"))}; exit 1'
    code, seen = run_script(job, tmp_path, submission.write(job), sbcast=sbcast)
    assert (code, seen) == (1, {})
    assert (tmp_path / "seen").read_text() == str(archive)


# The run file


def test_known_keys_are_those_of_the_trainer() -> None:
    fields = {item.name: item for item in dataclasses.fields(RunConfig)}
    assert set(run_files.KEYS) == set(fields) | {"preflight"}
    assert fields["seed"].default == jobs.SEED


def test_frozen_run_file_means_the_same_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ("engine.tau=7", "optimization.learning_rate=1e-3", "engine.init_args.train=[a, b]", "seed=3")
    job = prepare("slurm", tmp_path, **PAID, ranks_per_node=1, changes=changes)
    submission.write(job)
    frozen = parse(["--config", str(job.run_dir.job / "run.yaml")]).config
    asked = parse(["--config", str(tmp_path / "run.yaml"), "--engine.tau", "7", "--seed", "3"]).config
    optimization = dataclasses.replace(asked.optimization, learning_rate=1e-3)
    engine = dataclasses.replace(asked.engine, train=[str(tmp_path / "a"), str(tmp_path / "b")])
    copy = str(job.run_dir.job / "deepspeed.json")
    assert frozen == dataclasses.replace(asked, optimization=optimization, engine=engine, deepspeed=copy)
    assert Path(copy).read_text() == Path(asked.deepspeed).read_text()


@pytest.mark.parametrize("given", ["other", '{"lobe_0.*": one, "lobe_t.*": two/w.safetensors}'])
def test_weights_to_begin_from_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = prepare("slurm", tmp_path, **PAID, ranks_per_node=1, changes=(f"init_from={given}",))
    frozen = yaml.safe_load(job.files["run.yaml"])["init_from"]
    assert frozen == parse(["--config", str(tmp_path / "run.yaml"), "--init_from", given]).config.init_from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sead=3", 'unknown key "sead"'),
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("engine..tau=3", "expected key=value"),
        ("engine.train.0=x", "is a list"),
        ("phases.0.epochs=x", "is a list"),
        ("seed.x=1", "is one value"),
        ("seed=[", "not a YAML value"),
    ],
)
def test_change_that_cannot_be_meant_is_refused(change: str, message: str, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, phases=[{"objective": "vamp2", "epochs": 1}], seed=1)
    with pytest.raises(UserError, match=message):
        run_files.read(run_file, [change])


@pytest.mark.parametrize("text", ["[1]", "a: [", "", "\t", "sead: 3"])
def test_what_is_no_run_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        run_files.read(tmp_path / "run.yaml")


def test_members_differ_in_seed_and_folder_only(tmp_path: Path) -> None:
    job = prepare("slurm", tmp_path, **PAID, ranks_per_node=1, array="seeds=3", changes=("seed=10",))
    members = [yaml.safe_load(job.files[f"members/{i}.yaml"]) for i in range(3)]
    assert [member.pop("seed") for member in members] == [10, 11, 12]
    assert [member.pop("run_dir") for member in members] == [f"{tmp_path}/run/seed{seed}" for seed in (10, 11, 12)]
    assert [member.pop("deepspeed") for member in members] == [f"{tmp_path}/run/job/members/{i}.json" for i in range(3)]
    assert members[0] == members[1] == members[2]
    assert "#SBATCH --array=0-2" in job.script and f"--ensemble {tmp_path}/run/job/members" in job.script


def test_members_may_be_run_files(tmp_path: Path) -> None:
    files = [write_run(tmp_path, name, epochs=epochs) for name, epochs in (("small.yaml", 1), ("large.yaml", 9))]
    job = prepare("slurm", tmp_path, **PAID, ranks_per_node=1, array=f"runs={files[0]},{files[1]}")
    assert job.members == ("small", "large")
    assert [yaml.safe_load(job.files[f"members/{i}.yaml"])["epochs"] for i in range(2)] == [1, 9]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("seeds=1", "two members or more"),
        ("seeds=x", "expected seeds=5"),
        ("seeds=-3", "expected seeds=5"),
        ("runs=", "expected seeds=5"),
        ("epochs=3", "expected seeds=5"),
        ("runs=a.yaml,b.yaml", "does not exist"),
        ("runs=run.yaml,./run.yaml", "two run files are named run"),
    ],
)
def test_array_that_is_no_ensemble_is_refused(
    array: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare("slurm", tmp_path, **PAID, ranks_per_node=1, array=array)


def test_run_file_of_the_original_gdynet_is_translated(tmp_path: Path) -> None:
    old = {
        "model_type": "gdynet_vanilla",
        "model": {"tau": 3, "batch_size": 16, "learning_rate": 0.001},
        "data": {"train_fnames": ["a"], "val_fnames": ["b"], "test_fnames": ["b"]},
        "training": {"epochs": 2, "loss_schedule": ["vamp1", "vamp2"], "seed": 5},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    job = jobs.prepare(request("slurm", tmp_path / "old.yaml", **PAID, ranks_per_node=1), ROOT)
    assert yaml.safe_load(job.files["run.yaml"])["engine"]["class_path"] == "Vamp"
    assert (job.micro_batch, job.run_dir.path) == (16, tmp_path / "run")


# Handing in


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Stand-ins for Slurm: cluster(sbatch="exit 1") changes one. Returns the log of calls."""
    machine, log = tmp_path / "bin", tmp_path / "calls"
    machine.mkdir()
    log.touch()
    monkeypatch.setenv("PATH", f"{machine}:{os.environ['PATH']}")

    def make(**bodies: str) -> Path:
        count = f"echo $((100 + $(grep -c ^sbatch {log})))"
        for name, body in {"sbatch": count, "squeue": "", "scancel": "", **bodies}.items():
            (machine / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{log}\n{body}\n')
            (machine / name).chmod(stat.S_IRWXU)
        return log

    return make


def words(run_file: Path, *more: str) -> list[str]:
    return [*("--site", "slurm", "--time", "1:00:00", "--ranks_per_node", "2", "--env", "none"), *more, str(run_file)]


def test_chain_is_submitted_and_noted(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = cluster()
    assert submit.main(words(write_run(tmp_path), "--chain", "3", "--preflight", "off")) == 0
    job = RunDir(tmp_path / "run").job
    noted = json.loads((job / "submission.json").read_text())
    assert noted["jobs"] == ["101", "102", "103"]
    assert noted["request"]["chain"] == 3 and noted["scheduler"] == "slurm" and noted["git_commit"]
    assert [line.split()[2] for line in calls.read_text().splitlines()] == [
        str(job / "job.sbatch"), "--dependency=afterany:101", "--dependency=afterany:102",
    ]  # fmt: skip
    assert {path.name for path in job.iterdir()} == {"job.sbatch", "run.yaml", "deepspeed.json", "submission.json"}
    assert yaml.safe_load((job / "run.yaml").read_text())["preflight"] == "off"
    assert "101, 102, 103" in capsys.readouterr().out


def test_a_refused_job_leaves_no_ids_and_takes_its_predecessors_along(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = cluster(sbatch='[[ $* != *afterany* ]] && echo 101 || { echo "error: QOSMaxSubmit" >&2; exit 1; }')
    assert submit.main(words(write_run(tmp_path), "--chain", "2")) == 2
    assert "QOSMaxSubmit" in capsys.readouterr().err
    assert "jobs" not in json.loads((tmp_path / "run/job/submission.json").read_text())
    assert "scancel 101" in calls.read_text().splitlines()


def test_second_submission_waits_for_the_first_and_keeps_its_folder(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(squeue="echo 101 101")
    run_file = write_run(tmp_path)
    assert submit.main(words(run_file)) == 0
    (tmp_path / "run/job/full-101.out").write_text("a log")
    assert submit.main(words(run_file)) == 2
    assert "101 of" in capsys.readouterr().err
    cluster()
    assert submit.main(words(run_file)) == 0
    assert (tmp_path / "run/job.1/full-101.out").read_text() == "a log"
    assert json.loads((tmp_path / "run/job/submission.json").read_text())["jobs"] == ["102"]


def test_a_submission_that_failed_leaves_nothing_behind(cluster, tmp_path: Path) -> None:
    cluster(sbatch="exit 1")
    run_file = write_run(tmp_path)
    assert submit.main(words(run_file)) == submit.main(words(run_file)) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["job"]


def test_what_cannot_be_written_is_not_submitted(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = cluster()
    (tmp_path / "run").write_text("a file, no folder")
    assert submit.main(words(write_run(tmp_path))) == 2
    assert "nothing was submitted" in capsys.readouterr().err
    assert "sbatch" not in calls.read_text()


def test_without_a_scheduler_the_job_runs_here_and_its_code_is_ours(tmp_path: Path) -> None:
    """One process all the way: the job that submission.json names is the supervisor itself."""
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "supervise.py").write_text("import os, sys\nprint('pid', os.getpid())\nsys.exit(75)\n")
    shutil.copy(ROOT / "launch" / "submit.py", launch)
    command = [sys.executable, launch / "submit.py", "--site", "workstation", "--ranks_per_node", "1", "--env", "none"]
    done = subprocess.run(
        [*command, write_run(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 75, done.stderr
    noted = json.loads((tmp_path / "run/job/submission.json").read_text())
    assert f"pid {noted['jobs'][0]}" in done.stdout.splitlines()


def test_without_a_scheduler_members_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "supervise.py").write_text(
        f"import sys\nprint(sys.argv[2], file=open({str(tmp_path / 'order')!r}, 'a'))\n"
        "sys.exit('seed12' in sys.argv[2])\n"
    )
    job = prepare(
        "workstation", tmp_path, tmp_path, env="none", ranks_per_node=1, array="seeds=3", changes=("seed=10",)
    )
    assert submit.run_here(job, submission.write(job)) == 1
    assert [Path(line).name for line in (tmp_path / "order").read_text().split()] == ["seed10", "seed11", "seed12"]


def test_submit_needs_no_torch_and_help_tells_the_sites_own_options() -> None:
    code = (
        "import sys\nfrom launch import submit\n"
        "try: submit.main(['--site', 'frontier', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--stage_env" in done.stdout and "--gpu_memory" not in done.stdout


def test_an_unknown_login_node_needs_a_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "laptop")
    monkeypatch.setattr("platform.node", lambda: "laptop")
    assert submit.main(["--time", "1:00:00", str(write_run(tmp_path))]) == 2
    assert "no site has login nodes like laptop" in capsys.readouterr().err
    monkeypatch.setattr("socket.getfqdn", lambda: "login03.frontier.olcf.ornl.gov")
    assert submit.main([*("--time", "2:00:00", "--account", "A", "--dry_run"), str(write_run(tmp_path))]) == 0
    assert "Frontier" in capsys.readouterr().err


@pytest.mark.parametrize("preflight", [False, True])
def test_plan_counts_on_the_network_that_was_measured_or_else_the_sites(
    preflight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning.Measurement, "read", lambda folder: dataclasses.replace(MEASURED, run_dir=folder))
    if preflight:
        (tmp_path / "run").mkdir()
        link = {"nodes": ["a", "b"], "gb_s": 3.0, "rank_pairs": 8, "latency_s": 4e-6}
        (tmp_path / "run/preflight.json").write_text(json.dumps({"links": [link]}))
    # Neither account nor wall time: nothing is submitted.
    assert submit.main(["--site", "frontier", "--nodes", "64", "--plan", str(write_run(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert ("24 GB/s per node and 4 us" if preflight else "100 GB/s per node and 2 us, nominal") in shown
    rows = re.findall(r"^ *(\d+) +(\d+) ", shown, re.MULTILINE)
    assert rows == [(str(nodes), str(8 * nodes)) for nodes in (1, 2, 4, 8, 16, 32, 64)]
    assert not (tmp_path / "run/job").exists()


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.iterdir():
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in golden_scripts(Path(scratch)).items():
            (GOLDEN / name).write_text(text)
