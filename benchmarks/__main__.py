"""python -m benchmarks [NAME ...] [--rounds N] [--record]: measure the performance claims; exit code 1 if one fails."""

from __future__ import annotations

import importlib
import subprocess
import sys

from jsonargparse import ArgumentParser

from benchmarks import measure

NAMES = ("loader", "vamp_loss", "gdynet", "monodecoder", "egnn", "diffusion", "overhead", "startup", "scale")


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"Which to run, of {', '.join(NAMES)}; all if none is given.")
    parser.add_argument("--rounds", type=int, default=5, help="Times each arm is measured.")
    parser.add_argument("--record", action="store_true", help="Append a line to benchmarks/results.jsonl.")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}.")
    if len(options.names) != 1:
        # A process each: what one does to the allocator or to floating point must not reach the next.
        words = [f"--rounds={options.rounds}", *(["--record"] if options.record else [])]
        commands = [[sys.executable, "-m", "benchmarks", name, *words] for name in options.names or NAMES]
        return max(subprocess.run(command).returncode for command in commands)
    measure.pin()
    name = options.names[0]
    findings = importlib.import_module(f"benchmarks.{name}").run(options.rounds)
    return 0 if measure.show(name, findings, options.rounds, options.record) else 1


if __name__ == "__main__":
    sys.exit(main())
