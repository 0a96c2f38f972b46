"""How many threads a process gets: from the cores that it may use, not from those of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.running.environment import environment_for
from pipeline.settings.resources import Resources, granted_cores, usable_cores
from pipeline.settings.strict import CHECKOUT
from tests.unit.test_launchers import job


def test_a_process_bound_to_one_core_gets_one_thread() -> None:
    """Whatever the machine has; asked in a process of its own, which is bound to the first core that we may use."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}]); from pipeline.settings.resources import *; print(Resources().threads_per_process)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"


@pytest.mark.parametrize(("processes", "expected"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, processes: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr("pipeline.settings.resources.granted_cores", list)
    assert Resources(processes=processes).threads_per_process == expected
    assert Resources(processes=processes, threads=5).threads_per_process == 5
    monkeypatch.setattr("pipeline.settings.resources.granted_cores", lambda: [8.0, 1.5])
    assert usable_cores() == 2


def test_the_limits_of_all_control_groups_above_count(tmp_path: Path) -> None:
    """Version 2: `max` is none, half a period is half a core. Version 1 has two files, and -1 for none."""
    groups = tmp_path / "groups"
    (groups / "jobs" / "mine").mkdir(parents=True)
    (groups / "jobs" / "cpu.max").write_text("150000 100000\n")
    (groups / "jobs" / "mine" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cgroup").write_text("0::/jobs/mine\n")
    assert granted_cores(groups, tmp_path / "cgroup") == [1.5]
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup").write_text("3:cpuset:/\n2:cpu,cpuacct:/\n")
    assert granted_cores(groups, tmp_path / "cgroup") == [0.5]
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert granted_cores(groups, tmp_path / "cgroup") == []
    assert granted_cores(groups, tmp_path / "nowhere") == []


def test_tokenizers_use_the_threads_where_a_stage_runs_in_one_process() -> None:
    alone = environment_for(job(threads=3), distributed=False)
    group = environment_for(job(threads=3, processes=2), distributed=True)
    assert (alone["TOKENIZERS_PARALLELISM"], alone["RAYON_NUM_THREADS"]) == ("true", "3")
    assert group["TOKENIZERS_PARALLELISM"] == "false"
    assert alone["OMP_NUM_THREADS"] == group["OMP_NUM_THREADS"] == "3"


@pytest.mark.slow
def test_a_worker_started_by_hand_has_fixed_hashes_too(tmp_path: Path) -> None:
    """It starts itself anew; with the variable set it does not. The number of the process stays."""
    code = """
import os, sys
from pipeline.running.environment import start_again_with_fixed_hashes
print(os.getpid(), flush=True)
start_again_with_fixed_hashes()
print(hash('a word'), sys.argv[1], flush=True)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment["PYTHONPATH"] = str(CHECKOUT)

    def lines(**more: str) -> list[str]:
        command = [sys.executable, "-u", str(script), "argument"]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    first, again, hashed = lines()
    assert first == again
    assert hashed.endswith(" argument")
    assert lines(PYTHONHASHSEED="0")[1] == hashed
    assert len(lines(PYTHONHASHSEED="0")) == 2
