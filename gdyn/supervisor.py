"""Supervisor: what a job script turns into. It starts the ranks, passes signals on, and decides what follows their end.

    attempt ends ->  done        end the chain of successors, 0
                     stopped     requeue this job, or let the next of the chain go on, 75
                     user error  end the chain, 2; unless preflight blames nodes that can be done without
                     anything    start again from the last whole checkpoint, without nodes that are down or have
                     else        failed twice, unless it failed before in the very same way, or too often

The verdict comes from the files the ranks write, never from a launcher's exit code alone: launchers lose it (srun -K
says 143, deepspeed --launcher mpich says 0). Standard library only: it shares the batch node with whatever runs there.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdyn import attempts, failures, processes, rundir
from gdyn.attempts import Attempt
from gdyn.errors import UserError
from gdyn.rundir import DONE, FAILED, HUNG, RUNNING, STATES, STOPPED, USER_ERROR, RunDir
from gdyn.schedulers import Scheduler
from gdyn.signals import STOP_SIGNALS

log = logging.getLogger("gdyn")

POLL = 0.5
"""Seconds between two looks at the ranks."""
REPEAT = 5.0
"""Seconds between two requests to stop: a launcher may have missed the first."""
TOO_LATE = 60.0
"""Seconds before the end of the job from which on a failed attempt is left to the successor."""


@dataclass(frozen=True)
class Order:
    """What the job script asks for."""

    run_dir: RunDir
    nodes: int
    """On how many to run; the job's others are spares."""
    ranks_per_node: int
    command: tuple[str, ...]
    """Starts the ranks. `{nodes}`, `{ranks}` and `{hosts}` (a file, one host a line) are filled for each attempt."""
    max_restarts: int = 3
    requeue: bool = False
    """Hand a stopped run over by putting this very job back into the queue."""
    start_timeout: float = 1800.0
    """Seconds from the start of the ranks to their first heartbeat."""


