"""Ranks meet through files; leftovers of an earlier run neither help nor harm."""

from __future__ import annotations

import time
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


def test_ranks_that_run_different_things_all_end_with_the_name_of_the_odd_one(tmp_path: Path) -> None:
    """Two of three have the same torch; an old `hello` of the third, of another version still, is not believed."""
    runs = [{"torch": "2.13.0"}, {"torch": "2.12.1"}, {"torch": "2.13.0"}]

    def run(torch: list[dict[str, str]]) -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            begun = [pool.submit(meet, tmp_path, World(rank, 3), "start", 20.0, torch[rank]) for rank in range(3)]
            return [str(future.exception()) for future in begun]

    for said in run(runs):
        assert "torch is 2.12.1 for rank 1 on " in said
        assert ", and 2.13.0 for most. Give every node the same" in said
    assert run([runs[0]] * 3) == ["None"] * 3


def test_nobody_goes_on_before_the_last_one_has_come(tmp_path: Path) -> None:
    """The third comes late: the second, which runs what rank 0 runs, has been answered by then, and ends with it nevertheless."""
    with ThreadPoolExecutor(3) as pool:
        begun = [pool.submit(meet, tmp_path, World(rank, 3), "start", 20.0, {"torch": "2.13.0"}) for rank in range(2)]
        while not list(tmp_path.rglob("thanks-1")):
            time.sleep(0.01)
        assert not any(future.done() for future in begun)
        begun.append(pool.submit(meet, tmp_path, World(2, 3), "start", 20.0, {"torch": "2.12.1"}))
    assert ["torch is 2.12.1 for rank 2" in str(future.exception()) for future in begun] == [True] * 3


def test_what_a_rank_said_last_time_is_not_believed(tmp_path: Path) -> None:
    """It ran another version then, and comes late now: the others wait for what it says today."""
    with ThreadPoolExecutor(3) as pool:
        for rank in range(3):
            pool.submit(meet, tmp_path, World(rank, 3), "start", 20.0, {"torch": "2.12.1" if rank == 2 else "2.13.0"})
    with ThreadPoolExecutor(3) as pool:
        begun = [pool.submit(meet, tmp_path, World(rank, 3), "start", 20.0, {"torch": "2.13.0"}) for rank in range(2)]
        time.sleep(0.5)
        begun.append(pool.submit(meet, tmp_path, World(2, 3), "start", 20.0, {"torch": "2.13.0"}))
    assert [future.exception() for future in begun] == [None] * 3


def test_of_two_that_differ_the_one_that_is_not_rank_0_is_odd(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        begun = [
            pool.submit(meet, tmp_path, World(rank, 2), "start", 20.0, {"device": device})
            for rank, device in enumerate(("NVIDIA H100", "cpu"))
        ]
    for future in begun:
        assert "device is cpu for rank 1" in str(future.exception())
