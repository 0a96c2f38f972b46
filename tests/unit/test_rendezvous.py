"""Ranks meet through files; leftovers of an earlier run neither help nor harm."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import LaunchError
from pipeline.running.rendezvous import meet
from pipeline.stage import World


def everyone(work: Path, size: int) -> None:
    with ThreadPoolExecutor(size) as pool:
        for future in [pool.submit(meet, work, World(rank, size), "start", 20.0) for rank in range(size)]:
            future.result()


def test_all_ranks_meet_twice_in_the_same_folder(tmp_path: Path) -> None:
    everyone(tmp_path, 3)
    everyone(tmp_path, 3)


def test_a_missing_rank_is_named_even_if_it_was_there_last_time(tmp_path: Path) -> None:
    everyone(tmp_path, 2)
    with pytest.raises(LaunchError, match=r"saw no sign of ranks \[1\] after 0 s"):
        meet(tmp_path, World(0, 2), "start", 0.3)


def test_a_rank_that_gets_no_answer_says_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"got no answer from rank 0"):
        meet(tmp_path, World(1, 2), "start", 0.2)
