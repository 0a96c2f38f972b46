"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, in a folder of its own and on free ports.

    with Slurm(folder) as slurm:
        subprocess.run(["sinfo"], env=slurm.environment)

wants root, and Debian's `slurm-wlm` and `munge`. `python -m tests.cluster.slurm FOLDER` starts one, prints what to export, and
ends it at Ctrl-C. Nothing of an installed SLURM is read or changed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.processes import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES = ("n1", "n2")
START_SECONDS = 60.0

CONFIGURATION = """\
ClusterName=slipway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,defer_batch=0,bf_interval=1
PriorityType=priority/basic
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
MinJobAge=600
KillWait=20
SlurmctldTimeout=20
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
Waittime=0
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory={memory} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
PartitionName=short Nodes=n1,n2 MaxTime=10 State=UP OverSubscribe=EXCLUSIVE
"""


def missing() -> str:
    """Why there can be none on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "a SLURM of one's own wants root"
    lacking = [name for name in PROGRAMS if program(name) is None]
    return f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, munge)" if lacking else ""


def program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Slurm:
    """The cluster in `folder`, running inside `with`."""

    folder: Path
    slurmd_timeout: int = 30
    """Seconds after which a node that does not answer is down, and its jobs are requeued."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What clients of this cluster need."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir(exist_ok=True)
        memory_megabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // 2
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            ports=free_ports(3),
            folder=self.folder,
            memory=memory_megabytes,
            slurmd_timeout=self.slurmd_timeout,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        try:
            self.start("munged", *self.munge_options())
            self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
            self.start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: set(self.states().values()) == {"idle"}, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.processes:
            self.ask("scancel", "--state=PENDING,RUNNING,SUSPENDED", "--signal=KILL", "--full")
            self.ask("scancel", "--state=PENDING,RUNNING,SUSPENDED")
        for name in [*NODES, "slurmctld", "munged"]:
            self.end(name)

    def munge_options(self) -> list[str]:
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        return ["--foreground", "--force", f"--seed-file={self.folder / 'munge.seed'}"] + [
            f"--{option}={self.folder / name}" for option, name in names.items()
        ]

    def start(self, name: str, *arguments: str, called: str = "") -> None:
        path = program(name)
        assert path is not None, missing()
        with (self.folder / f"{called or name}.out").open("ab") as output:
            self.processes[called or name] = subprocess.Popen(
                [path, *arguments], stdout=output, stderr=output, env=self.environment, start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self.start("slurmd", "-D", "-c", "-N", node, called=node)

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """Ends a daemon: a node by its name, slurmctld or munged."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def ask(self, *command: str) -> str:
        """What a SLURM command prints; its complaint if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else done.stderr

    def log(self, lines: int = 40) -> str:
        """What slurmctld said last."""
        return tail(self.folder / "slurmctld.log", lines)

    def states(self) -> dict[str, str]:
        lines = self.ask("sinfo", "--Node", "--noheader", "--partition=main", "--format=%N %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines if len(line.split()) == 2}

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    tail(path) for path in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
                )
                raise TimeoutError(f"{what} did not come up in {seconds:.0f} s\n{logs}")
            time.sleep(0.1)


def tail(path: Path, lines: int = 15) -> str:
    return f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main(arguments: Sequence[str]) -> int:
    if (why := missing()) or len(arguments) != 1:
        print(why or "usage: python -m tests.cluster.slurm FOLDER", file=sys.stderr)
        return 2
    with Slurm(Path(arguments[0]).absolute()) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
