"""Settings and data that all tests share."""

from __future__ import annotations

import os
import tempfile
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that lies beside the checkout in `shared/data`; its README says what it is."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}: it lies beside the checkout where the project is developed")
    return folder
