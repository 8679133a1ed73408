"""Processes below one: found however deep, told only if they listen, ended whatever they do."""

import signal
import subprocess
import sys

import psutil
import pytest

from gdyn import processes
from tests.harness import REPOSITORY

FAMILY = """
import os, sys, time
for generation in range(3):
    if os.fork():
        break
print(generation, flush=True)
time.sleep(60)
"""

LISTENER = """
import signal, sys, time
{prepare}
print("up", flush=True)
while True:
    time.sleep(60)
"""
HEARS = "signal.signal(signal.SIGUSR2, lambda *_: (print('told', flush=True), sys.exit(0)))"
DEAF = "pass"


@pytest.fixture
def start():
    """start(code): a process, once it has said a line; it and everything below are ended after the test."""
    started = []

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, "-S", "-c", code]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        started[-1].stdout.readline()
        return started[-1]

    yield start
    for process in started:
        for below in processes.descendants(process.pid):
            psutil.Process(below).kill()
        process.kill()
        process.communicate()


def test_descendants_are_found_as_by_an_independent_look(start):
    root = start(FAMILY)
    root.stdout.readline(), root.stdout.readline()
    expected = [child.pid for child in psutil.Process(root.pid).children(recursive=True)]
    assert len(expected) == 3
    assert sorted(processes.descendants(root.pid)) == sorted(expected)


def test_a_stop_is_passed_on_to_whoever_listens_and_the_others_live(start):
    listener, deaf = start(LISTENER.format(prepare=HEARS)), start(LISTENER.format(prepare=DEAF))
    for process in (listener, deaf):
        processes.pass_on(process.pid)
    assert listener.stdout.readline() == "told\n" and listener.wait(30) == 0
    assert deaf.poll() is None


def test_a_process_that_blocks_the_signal_to_wait_for_it_in_a_thread_listens_too(start):
    """As srun does."""
    block = "import threading; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}); "
    wait = "threading.Thread(target=lambda: print('told', signal.sigwait({signal.SIGUSR2}), flush=True)).start()"
    process = start(LISTENER.format(prepare=block + wait))
    processes.pass_on(process.pid)
    assert process.stdout.readline().startswith("told")


def test_who_has_gone_does_not_listen():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    assert not processes._listens(process.pid, signal.SIGUSR2)
    processes.pass_on(process.pid)


@pytest.mark.parametrize(
    ("prepare", "code"), [(DEAF, -signal.SIGTERM), ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", -signal.SIGKILL)]
)
def test_a_process_is_ended_gently_and_otherwise_by_force(start, monkeypatch, prepare, code):
    monkeypatch.setattr(processes, "TERM_PATIENCE", 0.3 if code == -signal.SIGKILL else 30)
    process = start(LISTENER.format(prepare=prepare))
    processes.end(process)
    assert process.returncode == code
    processes.end(process)  # which is nothing to a process that has ended


ADOPTING = """
import os, subprocess, sys, time
from gdyn import processes

processes.LEFTOVER_PATIENCE = 0.5
with processes.children_stay():
    # A parent that leaves a child behind, which ends by itself, and one that does not.
    for seconds in ("0.1", "60"):
        subprocess.run(["/bin/sh", "-c", f"setsid sleep {seconds} & exit"])
    print(len(processes.descendants(os.getpid())))
    processes.end_descendants()
print(len(processes.descendants(os.getpid())))
"""


def test_what_a_launcher_leaves_behind_is_adopted_waited_for_and_ended():
    done = subprocess.run([sys.executable, "-S", "-c", ADOPTING], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "0"], done.stderr
