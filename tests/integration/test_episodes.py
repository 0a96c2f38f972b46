"""Episodes of several turns on a tiny policy, looked into: what is read, what is said of it, and what rewards see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lib.on_policy.experience import PER_TOKEN
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_continuing import turn_between
from stages.lib.text.prompts import PromptRow, encode_prompt_or_text, prompt_of
from stages.lib.text.tokenizers import decode_ids, stop_token_ids
from tests.distributed.training_world import GPT2_WITH_DROPOUT
from tests.integration.on_policy_world import OnPolicyWorld, Seen, align, make_on_policy_world, write_policy

pytestmark = pytest.mark.slow

SOURCE = """\
import json


def step(completion, turns):
    return None if len(completion) % 4 == 0 else f"n{len(turns)}"


def worth(completion, turns, prompt, num_tokens):
    with open(PLACE, "a") as file:
        file.write(json.dumps([prompt, turns, completion, num_tokens]) + "\\n")
    return len(turns) + 0.1 * len(completion)
"""
MAX_TURNS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: OnPolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "tools.py").write_text(f"PLACE = {str(folder / 'seen.jsonl')!r}\n" + SOURCE)
    file = {"path": str(folder / "tools.py")}
    changes = {
        "max_new_tokens": 24,
        "rewards": [{"kind": "file", "function": "worth", **file}],
        "episodes": {"function": "step", "max_turns": MAX_TURNS, "role": "user", "max_observation_tokens": 4, **file},
        "entropy_coefficient": 0.01,
        "kl_coefficient": 0.1,
    }
    return align("ppo", world.inputs, folder / "run", changes)


def episodes(trained: Seen) -> list[Any]:
    return [each for experience in trained.experiences for each in experience.episodes]


def test_an_episode_is_its_turns_and_what_stands_between_them(trained: Seen, world: OnPolicyWorld) -> None:
    """Taken apart at what is observed: each part is the text of its turn, or the template's tokens of the observation."""
    tokenizer, between = world.tokenizer, turn_between(world.tokenizer, "user")
    stops = stop_token_ids(tokenizer)
    numbers_of_turns = []
    for each in episodes(trained):
        expected: list[int] = []
        observed: list[int] = []
        for said, read in zip(each.unfolded.turns[::2], each.unfolded.turns[1::2], strict=True):
            assert (said["role"], read["role"]) == ("assistant", "user")
            start = len(expected)
            stop = start + int(np.isin(each.ids[start:], stops).argmax()) + 1
            assert decode_ids(tokenizer, each.ids[start : stop - 1].tolist()) == said["content"]
            assert len(said["content"]) % 4 != 0
            ids = between.encode(read["content"])
            expected = [*each.ids[:stop].tolist(), *ids]
            observed += [*[0] * (stop - start), *[1] * len(ids)]
        assert each.ids[: len(expected)].tolist() == expected
        observed += [0] * (len(each.ids) - len(expected))
        assert [1 - said for said in each.said] == observed
        assert each.num_said == observed.count(0) and len(each.ids) <= 24
        numbers_of_turns.append(each.unfolded.num_turns)
    assert set(numbers_of_turns) == {1, 2, MAX_TURNS}


def test_nothing_is_said_of_what_was_read(trained: Seen) -> None:
    """Log-probabilities, values, advantages and returns are 0 there, and of its own tokens the policy says what it drew from."""
    found = [each for each in episodes(trained) if len(each.observed)]
    assert len(found) > 4
    for each in found:
        for name in PER_TOKEN:
            numbers = getattr(each, name)
            assert not numbers[each.observed].any(), name
        assert np.abs(each.generator_logprobs - each.logprobs).max() < 1e-4
        assert (each.logprobs[~each.observed] <= 0).all() and each.logprobs.sum() < 0
        assert (each.returns[~each.observed] != 0).all()


def test_numbers_count_what_the_policy_wrote(trained: Seen) -> None:
    for line, experience in zip(trained.lines("rollout"), trained.experiences, strict=True):
        found = experience.episodes
        assert line["length_tokens"] == pytest.approx(np.mean([each.num_said for each in found]))
        assert line["turns"] == pytest.approx(np.mean([each.unfolded.num_turns for each in found]))
        assert line["observation_tokens"] == pytest.approx(np.mean([each.observed.sum() for each in found]))
        assert line["episodes_cut_short"] == sum(each.unfolded.is_cut_short for each in found)
        assert line["errors_episodes"] == line["errors_file"] == line["observations_cut"] == 0
    steps = trained.lines("step")
    assert steps and all(line["gradient_norm"] > 0 for line in steps)


def test_rewards_see_the_whole_episode(trained: Seen) -> None:
    """The function of the reward was given, for each episode, its prompt, the turns before the last, and the last."""
    place = trained.context.work.parent.parent / "seen.jsonl"
    if not place.exists():
        (place,) = [each for folder in trained.context.work.parents for each in folder.glob("seen.jsonl")]
    seen = [json.loads(line) for line in place.read_text().splitlines()]
    given = {json.dumps([turns, completion, num_tokens]) for _, turns, completion, num_tokens in seen}
    for each in episodes(trained):
        assert json.dumps([list(each.unfolded.turns), each.unfolded.last, each.num_said]) in given
        worth = len(each.unfolded.turns) + 0.1 * len(each.unfolded.last)
        assert each.rewards.tolist() == [pytest.approx(worth)]
    assert all(prompt[-1]["role"] == "user" for prompt, *_ in seen)


def test_no_row_is_read_beyond_its_places(world: OnPolicyWorld, tmp_path: Path) -> None:
    """A model of exactly as many learned places as prompt and episode may have: one more would be an index out of range.

    Prompts have as many tokens as they may, and episodes of a batch stand at different places when they go on.
    """
    (tmp_path / "tools.py").write_text("def step(completion):\n    return 'n' * (1 + len(completion) % 9)\n")
    longest = max(len(each.ids) for each in prompts_of(world))
    places = {**GPT2_WITH_DROPOUT, "n_positions": longest + 24, "max_position_embeddings": longest + 24}
    model = write_policy(tmp_path / "model", world.tokenizer, **places, tie_word_embeddings=False)
    changes = {
        "completions_per_prompt": 4,
        "max_prompt_tokens": longest,
        "max_new_tokens": 24,
        "rollouts": 1,
        "episodes": {
            "path": str(tmp_path / "tools.py"),
            "function": "step",
            "max_turns": 5,
            "role": "user",
            "max_observation_tokens": 4,
        },
    }
    seen = align("grpo", {**world.inputs, "model": model}, tmp_path / "run", changes, resources={"micro_batch_size": 8})
    assert max(len(each.prompt_ids) + len(each.ids) for each in episodes(seen)) <= longest + 24
    assert len({each.unfolded.num_turns for each in episodes(seen)}) > 1
    for each in episodes(seen):
        assert np.abs(each.generator_logprobs - each.logprobs).max() < 1e-4


def prompts_of(world: OnPolicyWorld) -> list[PromptRow]:
    """The prompts of training and those held out, in the policy's tokens."""
    found = []
    for split in ("train", "heldout"):
        for number, row in enumerate(read_rows(world.chats / f"{split}.jsonl")):
            prompt = prompt_of(row, "chat")
            found.append(PromptRow(number, encode_prompt_or_text(world.tokenizer, prompt), prompt, row))
    return found
