"""A real sshd on this machine's loopback, under as many names as a hostfile has nodes: in a folder and on a port of its own.

    with Ssh(folder, ("node1", "node2")) as ssh:
        subprocess.run(["ssh", "node1", "hostname"], env=ssh.environment)

wants root, and Debian's `openssh-server` and `pdsh`. The names are known where `environment` is given; nothing of the user's
own ssh is read or changed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.slurm import free_ports, program

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
START_SECONDS = 30.0
SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/sshd.pid
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
"""
SSH = """\
Host {names}
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str:
    """Why there can be none on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "an sshd of one's own wants root"
    if lacking := [name for name in PROGRAMS if program(name) is None]:
        return f"not installed: {', '.join(lacking)} (Debian: openssh-server, pdsh)"
    # Where its nodes meet, deepspeed asks the first one by this command.
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    return "" if addresses.split() else "this machine has no address but loopback's"


@dataclass
class Ssh:
    """The server, running inside `with`."""

    folder: Path
    names: Sequence[str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def environment(self) -> dict[str, str]:
        """In it, `ssh` knows the names."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def __enter__(self) -> Ssh:
        (self.folder / "bin").mkdir(parents=True)
        (port,) = free_ports(1)
        values = {"folder": self.folder, "port": port, "names": " ".join(self.names)}
        for name, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
            (self.folder / name).write_text(text.format(**values))
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f"#!/bin/sh\nexec {shutil.which('ssh')} -F '{self.folder / 'ssh_config'}' \"$@\"\n")
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks up what it has not let in yet
        sshd = program("sshd")
        assert sshd is not None, missing()
        self.process = subprocess.Popen([sshd, "-D", "-f", self.folder / "sshd_config", "-E", self.folder / "log"])
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    return self
            time.sleep(0.1)
        self.__exit__()
        raise TimeoutError(f"sshd did not come up: {(self.folder / 'log').read_text()}")

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
