"""A disk of a few hundred kilobytes, really full, for tests of what happens then."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOUNT = 'mount -t tmpfs -o size="$1" none "$0" && shift && exec "$@"'


@functools.cache
def can_mount() -> bool:
    """Whether this user may mount a disk that no other process sees."""
    try:
        command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0"', "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_a_disk_of_its_own = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root and unshare")


def on_a_disk_of(size: str, folder: Path, code: str) -> str:
    """What `code` prints, run with the working folder on an empty disk of this size that is mounted at `folder`."""
    folder.mkdir(exist_ok=True)
    program = f"import os; os.chdir({str(folder)!r})\n{textwrap.dedent(code)}"
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", MOUNT, str(folder), size, sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
