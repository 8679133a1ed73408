"""gdyn lint-job: what is known to be wrong with a job script, with its cure and its source. Nothing is executed."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: this folder on the path would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jsonargparse import ArgumentParser

from gdyn import rundir, sites
from gdyn.cli import guarded
from gdyn.lint import as_json, failed, lint_file, outline


def parser() -> ArgumentParser:
    result = ArgumentParser(prog="gdyn lint-job", description=__doc__, exit_on_error=False)
    result.add_argument("scripts", type=Path, nargs="+", help="job scripts: sbatch, PBS, or of plain shell")
    result.add_argument(
        "--site", help="the machine they are for (a name or a site file); else found out from the script"
    )
    result.add_argument("--json", type=Path, help="also write the findings to this file")
    return result


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 no errors (warnings may be), 1 errors were found, 2 a script cannot be read."""

    def command() -> int:
        options = parser().parse_args(argv)
        site = sites.read(options.site) if options.site else None
        results = {path: lint_file(path, site) for path in options.scripts}
        print(outline(results))
        if options.json is not None:
            rundir.write_json(options.json, as_json(results))
        return rundir.FAILED if failed(results) else rundir.DONE

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
