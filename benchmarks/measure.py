"""How everything here is measured: one pinned core, one thread, process CPU time, arms interleaved A B A B in one
process (so with one allocator and one load on the machine), and the ratio of every round, not that of two averages."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

TOLERANCE = 0.2
"""A value whose rounds differ from their median by more than this share is not a result."""
RESULTS = Path(__file__).with_name("results.jsonl")

Rounds = list[float]


@dataclass(frozen=True)
class Finding:
    """One line of the table: the median over the rounds, with the smallest and the largest."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    floor: float | None = None
    """The median must be no less."""
    ceiling: float | None = None
    """The median must be no more."""
    detail: str = ""

    @property
    def verdict(self) -> str:
        """Empty if nothing is claimed."""
        if self.floor is None and self.ceiling is None:
            return ""
        if max(self.high - self.median, self.median - self.low) > TOLERANCE * self.median:
            return "NOISY"
        low_enough = self.ceiling is None or self.median <= self.ceiling
        high_enough = self.floor is None or self.median >= self.floor
        return "ok" if low_enough and high_enough else "MISSED"


def finding(
    name: str, rounds: Rounds, unit: str, floor: float | None = None, ceiling: float | None = None, detail: str = ""
) -> Finding:
    return Finding(name, statistics.median(rounds), min(rounds), max(rounds), unit, floor, ceiling, detail)


def pin() -> None:
    """This process to one core and one thread."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Rounds]:
    """CPU seconds of each arm in each round, after one round that does not count."""
    seconds: dict[str, Rounds] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            seconds[name].append(cpu_seconds(arm))
    return {name: values[1:] for name, values in seconds.items()}


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def ratios(numerator: Rounds, denominator: Rounds) -> Rounds:
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def machine() -> dict[str, object]:
    """What the numbers depend on, with the fp32 matrix product's speed at this moment."""
    square = torch.rand(1024, 1024)
    best = min(cpu_seconds(lambda: square @ square) for _ in range(12))
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gemm_gflops": round(2 * 1024**3 / best / 1e9, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def show(benchmark: str, findings: list[Finding], rounds: int, record: bool) -> bool:
    """Print the table, append it to results.jsonl if asked; whether every claim holds."""
    facts = machine()
    print(f"\n{benchmark}: {rounds} rounds on 1 of {facts['cores']} cores, {facts['cpu']}, torch {facts['torch']},")
    print(f"load {facts['load']}, fp32 matrix product {facts['gemm_gflops']} GFLOP/s.")
    print(f"{'':<46}{'median':>10}{'min':>10}{'max':>10}  {'unit':<18}{'claim':<12}")
    for f in findings:
        bounds = [(">=", f.floor), ("<=", f.ceiling)]
        claim = " ".join(f"{sign} {bound:,g}" for sign, bound in bounds if bound is not None)
        values = (f.median, f.low, f.high)
        numbers = "".join(f"{value:>10.4g}" if value < 1e4 else f"{value:>10,.0f}" for value in values)
        print(f"{f.name:<46}{numbers}  {f.unit:<18}{claim:<12}{f.verdict:<8}{f.detail}")
    if record:
        line = {"benchmark": benchmark, "time": time.strftime("%Y-%m-%d %H:%M"), "rounds": rounds, "machine": facts}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line | {"findings": [asdict(f) for f in findings]}) + "\n")
    return all(f.verdict in ("", "ok") for f in findings)
