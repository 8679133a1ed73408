"""Site files: their facts are understood, their scripts filled without harm, and requests held to their rules."""

import re
import shlex
from pathlib import Path

import pytest

from gdyn import sites
from gdyn.errors import UserError
from gdyn.planning import Network
from gdyn.sites import Site

ALL = sorted(sites.sites())
HOUR = 3600.0


def site_file(folder: Path, script: str, facts: str = "") -> Site:
    path = folder / "own.sh"
    path.write_text(f"#!/bin/bash\n#: title: own\n#: scheduler: none\n{facts}{script}")
    return sites.read(str(path))


@pytest.mark.parametrize("name", ALL)
def test_facts_of_a_site_are_complete(name: str) -> None:
    site = sites.read(name)
    assert site.title and site.scheduler in ("slurm", "pbs", "none")
    assert Network(**site.facts["network"]).gigabytes_per_second_per_node > 0
    default = site.facts.get("default_queue")
    assert default is None or site.queue(default) is not None
    for queue in site.queues:
        assert queue.option in site.blanks and (queue.direct or queue.note)
        assert queue.limits == tuple(sorted(queue.limits))
    for option in site.options:
        assert option.name in site.blanks and option.help


@pytest.mark.parametrize("name", ALL)
def test_every_variable_a_script_exports_has_a_reason_with_a_source_and_a_date(name: str) -> None:
    """A dated comment above the lines it belongs to; the lines may add their own reason."""
    explained, dated = True, ""
    for line in sites.read(name).script().splitlines():
        if line.startswith("#") and not line.startswith("#?"):
            # a comment begins a new explanation, unless it continues the one above
            dated = dated + line if explained is False else line
            explained = False
        elif re.match(r"\s*export ", line):
            explained = True
            assert re.search(r"\b20\d\d\b", dated) or "supervisor" in dated, line
        elif line.strip() and not line.startswith("#?"):
            explained = True


@pytest.mark.parametrize("name", ALL)
def test_blanks_stand_outside_quotes(name: str) -> None:
    """They are quoted when they are filled; within quotes that would end the quotes."""
    for line in sites.read(name).script().splitlines():
        for blank in re.finditer(r"@@\{", line):
            before = line[: blank.start()]
            assert line.startswith("#") or (before.count('"') % 2 == 0 and before.count("'") % 2 == 0), line


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_closed_before_the_next_begins(name: str) -> None:
    marks = [line[2:].strip() for line in sites.read(name).script().splitlines() if line.startswith("#?")]
    assert all(marks[0::2]) and not any(marks[1::2]) and len(marks) % 2 == 0


def test_a_line_goes_with_its_missing_value(tmp_path: Path) -> None:
    site = site_file(tmp_path, "#SBATCH -q @@{qos}\necho @@{name}\n")
    assert site.render({"qos": None, "name": "a b"}) == "#!/bin/bash\necho 'a b'\n"
    assert site.render({"qos": "debug", "name": ""}) == "#!/bin/bash\n#SBATCH -q debug\necho ''\n"


def test_a_block_stays_if_one_of_its_values_is_given_or_chosen(tmp_path: Path) -> None:
    site = site_file(tmp_path, "#? a|b\nfirst\n#?\n#? kind=x|y\nsecond\n#?\nlast\n")
    assert "first" not in site.render({"a": None, "b": "", "kind": None})
    text = site.render({"a": None, "b": "1", "kind": "y"})
    assert text.splitlines()[1:] == ["first", "second", "last"]
    assert "second" not in site.render({"a": None, "b": "1", "kind": "z"})


def test_several_words_are_quoted_one_by_one(tmp_path: Path) -> None:
    text = site_file(tmp_path, "run @@{words} end\n").render({"words": ["a b", "$(c)", "'"]})
    assert shlex.split(text.splitlines()[1]) == ["run", "a b", "$(c)", "'", "end"]


def test_the_shells_own_dollars_are_left_alone(tmp_path: Path) -> None:
    line = 'echo "$(hostname -i)" ${VAR:-@} @{x} $$\n'
    assert site_file(tmp_path, line).render({}).endswith(line)


@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH -x", "$(id)", "a;b", "-x", "'a'", "é", "", "a#b", "50%", "a\\b"])
def test_a_directive_takes_harmless_values_only(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="directive"):
        site_file(tmp_path, "#SBATCH -J @@{name}\n").render({"name": value})


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "\x1b[31m"])
def test_control_characters_are_refused_everywhere(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="control character"):
        site_file(tmp_path, "cd @@{place}\n").render({"place": value})


def test_blank_and_block_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown blank @@\{nmae\}; known: name"):
        site_file(tmp_path, "echo @@{nmae}\n").render({"name": "x"})
    with pytest.raises(UserError, match="cannot be understood"):
        site_file(tmp_path, "#? name and more\n").render({"name": "x"})


