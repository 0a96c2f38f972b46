"""The tiny recipe, run to its end, and once more. The first test to ask for the reference store, which others wait for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.driving import TINY, slipway

pytestmark = pytest.mark.slow


def test_a_second_run_skips_every_step(reference_store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (reference_store / "artifacts").glob("*/*")}
    ended = slipway("run", TINY, "--store", reference_store)
    assert ended.returncode == 0
    assert ended.stdout.count("  skip  made ") == len(list((reference_store / "artifacts").iterdir()))
    assert {path: path.stat().st_mtime_ns for path in (reference_store / "artifacts").glob("*/*")} == before
