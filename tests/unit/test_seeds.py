"""Seeds of any size reach every library, and those that fitted before are used as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.recipe.reader import load_recipe
from pipeline.store.job import read_job
from stages.lib.formulas.seeds import NUMPY_BITS, TORCH_BITS, bounded_seed
from tests.unit.fake_stages import LAUNCHERS, STAGES
from tests.unit.test_launchers import job


@pytest.mark.parametrize("bits", [NUMPY_BITS, TORCH_BITS])
def test_a_seed_that_fits_is_used_as_it_is(bits: int) -> None:
    for seed in (0, 42, 2**31, 2**bits - 1):
        assert bounded_seed(seed, bits) == seed


def test_a_seed_that_does_not_fit_is_hashed() -> None:
    """The first four and the first eight bytes of the SHA-256 of its digits, read as a number."""
    digest = hashlib.sha256(b"1000000000000000000000000000000").hexdigest()
    assert bounded_seed(10**30, NUMPY_BITS) == int(digest[:8], 16)
    assert bounded_seed(10**30, TORCH_BITS) == int(digest[:16], 16)
    assert len({bounded_seed(2**64 + offset, NUMPY_BITS) for offset in range(100)}) == 100


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**64 - 1, 2**64, 10**30, 10**600])
def test_libraries_take_it(seed: int) -> None:
    import numpy as np
    import torch
    from transformers import set_seed

    from stages.lib.training.scheduling import ScheduledData

    set_seed(bounded_seed(seed, NUMPY_BITS))
    torch.manual_seed(bounded_seed(seed, TORCH_BITS))
    torch.Generator().manual_seed(bounded_seed(seed, TORCH_BITS))
    schedule = ScheduledData([{"row": index} for index in range(5)], seed, 10)
    assert sorted(schedule.index(position) for position in range(5)) == list(range(5))
    assert np.random.Generator(np.random.PCG64([seed, 3])).random() < 1


def test_it_goes_through_the_recipe_and_the_job(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: demo\nseed: {10**30}\noutputs: [first]\nstages: {{first: {{kind: write}}}}\n")
    assert load_recipe(recipe, STAGES, LAUNCHERS).steps[0].seed == 10**30
    written = job(tmp_path).model_copy(update={"seed": 10**30})
    written.write()
    assert read_job(tmp_path).seed == 10**30