class Supervisor:
    """The attempts of one job. Raises: UserError if the job has fewer nodes than the run asks for."""

    def __init__(self, order: Order, scheduler: Scheduler, environ: Mapping[str, str]):
        self.order, self.scheduler = order, scheduler
        self.environ = environ
        self.run_dir = order.run_dir
        self.job = scheduler.job_id(environ) or f"pid{os.getpid()}"
        self.hosts = scheduler.node_names(environ)
        """The job's nodes, without those it does without by now."""
        if len(self.hosts) < order.nodes:
            raise UserError(
                f"the job has {len(self.hosts)} nodes, the run asks for {order.nodes} (--nodes); make the two agree."
            )
        self.end = scheduler.end_time(environ)
        self.attempts: list[Attempt] = []
        self.told = ""
        """The signal that asked this job to stop, if one did."""
        self.micro_batches: int | None = None
        """Of a window, on all ranks together; known once the world gets smaller."""

    def run(self) -> int:
        """The exit code of the job. Raises: UserError; KeyboardInterrupt, all ranks gone, at a second Ctrl-C."""
        before = attempts.earlier_verdict(self.run_dir, self.job)
        if before is not None:
            log.info("nothing to do: job %s has ended the run (%s).", before.job, before.final)
            return before.exit_code
        self.run_dir.create()
        with processes.children_stay(), self._signals():
            while True:
                attempt = self._attempt(self.hosts[: self.order.nodes])
                self.attempts.append(attempt)
                log.info("attempt %d ended: %s (%s).", len(self.attempts), STATES[attempt.code], attempt.reason)
                code = self._decide(attempt)
                if code is not None:
                    return code

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _decide(self, attempt: Attempt) -> int | None:
        """The exit code of the job, or None: start again."""
        why = self._final(attempt)
        attempts.remember(self.run_dir, replace(attempt, final=why))
        if why:
            if attempt.code != DONE:
                log.error("not started again: %s.", why)
            self._end_chain(why)
            return attempt.exit_code
        if attempt.code == STOPPED or self.told or self._late():
            self._hand_over()
            return STOPPED
        self._exclude(attempt)
        return None

    def _final(self, attempt: Attempt) -> str:
        """Why no other attempt is to follow; empty: one may."""
        if attempt.code == DONE:
            return "the run is finished"
        if attempt.code == STOPPED:
            return self._got_nowhere(attempt)
        if attempt.code == USER_ERROR and not self._can_do_without(self._known(attempt.blamed)):
            return "the user has to mend it"
        if attempt.code != USER_ERROR and self._again(attempt):
            return f"it failed twice in the same way ({attempt.signature}), so it would again"
        if len(self.attempts) > self.order.max_restarts:
            return f"{self.order.max_restarts} restarts were allowed (--max_restarts)"
        return ""

    def _got_nowhere(self, attempt: Attempt) -> str:
        last = attempts.read_all(self.run_dir)[-1:]
        if [(a.code, a.checkpoint) for a in last] == [(STOPPED, attempt.checkpoint)]:
            return "two starts in a row have not got one step further: the wall time is too short for this run"
        return ""

    def _again(self, attempt: Attempt) -> bool:
        """Whether it failed as it did before, and no spare could show that it is the node's fault."""
        last = [a for a in attempts.read_all(self.run_dir) if a.code in (FAILED, HUNG)][-1:]
        spare = len(self.hosts) > self.order.nodes and self._known([attempt.node])
        return any(a.signature == attempt.signature and not (spare and a.node == attempt.node) for a in last)

    def _exclude(self, attempt: Attempt) -> None:
        """Do without nodes that preflight blames, that are down, or where two attempts have failed: spares step in; if
        none are left, the world gets smaller."""
        failed = Counter(entry.node for entry in self.attempts)
        twice = [node for node, times in failed.items() if times > 1]
        for names in (attempt.blamed, self.scheduler.nodes_down(self.hosts, self.job) or (), twice):
            bad = self._known(names)
            if self._can_do_without(bad):
                self.hosts = [host for host in self.hosts if host not in bad]
                log.warning("going on without %s.", ", ".join(sorted(bad)))
        if len(self.hosts) < self.order.nodes:
            log.warning("%d of %d nodes are left: the world gets smaller.", len(self.hosts), self.order.nodes)

    def _known(self, names: Iterable[str]) -> set[str]:
        """Those of the hosts that have one of the names, with or without their domain: PBS and host files may say it,
        ranks may not."""
        short = {name.partition(".")[0] for name in names if name}
        return {host for host in self.hosts if host.partition(".")[0] in short}

    def _can_do_without(self, hosts: set[str]) -> bool:
        return 0 < len(hosts) < len(self.hosts)

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _attempt(self, hosts: list[str]) -> Attempt:
        run_dir, began = self.run_dir, time.time()
        earlier = attempts.modified(run_dir.preflight_json)
        log.info("attempt %d: ranks: %d, nodes: %d.", len(self.attempts) + 1, self._ranks(hosts), len(hosts))
        code, reason = self._verdict(*self._run(hosts))
        failure = failures.read(run_dir) if code in (FAILED, HUNG) else None
        if failure is not None:
            code, reason = HUNG if failure.kind == "hang" else code, str(failure)
        run_dir.write_status(code, reason)  # a verdict, too, where no rank could write one
        return Attempt(
            job=self.job,
            nodes=hosts,
            began=began,
            ended=time.time(),
            code=code,
            reason=reason,
            signature=failure.signature if failure else reason,
            blamed=attempts.blamed(run_dir, earlier),
            node=failure.node if failure else "",
            checkpoint=attempts.newest_checkpoint(run_dir),
        )

    def _run(self, hosts: list[str]) -> tuple[int, str]:
        """Start the ranks and wait until all have gone: the launcher's exit code, and why it was ended, if it was."""
        self._prepare(hosts)
        launcher = self._start(hosts)
        try:
            problem = self._watch(launcher)
        finally:  # whatever happens here, no rank goes on without a supervisor
            processes.end(launcher)
            processes.end_descendants()
        return launcher.returncode, problem

    def _prepare(self, hosts: list[str]) -> None:
        """Nothing that an attempt leaves must be taken for the next one's."""
        self.run_dir.job.mkdir(exist_ok=True)
        rundir.write_text(self._hosts_file, "".join(f"{host}\n" for host in hosts))
        self.run_dir.heartbeat_json.unlink(missing_ok=True)
        self.run_dir.failure_json.unlink(missing_ok=True)
        self.run_dir.write_status(None, "starting")

    def _start(self, hosts: list[str]) -> subprocess.Popen[bytes]:
        """In a session of its own: a Ctrl-C at the terminal is ours to pass on, not the launcher's to die of."""
        command = self._command(hosts)
        try:
            return subprocess.Popen(command, env=self._environment(hosts), start_new_session=True)
        except OSError as error:
            problem = f"{command[0]}, which is to start the ranks, cannot be started ({error.strerror})."
            self.run_dir.write_status(USER_ERROR, problem)
            raise UserError(problem) from None

    @property
    def _hosts_file(self) -> Path:
        return self.run_dir.job / f"hosts.{self.job}"

    def _ranks(self, hosts: Sequence[str]) -> int:
        return len(hosts) * self.order.ranks_per_node

    def _environment(self, hosts: Sequence[str]) -> dict[str, str]:
        """The ranks': with rank 0's address, where the name of its node, from which they would take it, is unknown."""
        address = None
        if "MASTER_ADDR" not in self.environ and not _resolves(hosts[0]):
            address = self.scheduler.address(hosts[0])
        return {**self.environ, **({"MASTER_ADDR": address} if address else {})}

    def _command(self, hosts: Sequence[str]) -> list[str]:
        blanks = {"{nodes}": str(len(hosts)), "{ranks}": str(self._ranks(hosts)), "{hosts}": str(self._hosts_file)}
        words = []
        for word in self.order.command:
            for blank, value in blanks.items():
                word = word.replace(blank, value)
            words.append(word)
        return words + (self._same_global_batch(self._ranks(hosts)) if len(hosts) < self.order.nodes else [])

    def _same_global_batch(self, ranks: int) -> list[str]:
        """The option that keeps the global batch on fewer ranks, where the DeepSpeed JSON leaves accumulation open."""
        if self.micro_batches is None:  # once: later starts are smaller ones
            self.micro_batches = attempts.micro_batches(self.run_dir)
        asked = attempts.read(self.run_dir.job / "deepspeed.json").get("gradient_accumulation_steps", "auto")
        if asked != "auto" or self.micro_batches is None or self.micro_batches % ranks:
            log.warning("the global batch changes with the number of ranks.")
            return []
        return [f"--optimization.gradient_accumulation_steps={self.micro_batches // ranks}"]

    def _watch(self, launcher: subprocess.Popen[bytes]) -> str:
        """Wait for the launcher, passing a stop on to the ranks. Returns why it has to be ended, if it has to."""
        signs, passed_on = attempts.Signs(self.run_dir), 0.0
        while not _ends(launcher, POLL):
            signs.look()
            problem = signs.problem(self.order.start_timeout)
            if problem:
                log.error("%s: ending the attempt.", problem)
                return problem
            # Not before the first heartbeat: all ranks have met then, so all have handlers.
            if self.told and signs.beat and signs.state == RUNNING and time.monotonic() > passed_on + REPEAT:
                if not passed_on:
                    log.info("%s received: asking the ranks to stop.", self.told)
                passed_on = time.monotonic()
                processes.pass_on(launcher.pid)
        return ""

    def _verdict(self, launcher_code: int, problem: str) -> tuple[int, str]:
        """(exit code, reason), from the run's own status file where it was written."""
        status = rundir.read_json(self.run_dir.status_json)
        if status["state"] != RUNNING:
            return int(status["exit_code"]), str(status["reason"])
        if problem:
            return HUNG, problem
        if status["reason"] == "starting" and launcher_code == USER_ERROR:
            return USER_ERROR, "the ranks could not start; see their message above"
        if launcher_code == HUNG:
            return HUNG, "no progress"
        said = f"says {launcher_code}" if launcher_code >= 0 else f"died of {signal.Signals(-launcher_code).name}"
        return FAILED, f"the ranks ended without a verdict, the launcher {said}; {attempts.last_heard(self.run_dir)}"

    # -- handing over -------------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """To this very job, put back into the queue, or the next of the chain; or to a person."""
        # TERM well before the end is somebody's scancel, or a preemption after which the scheduler itself requeues.
        if self.order.requeue and (self.told != "SIGTERM" or self._late()):
            log.info("putting job %s back into the queue.", self.job)
            self.scheduler.requeue(self.job)
            time.sleep(60)  # the scheduler ends this process

    def _late(self) -> bool:
        return self.end is not None and time.time() > self.end - TOO_LATE

    def _end_chain(self, why: str) -> None:
        """Cancel the jobs of the chain that were to follow this one."""
        successors = attempts.successors(self.run_dir, self.job)
        if successors:
            log.info("cancelling %s: %s.", ", ".join(successors), why)
            try:
                self.scheduler.cancel(successors)
            except UserError as error:  # they end by themselves, at their start
                log.warning("%s", error)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.told == "SIGINT":  # for those who do not want to wait for a checkpoint
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # ending the ranks takes a moment
                raise KeyboardInterrupt
            self.told = signal.Signals(number).name

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _ends(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
        return True
    except subprocess.TimeoutExpired:
        return False
