"""Sites: the machines there is a job script for, one readable file in job_templates/ each. Standard library and YAML.

A site file is the whole script, with `@@{name}` blanks. Its lines that start with `#:` are YAML: the facts that a
request is checked against. Adding a machine is adding a file; no code knows a machine's name. job_templates/README.md
says how.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from gdyn.errors import UserError

_INSTALLED = Path(__file__).parent / "job_templates"
_CHECKOUT = Path(__file__).parents[1] / "job_templates"
SUFFIXES = (".sbatch", ".pbs", ".sh")

Blank = str | Sequence[str] | None
"""What fills a blank: one word, several words, or nothing, which takes the line away."""

_BLANK = re.compile(r"@@\{(\w+)\}")
_BLOCK = re.compile(r"#\?(?: (?P<names>\w+(?:\|\w+)*)(?:=(?P<values>\S+))?)?\s*")
# Nothing that a scheduler's own parser of directives gives a meaning: quotes, blanks, %, \, #, $, ...
_DIRECTIVE_SAFE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:,=+@&-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Queue:
    """Where jobs wait: a partition, a quality of service, or a PBS queue."""

    name: str
    option: Literal["partition", "qos", "queue"]
    """Which of the scheduler's options names it."""
    limits: tuple[tuple[int, float], ...]
    """(nodes, seconds), by size: a job of at most so many nodes may run for so long. Empty: not known."""
    min_nodes: int = 1
    direct: bool = True
    """Whether this project's jobs can ask for it by name; `note` says why not."""
    chain: bool = True
    """Whether several jobs of one user may wait in it."""
    partition: str | None = None
    """The partition a quality of service is used with, where that must be said."""
    note: str = ""

    @property
    def max_nodes(self) -> int | None:
        return max((nodes for nodes, _ in self.limits), default=None)

    def seconds(self, nodes: int) -> float | None:
        """The longest wall time of a job of so many nodes; None: not known, or too many nodes."""
        return next((seconds for size, seconds in sorted(self.limits) if nodes <= size), None)

    def takes(self, nodes: int, seconds: float) -> bool:
        """Whether a job of that size and wall time may wait here."""
        longest = self.seconds(nodes)
        return self.direct and nodes >= self.min_nodes and longest is not None and seconds <= longest


@dataclass(frozen=True)
class Option:
    """An option of `gdyn submit` that only this site has. Its value fills the blank of its name."""

    name: str
    help: str
    kind: Literal["word", "words", "number", "file"] = "word"
    """A file must exist and becomes an absolute path; a number is a whole one above 0."""
    choices: Mapping[str, str] | None = None
    """The values that may be given -> what fills the blank."""
    default: str | None = None
    max_nodes: Mapping[str, int] = field(default_factory=dict)
    """Choice -> how many nodes there are of it."""

    def fill(self, value: str | None, nodes: int) -> Blank:
        """The blank's text. Raises: UserError for a value or a number of nodes that cannot be."""
        if value is None:
            return None
        if self.choices is not None and value not in self.choices:
            raise UserError(f'--{self.name} is "{value}"; expected {" or ".join(self.choices)}.')
        if nodes > self.max_nodes.get(value, nodes):
            raise UserError(f"--{self.name} {value}: there are {self.max_nodes[value]} such nodes, asked for {nodes}.")
        if self.kind == "number" and not (value.isdecimal() and value.isascii() and int(value) > 0):
            raise UserError(f'--{self.name} is "{value}"; expected a whole number above 0.')
        if self.kind == "file":
            path = Path(value).expanduser().absolute()
            if not path.is_file():
                raise UserError(f"--{self.name}: {path} does not exist or is no file.")
            return str(path)
        if self.kind == "words":
            return value.split()
        return self.choices[value] if self.choices is not None else value


