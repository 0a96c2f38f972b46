"""Killed and started again, each stage that trains on its own completions (ppo, grpo and rloo) ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.driving import assert_two_kills_change_nothing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", ["ppo", "grpo", "rloo"])
def test_killed_in_a_step_and_in_a_checkpoint_write_it_ends_with_the_same_weights(
    reference_store: Path, tmp_path: Path, step: str
) -> None:
    assert_two_kills_change_nothing(reference_store, tmp_path / "store", step)
