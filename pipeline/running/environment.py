"""The environment that a job's processes run in: quiet, offline, on the right device, with so many threads."""

from __future__ import annotations

import os
import sys

from pipeline.recipe.recipe import HUB
from pipeline.store.job import Job

HASH_SEED = "PYTHONHASHSEED"


def environment_for(job: Job, *, distributed: bool) -> dict[str, str]:
    """Variables that Python and libraries read when they start.

    Whoever starts the job's processes sets them; the worker sets them again, for processes that were started by hand.
    """
    threads = str(job.resources.threads_per_process)
    settings = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # A stage that runs in one process tokenizes with all its cores; ranks have one each, and fork after tokenizing.
        "TOKENIZERS_PARALLELISM": "false" if distributed else "true",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        HASH_SEED: "0",
        "DS_ACCELERATOR": "cpu" if job.resources.uses_cpu else "cuda",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
    }
    if not uses_hub(job):
        settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if job.resources.device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    return settings


def start_again_with_fixed_hashes() -> None:
    """Starts this program anew, in the same process, unless the hashes of strings are the same in every run already.

    Python reads `PYTHONHASHSEED` before its first line; for a command that was pasted into a shell nobody has set it.
    """
    if os.environ.get(HASH_SEED) != "0":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, HASH_SEED: "0"})


def uses_hub(job: Job) -> bool:
    """Whether the recipe names a hub source: only then is the network used."""
    source = job.params.get("source")
    is_hub_source = isinstance(source, dict) and source.get("kind") == "hub"
    return is_hub_source or any(place.startswith(HUB) for place in job.inputs.values())