@dataclass(frozen=True)
class Site:
    """One machine: the facts of its file and the script itself."""

    name: str
    path: Path
    title: str
    scheduler: Literal["slurm", "pbs", "none"]
    ranks_per_node: int | None
    """Devices of a node; None: the user says how many."""
    cores_per_rank: int | None
    hosts: tuple[str, ...]
    """Globs over host names of login nodes."""
    queues: tuple[Queue, ...]
    """Empty: not known, any name is accepted."""
    options: tuple[Option, ...]
    containers: Mapping[str, str]
    """Kind -> the words before `python` that start a container of `{image}`."""
    facts: Mapping[str, Any]
    """Everything the `#:` lines say, for what only some sites have."""

    def queue(self, name: str) -> Queue | None:
        return next((queue for queue in self.queues if queue.name == name), None)

    def choose_queue(self, name: str | None) -> Queue | None:
        """The queue of that name, or the site's default; None where the scheduler has its own and none is named.

        Raises: UserError if there is no such queue, or none is named where there is no default.
        """
        known = ", ".join(queue.name for queue in self.queues if queue.direct)
        name = name or self.facts.get("default_queue")
        if name is None:
            if self.queues:
                raise UserError(f"{self.name} has no default worth having: give --queue, one of {known}.")
            return None
        if not self.queues and "queue_option" in self.facts:
            return Queue(name, self.facts["queue_option"], ())
        queue = self.queue(name)
        if queue is None:
            raise UserError(f'{self.name} has no queue "{name}"; known: {known or "none"}.')
        return queue

    def check(self, queue: Queue | None, nodes: int, seconds: float | None, jobs: int) -> None:
        """Refuse what the machine's rules refuse. nodes: those allocated, spare ones too; jobs: that will wait at once.

        Raises: UserError with the rule, and with what would be accepted.
        """
        largest, most = self.facts.get("nodes"), self.facts.get("max_queued")
        if largest is not None and nodes > largest:
            raise UserError(f"{self.name} has {largest} nodes, asked for {nodes}.")
        if most is not None and jobs > most:
            raise UserError(f"{self.name} lets {most} jobs wait, asked for {jobs}.")
        if queue is None:
            return
        problem = self._problem(queue, nodes, seconds, jobs)
        if problem:
            raise UserError(f"{self.name}: {problem}.{self._way_out(queue, nodes, seconds, jobs)}")

    def _problem(self, queue: Queue, nodes: int, seconds: float | None, jobs: int) -> str | None:
        longest = queue.seconds(nodes)
        if not queue.direct:
            return f"jobs cannot ask for {queue.name} ({queue.note})"
        if jobs > 1 and not queue.chain:
            return f"{queue.name} takes one job of a user at a time, asked for {jobs} (a chain or an array)"
        if nodes < queue.min_nodes:
            return f"{queue.name} starts at {queue.min_nodes} nodes, asked for {nodes}"
        if queue.max_nodes is not None and nodes > queue.max_nodes:
            return f"{queue.name} ends at {queue.max_nodes} nodes, asked for {nodes}"
        if seconds is not None and longest is not None and seconds > longest:
            asked = f"asked for {clock(seconds)}"
            return f"in {queue.name} a job of {_nodes(nodes)} may run for {clock(longest)} at most, {asked}"
        return None

    def _way_out(self, queue: Queue, nodes: int, seconds: float | None, jobs: int) -> str:
        """What would be accepted instead, as a sentence; empty if nothing would."""
        wanted = seconds or 0.0
        ways = [
            f"--queue {other.name}" + (f" (up to {clock(other.seconds(nodes) or 0.0)})" if other.limits else "")
            for other in self.queues
            if other is not queue and other.takes(nodes, wanted) and (jobs == 1 or other.chain)
        ]
        longest = queue.seconds(nodes)
        if queue.direct and longest is not None and wanted > longest:
            bins = sorted(queue.limits)
            larger = [below + 1 for (below, _), (_, time) in pairwise(bins) if time >= wanted]
            ways += [f"{larger[0]} nodes or more"] if larger else []
            ways += [f"--time {clock(longest)}, with --chain if it takes several"]
        return f" Accepted: {'; '.join(ways)}." if ways else ""

    def script(self) -> str:
        """The file without its `#:` lines."""
        lines = self.path.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("#:"))

    @cached_property
    def blanks(self) -> frozenset[str]:
        """The names that the script has a place for: as a blank or as the condition of a block."""
        conditions = re.findall(r"^#\? ([\w|]+)", self.script(), re.MULTILINE)
        return frozenset([*_BLANK.findall(self.script()), *"|".join(conditions).split("|")]) - {""}

    def render(self, blanks: Mapping[str, Blank]) -> str:
        """The script with its `@@{name}` blanks filled.

        A line with a blank of which the value is None is left out. So are the lines from `#? name|other` to `#?` where
        the values of all these are None or empty, and those from `#? name=one|two` where it is neither. In directives
        and comments a value must be harmless, elsewhere it is quoted for the shell: nothing that fills a blank can
        become a command.

        Raises: UserError for a value that cannot stand in a directive, and for a blank that has no meaning.
        """
        unknown = self.blanks - blanks.keys()
        if unknown:
            known = ", ".join(sorted(blanks))
            raise UserError(f"{self.path}: unknown blank @@{{{min(unknown)}}}; known: {known}.")
        return "".join(self._lines(blanks))

    def _lines(self, blanks: Mapping[str, Blank]) -> Iterator[str]:
        kept = True
        for line in self.script().splitlines(keepends=True):
            if line.startswith("#?"):
                block = _BLOCK.fullmatch(line)
                if block is None:
                    raise UserError(f'{self.path}: "{line.strip()}" cannot be understood; see job_templates/README.md.')
                kept = _holds(block, blanks)
            elif kept and all(blanks[name] is not None for name in _BLANK.findall(line)):
                quote = self._harmless if line.startswith("#") else _quoted
                yield _BLANK.sub(lambda found, quote=quote: quote(found[1], blanks[found[1]]), line)  # type: ignore[misc]

    def _harmless(self, name: str, value: Blank) -> str:
        if not isinstance(value, str) or not _DIRECTIVE_SAFE.fullmatch(value):
            raise UserError(
                f"{name} is {value!r}, which cannot stand in a job script's directive; use letters, digits and "
                "_./:,=+@&- only (for a path: move or link it)."
            )
        return value


