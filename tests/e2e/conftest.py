"""One run of the tiny recipe, shared by all tests of the session, in whichever process they run."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.e2e.driving import TINY, slipway


@pytest.fixture(scope="session")
def reference_store(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A store in which every step of tests/e2e/tiny.yaml has run to its end without interruption."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    store = shared / "reference-store"
    with FileLock(shared / "reference-store.lock"):
        ended = slipway("run", TINY, "--store", store, timeout=1800)
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-3000:]
    return store
