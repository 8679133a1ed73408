"""gdyn lint-job: good scripts give nothing, every known defect is found where it is, and its cure takes it away."""

import ast
import json
from pathlib import Path

import pytest

from gdyn import sites
from gdyn.lint import RULES, lint
from gdyn.lint.findings import Finding
from gdyn.lint.request import read_job
from gdyn.lint.script import read
from gdyn.lint.variables import KNOWN, distance, meant
from launch.lint_job import main

HERE = Path(__file__).parent
SCRIPTS = HERE / "job_scripts"
GOOD = ("frontier.sbatch", "perlmutter.sbatch", "aurora.pbs", "torchrun.sbatch", "openmpi.sh")
TRAP = "trap forward USR2\n"
SRUN = "srun -N"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a log folder exists depends on the current folder."""
    monkeypatch.chdir(tmp_path)


def text(name: str) -> str:
    return (SCRIPTS / name).read_text()


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


def slurm(*rows: str, directives: str = "#SBATCH --time=1:00:00") -> list[Finding]:
    """Findings of a small script for no machine in particular."""
    return lint("\n".join(["#!/bin/bash", directives, *rows]) + "\n")


@pytest.mark.parametrize("name", GOOD)
def test_good_script_gives_nothing(name: str) -> None:
    assert lint(text(name)) == []


@pytest.mark.parametrize("path", sorted((HERE / "golden").glob("*")), ids=lambda path: path.name)
def test_generated_script_gives_nothing(path: Path) -> None:
    assert lint(path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("frontier.sbatch", "frontier"),
        ("perlmutter.sbatch", "perlmutter"),
        ("aurora.pbs", "aurora"),
        ("torchrun.sbatch", None),
    ],
)
def test_machine_is_recognised(name: str, site: str | None) -> None:
    found = read_job(text(name)).site
    assert (found.name if found else None) == site


MUTATIONS = [
    # rule, good script, what stands there, what makes it bad, a word of the line where it is reported
    ("misspelt-variable", "frontier.sbatch", "export FI_CXI_RDZV_PROTO", "export FI_CXI_RDV_PROTO", "RDV_PROTO=alt"),
    ("misspelt-variable", "perlmutter.sbatch", "LOCAL_RANK=$SLURM_LOCALID", "LOCAL_RANK=$SLURM_LOCAL_ID", "bash -c"),
    ("misspelt-variable", "torchrun.sbatch", "NCCL_DEBUG=WARN", "NCCL_DEBGU=WARN", "NCCL_DEBGU"),
    ("valueless-variable", "torchrun.sbatch", "NCCL_DEBUG=WARN", "NCCL_DEBUG=", "NCCL_DEBUG="),
    ("valueless-variable", "torchrun.sbatch", "NCCL_DEBUG=WARN", "NCCL_DEBUG", "NCCL_DEBUG"),
    ("bad-value", "frontier.sbatch", "MONITOR=kdreg2", "MONITOR=memhooks", "memhooks"),
    ("bad-value", "aurora.pbs", "CCL_PROCESS_LAUNCHER=pmix", "CCL_PROCESS_LAUNCHER=pals", "=pals"),
    ("bad-value", "perlmutter.sbatch", "OMP_NUM_THREADS=8", "OMP_NUM_THREADS=all", "=all"),
    ("needs-network-flag", "frontier.sbatch", "#SBATCH --network=disable_rdzv_get\n", "", "RDZV_PROTO=alt"),
    ("needs-network-flag", "frontier.sbatch", "RDZV_PROTO=alt_read", "RDZV_PROTO=default", "--network"),
    ("unset-variable", "frontier.sbatch", "/tmp/miopen-$SLURM_JOB_ID", "/tmp/miopen-$JOBID", "$JOBID"),
    ("unset-variable", "aurora.pbs", "/tmp/triton-$PBS_JOBID", "/tmp/triton-$JOBID", "$JOBID"),
    ("unset-variable", "torchrun.sbatch", "--config run.yaml", "--config $CONFIG", "$CONFIG"),
    ("gpu-masks", "perlmutter.sbatch", "-gpu-bind=none", "-gpus-per-task=1", "CUDA"),
    ("fixed-port", "frontier.sbatch", "$((20000 + SLURM_JOB_ID % 20000))", "29500", "29500"),
    ("fixed-port", "torchrun.sbatch", '"$head:$port"', '"$head:29500"', "torchrun"),
    (
        "one-node-directory",
        "frontier.sbatch",
        'srun -N "$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 mkdir',
        "mkdir",
        "mkdir",
    ),
    ("one-node-directory", "aurora.pbs", 'mpiexec -n "$NNODES" -ppn 1 mkdir', "mkdir", "mkdir"),
    ("unchecked-sbcast", "frontier.sbatch", "      exit 1\n", "      break\n", "sbcast -pf"),
    ("unchecked-sbcast", "frontier.sbatch", "      exit 1\n", "", "sbcast -pf"),
    ("other-machine", "frontier.sbatch", '"$CRAY_LD', '"/ccs/sw/crusher/ofi/lib:$CRAY_LD', "crusher"),
    ("signal-without-trap", "frontier.sbatch", TRAP, "", "--signal"),
    ("foreground-step", "frontier.sbatch", "--config run.yaml &\npid=$!", "--config run.yaml\npid=$$", SRUN),
    ("append-mode", "frontier.sbatch", "#SBATCH --open-mode=append\n", "", "--requeue"),
    ("warning-time", "frontier.sbatch", "USR2@300", "USR2@30", "--signal"),
    ("warning-time", "frontier.sbatch", "USR2@300", "USR2@7200", "--signal"),
    ("cores-not-inherited", "perlmutter.sbatch", 'srun -c "$SLURM_CPUS_PER_TASK"', "srun", "srun"),
    ("kill-on-bad-exit", "frontier.sbatch", "  --kill-on-bad-exit=1 \\\n", "", SRUN),
    ("kill-on-bad-exit", "perlmutter.sbatch", " -K ", " -K0 ", "srun"),
    (
        "mpi-flavour",
        "frontier.sbatch",
        'srun -N "$SLURM_JOB_NUM_NODES" --ntasks-per-node=8',
        "srun --mpi=pmi2 -n 512",
        SRUN[:4],
    ),
    ("nested-launcher", "torchrun.sbatch", "--ntasks-per-node=1", "--ntasks-per-node=4", "torchrun --n"),
    ("nested-launcher", "torchrun.sbatch", 'srun -c "$SLURM_CPUS_PER_TASK"', "srun", "torchrun --n"),
    ("hidden-exit-code", "torchrun.sbatch", "set -eo pipefail", "set -e", "torchrun --n"),
    ("not-forwarded", "openmpi.sh", "-x NCCL_SOCKET_IFNAME ", "", "mpirun"),
    ("halved-power", "frontier.sbatch", "p * 2 <= n", "p * 2 < n", "while"),
    ("placeholder", "frontier.sbatch", "-A abc123", "-A <PROJECT>", "-A"),
    ("placeholder", "torchrun.sbatch", "source ~/venv", "source <env>/venv", "source"),
    ("late-directive", "frontier.sbatch", "#SBATCH -C nvme\n", "set -e\n#SBATCH -C nvme\n", "-C nvme"),
    ("unread-directive", "frontier.sbatch", "#SBATCH -C nvme", "# SBATCH -C nvme", "-C nvme"),
    ("unread-directive", "frontier.sbatch", "#SBATCH -C nvme", "#SBACTH -C nvme", "-C nvme"),
    ("directive-value", "perlmutter.sbatch", "--nodes=8", "--nodes = 8", "--nodes"),
    ("directive-value", "perlmutter.sbatch", "--nodes=8", "-N=8", "-N=8"),
    ("directive-value", "perlmutter.sbatch", "--gpus-per-node=4", "--gpu-per-node=4", "gpu-per-node"),
    ("directive-value", "perlmutter.sbatch", "--time=1-00:00:00", "--time=24h", "--time"),
    ("log-folder", "torchrun.sbatch", "--output=", "--output=logs/", "--output"),
    ("unknown-queue", "frontier.sbatch", "-p batch", "-p bacth", "bacth"),
    ("unknown-queue", "frontier.sbatch", "-p batch", "-p debug", "debug"),
    ("unknown-queue", "aurora.pbs", "-q prod", "-q workq", "workq"),
    ("routing-only-queue", "aurora.pbs", "-q prod", "-q small", "small"),
    ("queue-size", "aurora.pbs", "select=256", "select=16", "select"),
    ("queue-size", "perlmutter.sbatch", "regular\n#SBATCH --nodes=8", "debug\n#SBATCH --nodes=16", "--nodes=16"),
    ("wall-time", "frontier.sbatch", "-t 02:00:00", "-t 03:00:00", "-t 03"),
    ("wall-time", "aurora.pbs", "walltime=06:00:00", "walltime=13:00:00", "walltime"),
    ("wall-time", "perlmutter.sbatch", "#SBATCH --qos=regular\n", "", "--time"),
    ("no-wall-time", "torchrun.sbatch", "#SBATCH --time=04:00:00\n", "", "--job-name"),
    ("ranks-per-node", "perlmutter.sbatch", "--ntasks-per-node=4", "--ntasks-per-node=8", "ntasks"),
    ("ranks-per-node", "perlmutter.sbatch", "--ntasks-per-node=4", "--ntasks-per-node=2", "ntasks"),
    ("gpus-per-node", "perlmutter.sbatch", "--gpus-per-node=4", "--gpus-per-node=8", "gpus"),
    ("cores", "perlmutter.sbatch", "--cpus-per-task=32", "--cpus-per-task=64", "cpus"),
    ("wrong-centre", "frontier.sbatch", "# Frontier (OLCF)", "# Perlmutter (NERSC)", "NERSC"),
]


@pytest.mark.parametrize(
    ("rule", "name", "good", "bad", "where"), MUTATIONS, ids=[f"{i}-{case[0]}" for i, case in enumerate(MUTATIONS)]
)
def test_defect_is_found_where_it_is_and_its_cure_takes_it_away(
    rule: str, name: str, good: str, bad: str, where: str
) -> None:
    cured = text(name)
    assert cured.count(good) >= 1
    broken = cured.replace(good, bad, 1)
    if rule == "gpu-masks":
        broken = broken.replace("LOCAL_RANK=", "CUDA_VISIBLE_DEVICES=")
    found = [finding for finding in lint(broken) if finding.rule == rule]
    assert found, rules(lint(broken))
    assert any(where in broken.splitlines()[finding.line - 1] + " " for finding in found), found
    assert rule not in rules(lint(cured))


def test_every_rule_is_tested() -> None:
    """By its name in a call of error() or warning()."""
    named: set[str] = set()
    for path in (HERE.parent / "gdyn" / "lint").glob("*.py"):
        named |= {
            node.args[1].value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("error", "warning", "report")
            if isinstance(node.args[1], ast.Constant)
        }
    here = Path(__file__).read_text()
    assert len(named) > 30
    assert {name for name in named if f'"{name}"' not in here} == set()


def test_the_five_defects_of_a_hand_written_script_for_frontier_are_found() -> None:
    """As seen in public scripts for 64 to 2,048 nodes, in a reduction of our own."""
    script = text("hand_written.sbatch").splitlines()
    found = {(finding.rule, script[finding.line - 1].strip()) for finding in lint(text("hand_written.sbatch"))}
    assert {
        ("misspelt-variable", "export FI_CXI_RDV_PROTO=alt_read"),
        ("needs-network-flag", "export FI_CXI_RDV_PROTO=alt_read"),
        ("unset-variable", "export MIOPEN_USER_DB_PATH=/tmp/$JOBID"),
        ("one-node-directory", "mkdir -p $MIOPEN_USER_DB_PATH"),
        ("unchecked-sbcast", 'sbcast -pf "/lustre/orion/abc123/$archive" "/mnt/bb/$USER/$archive"'),
        ("other-machine", "export PLUGIN_PATH=/ccs/sw/crusher/amdsw/aws-ofi-nccl/aws-ofi-nccl"),
        ("halved-power", "while ((p * 2 < n)); do"),
    } <= found


def test_the_guides_example_script_is_seen_through() -> None:
    script = text("guide.sbatch").splitlines()
    found = lint(text("guide.sbatch"))
    placeholders = {script[finding.line - 1] for finding in found if finding.rule == "placeholder"}
    assert placeholders == {row for row in script if "<" in row}
    assert any("do not even match" in finding.what for finding in found)
    assert {"log-folder", "wrong-centre", "nothing-runs"} <= rules(found)
    # two hours are just what two nodes may have, so no word of the wall time; one minute more is refused
    assert "wall-time" not in rules(found)
    assert "wall-time" in rules(lint(text("guide.sbatch").replace("02:00:00", "02:01:00")))


def test_the_guides_example_script_for_perlmutter_asks_for_what_no_node_there_has() -> None:
    found = lint(text("guide.sbatch"), sites.read("perlmutter"))
    assert {"wrong-centre", "gpus-per-node", "unknown-queue"} <= rules(found)


@pytest.mark.parametrize(
    ("loop", "halves"),
    [
        ("while (( p * 2 < n )); do p=$((p * 2)); done; echo $p", True),
        ("while [ $((2 * p)) -lt $n ]; do p=$((p * 2)); done; echo $p", True),
        ("while [ $p -lt $n ]; do p=$((p * 2)); done; echo $((p / 2))", True),
        ("while (( p < n )); do (( p *= 2 )); done\n  echo $(( p / 2 ))", True),
        ("while (( p * 2 <= n )); do p=$((p * 2)); done; echo $p", False),
        ("while [ $p -lt $n ]; do p=$((p * 2)); done; echo $p", False),  # the next power up: right
        ("while [ $((2 * p)) -le $n ]; do p=$((p * 2)); done; echo $p", False),
        ("while (( p < n )); do (( p += 2 )); done; echo $p", False),
    ],
)
def test_halving_of_exact_powers_is_seen_in_its_usual_forms(loop: str, halves: bool) -> None:
    """A pattern of the loop, not its execution: other forms (recursion, bc, awk, logarithms) are not seen."""
    assert ("halved-power" in rules(slurm(f"largest() {{\n  local n=$1 p=1\n  {loop}\n}}", "largest 8"))) == halves


@pytest.mark.parametrize(
    ("stage", "checked"),
    [
        ("sbcast a /tmp/a", False),
        ("sbcast a /tmp/a || exit 1", True),
        ("sbcast a /tmp/a || { echo no; exit 1; }", True),
        ("sbcast a /tmp/a || echo no", False),
        ("set -e\nsbcast a /tmp/a", True),
        ("set -e\nsbcast a /tmp/a || echo no", False),
        ("die() { echo no >&2; exit 1; }\nsbcast a /tmp/a || die", True),
        ("if ! sbcast a /tmp/a; then echo no; fi", False),
        ("if ! sbcast a /tmp/a; then exit 2; fi", True),
        ("if sbcast a /tmp/a; then echo ok; else exit 2; fi", True),
        ("if sbcast a /tmp/a; then echo ok; else echo no; fi", False),
        ("sbcast a /tmp/a\nif [ $? -ne 0 ]; then exit 3; fi", True),
        ("sbcast a /tmp/a\n[ $? -eq 0 ] || exit 3", True),
        ("for f in a b; do\n  sbcast $f /tmp/$f || break\ndone\necho ready", False),
    ],
)
def test_sbcast_counts_as_checked_when_its_failure_ends_the_job(stage: str, checked: bool) -> None:
    assert ("unchecked-sbcast" not in rules(slurm(stage))) == checked


@pytest.mark.parametrize(
    ("first", "second", "bad"),
    [
        ("ROCR_VISIBLE_DEVICES=4", "HIP_VISIBLE_DEVICES=4", True),
        ("ROCR_VISIBLE_DEVICES=4", "HIP_VISIBLE_DEVICES=0", False),
        ("ROCR_VISIBLE_DEVICES=4,5", "CUDA_VISIBLE_DEVICES=1,2", True),
        ("ROCR_VISIBLE_DEVICES=$SLURM_LOCALID", "HIP_VISIBLE_DEVICES=$SLURM_LOCALID", True),
        ("ROCR_VISIBLE_DEVICES=0,1,2,3", "OMP_NUM_THREADS=4", False),
    ],
)
def test_gpu_masks_are_composed(first: str, second: str, bad: bool) -> None:
    assert ("gpu-masks" in rules(slurm(f"export {first} {second}", "srun -K python train.py"))) == bad


SIGNAL = "#SBATCH --time=1:00:00\n#SBATCH --signal=B:USR2@300"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("exec python supervise.py -- srun python train.py", set()),
        ("trap 'kill -USR2 $pid' USR2\nsrun -K python train.py & pid=$!\nwait $pid", {"wait-returns-early"}),
        ("trap 'kill -USR2 $pid; wait $pid' USR2\nsrun -K python train.py & pid=$!\nwait $pid", set()),
        ("f() { kill -12 $pid; wait; exit 75; }\ntrap f SIGUSR2\nsrun -K python train.py & pid=$!\nwait", set()),
        ("trap 'true' USR2\nsrun hostname\nsrun -K python train.py & pid=$!\nwhile ! wait $pid; do :; done", set()),
        ("trap 'true' USR2\nsrun -K python train.py", {"foreground-step"}),
        ("trap 'true' USR2\ngo() { srun -K python train.py; }\ngo & pid=$!\nwhile ! wait $pid; do :; done", set()),
        ("trap 'true' EXIT\nsrun -K python train.py", {"signal-without-trap"}),
    ],
)
def test_signals_reach_the_program(rows: str, found: set[str]) -> None:
    assert rules(slurm(rows, directives=SIGNAL)) == found


def test_usr1_is_named_where_it_reaches_the_ranks() -> None:
    forward = "trap 'kill -USR1 $pid' USR1\nsrun -K python train.py & pid=$!\nwhile ! wait $pid; do :; done"
    directives = SIGNAL.replace("USR2", "USR1")
    assert "signal-usr1" in rules(slurm(forward, directives=directives))
    assert "signal-usr1" not in rules(slurm(forward.replace("kill -USR1", "kill -USR2"), directives=directives))


def test_requeue_needs_more_than_a_handler_that_exits_zero() -> None:
    rows = "f() { kill -USR2 $pid; wait; %s exit 0; }\ntrap f USR2\nsrun -K python train.py & pid=$!\nwait"
    directives = f"{SIGNAL}\n#SBATCH --requeue --open-mode=append"
    assert rules(slurm(rows % "", directives=directives)) == {"requeue-exits-zero"}
    assert rules(slurm(rows % "scontrol requeue $SLURM_JOB_ID;", directives=directives)) == set()


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("cd $SCRATCH/run\nrm -rf output", {"unchecked-cd"}),
        ("cd $SCRATCH/run || exit 1\nrm -rf output", set()),
        ("set -e\ncd $SCRATCH/run\nrm -rf output", set()),
        ("cd $SCRATCH/run\nrm -rf $SCRATCH/run/output", set()),
        ("cd $SCRATCH/run\nsrun hostname", set()),
    ],
)
def test_cd_matters_before_something_is_deleted(rows: str, found: set[str]) -> None:
    assert rules(slurm(rows)) == found


def test_pdsh_loses_variables() -> None:
    run = "export FI_PROVIDER=cxi\ndeepspeed %s--hostfile hosts train.py\n"
    assert "not-forwarded" in rules(lint(run % ""))
    assert "not-forwarded" not in rules(lint(run % "--launcher slurm "))


def test_nobody_names_a_qos_on_perlmutter_without_wanting_debug() -> None:
    script = text("perlmutter.sbatch").replace("#SBATCH --qos=regular\n", "")
    short = script.replace("1-00:00:00", "00:30:00")
    assert rules(lint(short)) == {"unnamed-queue"}


def test_log_folder_that_exists_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert slurm("srun hostname", directives="#SBATCH -t 10 -o logs/%j.out") == []
    (tmp_path / "logs").rmdir()
    found = slurm("mkdir -p logs", "srun hostname", directives="#SBATCH -t 10 -o logs/%j.out")
    assert "line 3 comes too late" in found[0].what


def test_absolute_log_folder_is_judged_where_its_parent_can_be_seen(tmp_path: Path) -> None:
    for folder, found in ((tmp_path / "logs", {"log-folder"}), (tmp_path / "runs" / "logs", set()), (tmp_path, set())):
        assert rules(slurm("srun hostname", directives=f"#SBATCH -t 10 -o {folder}/%j.out")) == found


@pytest.mark.parametrize(
    "rows",
    [
        "read -r first rest < hosts\necho $first $rest",
        "while IFS= read -r row; do echo $row; done < hosts",
        "for i in 1 2; do echo $i; done",
        "for ((k = 0; k < 3; k++)); do echo $k; done",
        "f() { local a=$1; echo $a; }\nf x",
        'printf -v stamp "%s" now\necho $stamp',
        "mapfile -t rows < hosts\necho ${rows[0]} ${#rows[@]}",
        "declare -A table=([a]=1)\necho ${table[a]}",
        'while getopts "n:" flag; do echo $flag $OPTARG; done',
        "echo ${MAYBE:-1} ${OTHER+x} ${NEEDED:?say it}",
        'if [ -z "$DEBUG" ]; then DEBUG=0; fi\necho $DEBUG',
        '[[ -n ${EXTRA} && $EXTRA != no ]] && echo "$EXTRA"',
        "echo '$NOTHING' \\$NOTHING",
        "awk '{print $NF, $FNR}' hosts",
        "cat <<'END'\n$NOTHING\nEND\necho",
        "cat <<-\\END\n\t$NOTHING\n\tEND\necho",
        "source setup.sh\necho $FROM_SETUP",
        "module load rocm\necho $ROCM_PATH",
        "case $1 in a | b) x=1 ;; *) x=2 ;; esac\necho $x",
        "n=$(wc -l < hosts)\n((n > 1)) && echo $((n * 2)) $((16#ff))",
        "A=1 B=$HOME env C=2 true",
        ": ${CACHE:=/tmp}\necho $CACHE",
    ],
)
def test_variables_that_are_set_are_not_called_unset(rows: str) -> None:
    assert slurm(rows) == []


def test_text_of_a_here_document_is_no_command_and_no_directive() -> None:
    rows = "cat > child.sbatch <<EOF\n#SBATCH -N 2\nmkdir /tmp/x; export NCCL_DEBUG=\nEOF\nsbatch child.sbatch"
    assert slurm(rows) == []
    assert "unset-variable" in rules(slurm(rows.replace("mkdir", "$NOTHING")))


def test_quotes_continuations_and_comments_are_read_as_bash_does() -> None:
    script = read('a \\\n  \'b c\' "d $e" # f\nX="1 2" Y=$(g | h) i &\n( j && k ) || { l; } > m\n')
    words = [(command.line, *command.words) for command in script.commands]
    assert words == [(3, "g"), (3, "h"), (1, "a", "b c", "d $e"), (3, "i"), (4, "j"), (4, "k"), (4, "l")] or words == [
        (1, "a", "b c", "d $e"),
        (3, "g"),
        (3, "h"),
        (3, "i"),
        (4, "j"),
        (4, "k"),
        (4, "l"),
    ]
    assert [command.words[0] for command in script.commands if command.in_background] == ["i"]
    assert {command.words[0] for command in script.commands if command.tested} == {"j", "k"}


@pytest.mark.parametrize("name", [*GOOD, "hand_written.sbatch", "guide.sbatch"])
def test_a_script_cut_short_anywhere_is_no_crash(name: str) -> None:
    whole = text(name)
    for end in range(0, len(whole), 13):
        lint(whole[:end])
        lint(whole[end:])


@pytest.mark.parametrize(
    "junk", ["", "\0", "'", '"', "`", "$(", "${", "((", "[[", "case", "if", "}", ")", "<<", "a=(", "#SBATCH -"]
)
def test_junk_is_no_crash(junk: str) -> None:
    lint(junk)
    lint(f"#!/bin/bash\n#SBATCH -N 2\n{junk}\nsrun a\n{junk}")


def test_directives_are_read_in_all_their_spellings() -> None:
    job = read_job(
        "#SBATCH -N2 -n 16 --time 1:00:00 --gres=gpu:a100:4 # all of it\n#SBATCH --job-name='a b' --exclusive\n"
    )
    assert {entry.name: entry.value for entry in job.directives} == {
        "nodes": "2",
        "ntasks": "16",
        "time": "1:00:00",
        "gres": "gpu:a100:4",
        "job-name": "a b",
        "exclusive": "",
    }
    assert (job.nodes, job.tasks_per_node, job.gpus_per_node, job.seconds) == (2, 8, 4, 3600)
    pbs = read_job("#PBS -l select=2:ncpus=4+1:ncpus=8,walltime=00:30:00\n#PBS -q debug -A x\n")
    assert (pbs.nodes, pbs.seconds, pbs.value("queue"), pbs.value("account")) == (3, 1800, "debug", "x")


def test_no_known_name_is_taken_for_a_slip() -> None:
    assert [name for name in KNOWN if meant(name)] == []


@pytest.mark.parametrize(
    "name", ["NCCL_MY_SETTING", "FI_CXI_BRAND_NEW_THING", "MY_NCCL_DEBUG", "NCCL_TESTS", "OMP_ROOT"]
)
def test_strange_but_unlike_names_pass(name: str) -> None:
    assert meant(name) is None


def test_distance_counts_edits() -> None:
    pairs = {("abc", "abc"): 0, ("abc", "abd"): 1, ("abc", "acb"): 1, ("abc", "ab"): 1, ("abc", "xyz"): 3}
    assert {pair: distance(*pair, limit=2) for pair in pairs} == pairs


def test_every_finding_names_its_cure_and_source() -> None:
    for name in ("hand_written.sbatch", "guide.sbatch"):
        for finding in lint(text(name)):
            assert finding.cure and finding.source and finding.what[-1] in ".)", finding


def test_program_prints_blocks_and_counts_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, out = str(SCRIPTS / "perlmutter.sbatch"), str(SCRIPTS / "hand_written.sbatch"), tmp_path / "out.json"
    assert main([good]) == 0
    assert capsys.readouterr().out == "1 script: 0 errors, 0 warnings\n"
    assert main([good, bad, "--site", "frontier", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"{bad}:15: error: FI_CXI_RDV_PROTO" in printed and "    cure:   Write FI_CXI_RDZV_PROTO.\n" in printed
    records = json.loads(out.read_text())
    assert records and printed.count("    source: ") == len(records)
    assert set(records[0]) == {"script", "line", "severity", "rule", "what", "cure", "source"}


def test_warnings_alone_are_no_failure(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("#!/bin/bash\n#SBATCH -t 10\nexport NCCL_DEBUG=\nsrun hostname\n")
    assert main([str(tmp_path / "a.sh")]) == 0


def test_file_that_cannot_be_read_is_a_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\xfe")
    for path in (tmp_path / "absent", tmp_path / "binary", tmp_path):
        assert main([str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    assert main([str(SCRIPTS / "guide.sbatch"), "--site", "atlantis"]) == 2


def test_rules_have_distinct_names() -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
