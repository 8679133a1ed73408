"""Read a hand-written job script and say what is known to be wrong with it. Nothing is executed. No torch.

script      bash as job scripts use it: commands, variables set and used
request     the scheduler's options, the steps, the machine
variables   names and values of environment variables
findings    what a rule reports
directives, environment, files, signals, steps: the rules

What it cannot see: values that only a run knows, what sourced files and modules set, options given to sbatch or qsub on
the command line. There it keeps silent, so no finding is no proof.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdyn import sites
from gdyn.errors import MissingFile, UserError
from gdyn.lint import directives, environment, files, signals, steps
from gdyn.lint.findings import Finding
from gdyn.lint.request import read_job

RULES = (*directives.RULES, *environment.RULES, *files.RULES, *signals.RULES, *steps.RULES)


def lint(text: str, site: sites.Site | None = None) -> list[Finding]:
    """Findings in the order of their lines. site: the machine the script is for; None: found out from the script."""
    job = read_job(text, site)
    found = {finding for rule in RULES for finding in rule(job)}
    return sorted(found, key=lambda finding: (finding.line, finding.severity, finding.rule, finding.what))


def lint_file(path: Path, site: sites.Site | None = None) -> list[Finding]:
    """`lint` of a file. Raises: MissingFile, UserError if it cannot be read as text."""
    try:
        return lint(path.read_text(), site)
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file; a job script was expected.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def outline(results: dict[Path, list[Finding]]) -> str:
    """A block per finding, and a last line with counts."""
    blocks = [
        f"{path}:{finding.line}: {finding.severity}: {finding.what} [{finding.rule}]\n"
        f"    cure:   {finding.cure}\n"
        f"    source: {finding.source}\n"
        for path, findings in results.items()
        for finding in findings
    ]
    return "\n".join([*blocks, summary(results)])


def summary(results: dict[Path, list[Finding]]) -> str:
    errors, warnings = (
        sum(finding.severity == severity for findings in results.values() for finding in findings)
        for severity in ("error", "warning")
    )
    return f"{_count(len(results), 'script')}: {_count(errors, 'error')}, {_count(warnings, 'warning')}"


def as_json(results: dict[Path, list[Finding]]) -> list[dict[str, Any]]:
    """A record per finding."""
    return [
        {"script": str(path), **{key: getattr(finding, key) for key in Finding.__dataclass_fields__}}
        for path, findings in results.items()
        for finding in findings
    ]


def failed(results: dict[Path, list[Finding]]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for findings in results.values() for finding in findings)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
