"""`slipway inspect` from outside: what it prints is a recipe, and what that makes can be inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.driving import manifest_of, slipway

pytestmark = pytest.mark.slow


def test_what_is_proposed_runs_and_what_ran_is_inspected(tmp_path: Path) -> None:
    """Six rows: one twice, one without an answer."""
    data, store = tmp_path / "answers.csv", tmp_path / "store"
    lines = [f"Where is house {number}?;Beside house {number + 1}." for number in (1, 2, 3, 4, 4)]
    data.write_text("\n".join(["question;answer", *lines, "Where is house 9?;", ""]))
    said = slipway("inspect", data, "--store", store)
    assert said.returncode == 0, said.stderr
    assert "all rows: 6 read = 4 kept + 2 dropped" in said.stdout
    block = said.stdout.partition("\nstages:")[2].partition("\n\n")[0]
    # One of six rows is broken, and more than 5 % are not what a source of good data has: the output says so.
    assert "`clean` would stop" in said.stdout
    block += "\n        max_broken_fraction: 0.2"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: pasted\noutputs: [answers_rows]\nstages:{block}\n")
    ran = slipway("run", recipe, "--store", store)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    metrics = manifest_of(store, "answers_rows").metrics
    assert (metrics["rows_read"], metrics["rows_kept"]) == (6, 4)
    seen = slipway("inspect", "answers_rows", "--store", store, "--json")
    report = json.loads(seen.stdout)
    assert (report["rows"]["read"], report["rows"]["kept"], report["files"][0]["looked_at"]) == (6, 4, 4)
