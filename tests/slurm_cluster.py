"""A real Slurm on this machine: one controller and three virtual nodes, n1 to n3, on the loopback address.

As root, with Debian's slurmctld, slurmd and slurm-client (`.ci/run` installs them). Everything it writes lies in one
folder; configuration, ports and authentication are its own, so that it disturbs no other Slurm on the machine.
"""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS = 4
"""Declared per node; more than there are."""

# proctrack and task plug-ins without cgroups, which containers lack; short times so that tests are quick.
CONFIGURATION = """
ClusterName=gdyn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=0
JobRequeue=1
KillWait=20
MinJobAge=600
MaxArraySize=100
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Why no Slurm can be started here; empty if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} missing); Debian: slurmctld slurmd slurm-client"
    return "" if os.geteuid() == 0 else "starting Slurm's daemons needs root"


@dataclass
class Cluster:
    folder: Path
    names: tuple[str, ...] = ("n1", "n2", "n3")

    def start(self) -> "Cluster":
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.names))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4000"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=ports[0], folder=self.folder, nodes=nodes)
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.run("slurmctld")
        for name in self.names:
            self.run("slurmd", "-N", name)
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.names), 30)
        return self

    def stop(self) -> None:
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", job)
        self.wait(lambda: not self.run("squeue", "-h", "-o", "%A").split(), 60)
        for pid in self.folder.glob("*.pid"):
            subprocess.run(["kill", pid.read_text().strip()])

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, check: bool = True, **variables: str) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | self.environment | variables,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def node_up(self, name: str) -> None:
        self.run("scontrol", "update", f"nodename={name}", "state=resume")

    def node_down(self, name: str) -> None:
        """As the controller does with a node that does not answer: its tasks are killed."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=a test")

    def ended(self, job: str) -> bool:
        states = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).split()
        return not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & set(states)

    @staticmethod
    def wait(condition, seconds: float, pause: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(pause)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
