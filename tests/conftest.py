"""Settings and data that all tests share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Libraries read these when they are imported, here and in the processes that tests start. No test needs a network or a GPU
# unless it says so itself; one thread per process keeps two workers on two cores, and results the same.
SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "SLIPWAY_CACHE": str(Path(tempfile.gettempdir(), "slipway-tests")),
}
os.environ.update(SETTINGS)
os.environ.pop("SLIPWAY_STORE", None)

END_TO_END_LONGEST_FIRST = (
    "test_commands",
    "test_kill_language_model",
    "test_kill_alignment",
    "test_kill_encoder",
    "test_real_data",
    "test_damaged_checkpoint",
    "test_kill_compression",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts first what fails fast, then orders the files such that two workers end at the same time (`--dist loadfile`).

    One worker makes the run of the tiny recipe that the tests in e2e/ share while the other goes on with other files.
    """
    items.sort(key=place)


def place(item: pytest.Item) -> tuple[int, int]:
    if item.get_closest_marker("slow") is None:
        return 0, 0
    if item.path.parent.name != "e2e":
        return 2, 0
    if item.path.stem == "test_whole_run":
        return 1, 0
    known = item.path.stem in END_TO_END_LONGEST_FIRST
    return 3, END_TO_END_LONGEST_FIRST.index(item.path.stem) if known else -1


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that lies beside the checkout in `shared/data`; its README says what it is."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}: it lies beside the checkout where the project is developed")
    return folder


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """What runs a stage within the tests' own process has the smallest numbers made zero there; later tests count on them."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
