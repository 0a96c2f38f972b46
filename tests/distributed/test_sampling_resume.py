"""`sample_preferences` writes the same files for one process and for two, and when it was killed or stopped on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.artifact import list_files
from tests.distributed.training_driver import SAMPLING
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import REWARDS, write_policy, write_reward_model

pytestmark = pytest.mark.slow

PARAMS: dict[str, Any] = {
    "rewards": [{"kind": "reward_model"}, *REWARDS],
    "completions_per_prompt": 4,
    "max_prompt_tokens": 40,
    "max_new_tokens": 8,
}
RESOURCES = {"generation_batch_size": 8, "micro_batch_size": 4}
"""Chunks of two prompts: the 42 training prompts that are short enough make 21 of them, the 6 held-out ones 3."""

INTERRUPTED: dict[str, tuple[int, dict[str, Any]]] = {
    "killed-alone-in-heldout": (1, {"die": {"chunk": 22, "token": 0, "rank": 0}}),
    "killed-second-of-two": (2, {"die": {"chunk": 4, "token": 2, "rank": 1}}),
    "stopped-two": (2, {"stop": {"chunk": 3}}),
}
"""Name -> processes, and where they are interrupted."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("sampling")
    tokenizer = make_tokenizer()
    inputs = {
        "model": write_policy(folder / "model", tokenizer),
        "prompts": write_chats(folder / "chats"),
        "reward": write_reward_model(folder / "reward", tokenizer),
    }
    whole = Job(folder / "one", SAMPLING, PARAMS, inputs, RESOURCES)
    jobs = {"one": whole, "two": replace(whole, work=folder / "two", processes=2)}
    first = []
    for name, (processes, how) in INTERRUPTED.items():
        jobs[name] = replace(whole, work=folder / name, processes=processes)
        first.append(replace(jobs[name], **how))
    run_forked(folder, first)
    for job in first:
        chunks = list((job.work / "candidates").glob("*.json"))
        job.work.joinpath("chunks-before").write_text(str(len(chunks)))
        assert not (job.work / "result.json").exists()
    run_forked(folder, list(jobs.values()))
    return jobs


@pytest.mark.parametrize("name", ["two", *INTERRUPTED])
def test_the_same_files_as_one_process_that_was_left_alone(world: dict[str, Job], name: str) -> None:
    assert list_files(world[name].work / "out") == list_files(world["one"].work / "out")
    assert world[name].result() == world["one"].result()
    assert set(list_files(world["one"].work / "out")) == {
        "train.jsonl",
        "heldout.jsonl",
        "completions.jsonl",
        "ledger.json",
    }


def chunks_before(job: Job) -> int:
    return int(Path(job.work / "chunks-before").read_text())


def test_what_was_written_before_is_not_written_again(world: dict[str, Job]) -> None:
    """Alone it had written the 22 chunks before the one in which it died, of 24.

    Of two processes each had written four chunks when the second died in its fifth, and the first may have its fifth by then.
    Stopped after three rounds: six; and the 15 that were left of the 21 are eight rounds of two.
    """
    assert chunks_before(world["killed-alone-in-heldout"]) == 22
    assert chunks_before(world["killed-second-of-two"]) in (8, 9)
    assert chunks_before(world["stopped-two"]) == 6
    stopped = world["stopped-two"]
    assert (stopped.work / "preempted").read_text() == "after 6 of 21 chunks of train prompts"
    rounds = [event["total"] for event in stopped.events("progress") if event["what"] == "chunks of train completions"]
    assert rounds == [8] * 8