@pytest.mark.parametrize(
    ("facts", "message"),
    [("#: queues: {a: {limits: {1: 2}}}\n", "lack or garble"), ("#: [\n", "not YAML"), ("#: queues: 3\n", "lack or")],
)
def test_garbled_facts_are_refused(tmp_path: Path, facts: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        site_file(tmp_path, "", facts)


def test_unknown_site_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="aurora, frontier, mpirun, perlmutter, slurm, workstation"):
        sites.read("summit")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("login03.frontier.olcf.ornl.gov", "frontier"),
        ("login21.chn.perlmutter.nersc.gov", "perlmutter"),
        ("aurora-uan-0012", "aurora"),
        ("laptop", None),
    ],
)
def test_a_login_node_tells_its_site(host: str, name: str | None) -> None:
    found = sites.detect(host)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 1800), ("5:30", 330), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("0-0:0:10", 10)],
)
def test_durations_are_read_as_slurm_does(text: str, expected: float) -> None:
    assert sites.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "2h", "٣"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no wall time"):
        sites.seconds(text)


def test_clock_and_seconds_are_inverse() -> None:
    assert all(sites.seconds(sites.clock(value)) == value for value in (1, 59, 60, 3599, 3600, 360000))


FRONTIER = sites.read("frontier")
PERLMUTTER = sites.read("perlmutter")
AURORA = sites.read("aurora")


@pytest.mark.parametrize(
    ("site", "queue", "nodes", "hours"),
    [
        (FRONTIER, "batch", 1, 2),
        (FRONTIER, "batch", 91, 2),
        (FRONTIER, "batch", 92, 6),
        (FRONTIER, "batch", 184, 12),
        (FRONTIER, "batch", 9472, 12),
        (FRONTIER, "extended", 64, 24),
        (FRONTIER, "debug", 2, 2),
        (PERLMUTTER, "debug", 8, 0.5),
        (PERLMUTTER, "regular", 1792, 48),
        (PERLMUTTER, "preempt", 128, 48),
        (AURORA, "prod", 256, 12),
        (AURORA, "prod", 1999, 18),
        (AURORA, "prod", 2000, 24),
        (AURORA, "debug", 2, 1),
        (AURORA, "debug-scaling", 256, 1),
        (AURORA, "capacity", 16, 168),
    ],
)
def test_longest_wall_time_is_accepted_and_a_second_more_is_not(
    site: Site, queue: str, nodes: int, hours: float
) -> None:
    found = site.choose_queue(queue)
    site.check(found, nodes, hours * HOUR, jobs=1)
    with pytest.raises(UserError, match=sites.clock(hours * HOUR)):
        site.check(found, nodes, hours * HOUR + 1, jobs=1)


@pytest.mark.parametrize(
    ("site", "queue", "nodes", "jobs", "message"),
    [
        (FRONTIER, "batch", 9473, 1, "ends at 9472 nodes"),
        (FRONTIER, "batch", 10000, 1, "9856 nodes"),
        (FRONTIER, "extended", 65, 1, "ends at 64 nodes.*--queue batch"),
        (FRONTIER, "debug", 1, 2, "one job of a user at a time.*--queue batch"),
        (FRONTIER, "batch", 1, 101, "100 jobs wait"),
        (PERLMUTTER, "debug", 9, 1, "ends at 8 nodes"),
        (PERLMUTTER, "shared", 1, 1, "takes whole nodes.*--queue debug"),
        (AURORA, "small", 300, 1, "prod routes to it.*--queue prod"),
        (AURORA, "prod", 16, 1, "starts at 256 nodes.*--queue debug-scaling.*--queue capacity"),
        (AURORA, "debug", 2, 3, "one job of a user"),
    ],
)
def test_what_the_machine_refuses_is_refused_with_a_way_out(
    site: Site, queue: str, nodes: int, jobs: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        site.check(site.choose_queue(queue), nodes, 600.0, jobs)


def test_too_long_a_job_hears_of_larger_bins_and_other_queues() -> None:
    with pytest.raises(UserError) as refusal:
        FRONTIER.check(FRONTIER.choose_queue(None), 64, 12 * HOUR, jobs=1)
    message = str(refusal.value)
    assert "2:00:00 at most" in message and "--queue extended (up to 24:00:00)" in message
    assert "184 nodes or more" in message and "--chain" in message


def test_a_queue_must_be_known_or_named() -> None:
    with pytest.raises(UserError, match='no queue "bath"; known: batch, extended, debug'):
        FRONTIER.choose_queue("bath")
    with pytest.raises(UserError, match="--queue, one of debug, interactive, regular, preempt"):
        PERLMUTTER.choose_queue(None)
    any_cluster = sites.read("slurm").choose_queue("gpu-long")
    assert any_cluster is not None and any_cluster.option == "partition"


def test_options_of_a_site_are_checked(tmp_path: Path) -> None:
    options = {option.name: option for site in (FRONTIER, PERLMUTTER) for option in site.options}
    memory, archive = options["gpu_memory"], options["stage_env"]
    assert memory.fill("80", 256) == "gpu&hbm80g"
    with pytest.raises(UserError, match="256 such nodes, asked for 257"):
        memory.fill("80", 257)
    with pytest.raises(UserError, match="expected 40 or 80"):
        memory.fill("81", 1)
    with pytest.raises(UserError, match="does not exist"):
        archive.fill(str(tmp_path / "none.tar.gz"), 1)
    number = next(option for option in sites.read("slurm").options if option.kind == "number")
    for wrong in ("0", "-1", "two", "1 --x", "٣"):
        with pytest.raises(UserError, match="whole number"):
            number.fill(wrong, 1)
