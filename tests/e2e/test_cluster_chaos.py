"""A few disturbances of jobs on a real SLURM; `python -m tests.cluster.chaos --kills 50` makes more, over the whole recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import missing
from tests.e2e.driving import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


def test_six_disturbances_need_no_repair(reference_store: Path) -> None:
    """The seed is drawn anew each time, and stands in the output."""
    command = [sys.executable, "-m", "tests.cluster.chaos", "--kills", "6", "--only", "base", "--reference"]
    ended = subprocess.run([*command, str(reference_store)], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 disturbances, " in ended.stdout.splitlines()[-2]