def _holds(block: re.Match[str], blanks: Mapping[str, Blank]) -> bool:
    """Whether the lines after this `#?` line are wanted; those after a bare one are."""
    if block["names"] is None:
        return True
    values = [blanks[name] for name in block["names"].split("|")]
    return any(values if block["values"] is None else (value in block["values"].split("|") for value in values))


def _quoted(name: str, value: Blank) -> str:
    words = [value] if isinstance(value, str) else list(value or ())
    for word in words:
        if _CONTROL.search(word):
            raise UserError(f"{name} is {word!r}, with a line break or another control character; rename it.")
    return " ".join(map(shlex.quote, words))


def sites() -> dict[str, Path]:
    """Name -> file of every site."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}


def read(name: str) -> Site:
    """The site of that name, or of a file of one's own.

    Raises: UserError with the known names, or for facts that cannot be understood.
    """
    known = sites()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UserError(f'unknown site "{name}"; known: {", ".join(known)}, or the path of a site file of your own.')
    try:
        lines = [line[2:] for line in path.read_text().splitlines() if line.startswith("#:")]
        facts = yaml.safe_load("\n".join(line.removeprefix(" ") for line in lines)) or {}
        return Site(
            name=path.stem,
            path=path,
            title=facts["title"],
            scheduler=facts["scheduler"],
            ranks_per_node=facts.get("ranks_per_node"),
            cores_per_rank=facts.get("cores_per_rank"),
            hosts=tuple(facts.get("hosts", ())),
            queues=tuple(_queue(queue, entry) for queue, entry in facts.get("queues", {}).items()),
            options=tuple(_option(option, entry) for option, entry in facts.get("options", {}).items()),
            containers=facts.get("containers", {}),
            facts=facts,
        )
    except yaml.YAMLError as error:
        raise UserError(f"{path}: its #: lines are not YAML ({' '.join(str(error).split())}).") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: its #: lines lack or garble a fact ({error!r}); see job_templates/README.md."
        ) from None


def detect(host: str) -> Site | None:
    """The site whose login nodes have such a name; None if no site claims it."""
    for name in sites():
        site = read(name)
        if any(fnmatch.fnmatch(host, pattern) for pattern in site.hosts):
            return site
    return None


def seconds(text: str) -> float:
    """Slurm's and PBS's ways to write a duration: "30" minutes, "MM:SS", "H:MM:SS", "D-H", "D-H:MM", "D-H:MM:SS".

    Raises: UserError.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise UserError(f'"{text}" is no wall time; write hours:minutes:seconds, e.g. 2:00:00.')
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, minutes, secs = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs)


def clock(seconds: float) -> str:
    """A duration as every scheduler reads it: 2:00:00."""
    minutes, secs = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{secs:02d}"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _queue(name: str, entry: Mapping[str, Any]) -> Queue:
    limits = {int(nodes): seconds(str(text)) for nodes, text in entry.get("limits", {}).items()}
    rest = {key: value for key, value in entry.items() if key not in ("option", "limits")}
    return Queue(name, entry["option"], tuple(sorted(limits.items())), **rest)


def _option(name: str, entry: Mapping[str, Any]) -> Option:
    choices, default, most = entry.get("choices"), entry.get("default"), entry.get("max_nodes", {})
    return Option(
        name=name,
        help=entry["help"],
        kind=entry.get("kind", "word"),
        choices=choices and ({str(key): str(choices[key] if isinstance(choices, dict) else key) for key in choices}),
        default=None if default is None else str(default),
        max_nodes={str(choice): int(nodes) for choice, nodes in most.items()},
    )
