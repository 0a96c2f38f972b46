"""Killed and started again, each training stage in stages/alignment (reward, dpo and kto) ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.driving import assert_two_kills_change_nothing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", ["reward", "aligned", "kto"])
def test_killed_in_a_step_and_in_a_checkpoint_write_it_ends_with_the_same_weights(
    reference_store: Path, tmp_path: Path, step: str
) -> None:
    assert_two_kills_change_nothing(reference_store, tmp_path / "store", step)
