"""A few kills at random moments; `python -m tests.e2e.chaos --kills 60` makes more, over the whole recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.driving import ROOT

pytestmark = pytest.mark.slow


def test_five_kills_leave_no_process_and_need_no_repair(reference_store: Path) -> None:
    """The seed is drawn anew each time, and stands in the output."""
    command = [sys.executable, "-m", "tests.e2e.chaos", "--kills", "5", "--only", "base", "--reference"]
    ended = subprocess.run([*command, str(reference_store)], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "5 kills, " in ended.stdout.splitlines()[-2]
