"""What stops an on-policy stage: rewards that are no numbers, models that do not fit together, prompts that nobody can use."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ArtifactError, DataError, Problem, RewardError
from pipeline.store.artifact import Kind, digest_file, read_manifest
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import read_journal
from stages.lib.on_policy import rewards as rewards_library
from stages.lib.on_policy.reward_params import LearnedReward
from stages.lib.on_policy.samples import Completion, Sample
from stages.lib.on_policy.scoring import RewardModelScorer, Scorer
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.tokenizers import tokenizer_digest
from tests.distributed.training_world import make_tokenizer
from tests.integration.on_policy_world import (
    OnPolicyWorld,
    align,
    make_on_policy_world,
    make_other_tokenizer,
    write_manifest,
    write_policy,
    write_prompts,
    write_reward_model,
)

pytestmark = pytest.mark.slow

LEARNED = {"kind": "reward_model"}
BRIEF = {"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}
CHANGES: dict[str, Any] = {"rewards": [BRIEF], "completions_per_prompt": 2, "epochs_per_rollout": 2}
"""Two rollouts of 4 steps each."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "reward"
    return write_reward_model(folder, make_other_tokenizer(), max_position_embeddings=512)


def the_problem(error: pytest.ExceptionInfo[Any]) -> Problem:
    (problem,) = error.value.problems
    assert isinstance(problem, Problem) and problem.hint and "\n" not in str(problem)
    return problem


# Rewards


class FailsLate:
    """A reward that is sound for the rows and the first `calls` completions, and then does what `fails` does."""

    def __init__(self, calls: int, fails: Callable[[], Any]) -> None:
        self.left = calls
        self.fails = fails
        self.row: Any = None

    def make(self, params: Any) -> Any:
        sound = rewards_library.length_penalty(params)

        def reward(prompt: Any, completion: Completion, row: Any) -> Any:
            self.left -= completion.num_tokens > 0  # `check_rows` tries it on empty ones
            if self.left >= 0:
                return sound(prompt, completion, row)
            self.row = row
            return self.fails()

        return reward


def raises() -> float:
    raise ValueError("no answer was found")


def test_a_reward_model_that_gives_no_number_is_told_after_the_last_chunk(
    world: OnPolicyWorld, reward_model: Path
) -> None:
    """Each chunk of one chat begins with what all processes do together: 3 times, though the first score is none."""
    judge = RewardModelScorer(reward_model, None, "fp32", torch.device("cpu"), 1)
    with torch.no_grad():
        judge.model.score.weight.fill_(math.nan)
    scorer = Scorer([LearnedReward(kind="reward_model")], judge)
    prompt = [{"role": "user", "content": "What?"}]
    boundaries: list[int] = []
    with pytest.raises(RewardError) as caught:
        scorer.score([Sample(i, prompt, Completion("a", 1, True), {}) for i in range(3)], lambda: boundaries.append(1))
    assert str(caught.value).startswith("rewards.reward_model: row 1: it gave nan")
    assert len(boundaries) == 3


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (lambda: math.nan, "it gave nan"),
        (lambda: -math.inf, "it gave -inf"),
        (raises, "it raised ValueError: no answer was found (test_on_policy_refusals.py, line "),
        (lambda: [0.5, 0.5], "it gave 2 values (list) instead of one number"),
        (lambda: None, "it gave None instead of one number"),
    ],
    ids=["nan", "infinite", "raises", "two values", "nothing"],
)
def test_a_reward_that_is_no_number_stops_the_run(
    fails: Callable[[], Any], sentence: str, world: OnPolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sixth completion of the second rollout, after those held out and 16: the error names reward and row.

    The checkpoint of the first rollout's end stays whole, and from it the run ends as if nothing had been.
    """
    rows = list(read_rows(world.chats / "train.jsonl"))
    heldout = [row["messages"][:-1] for row in read_rows(world.chats / "heldout.jsonl")]
    usable = sum(len(encode_prompt(world.tokenizer, prompt)) <= 40 for prompt in heldout)
    late = FailsLate(usable + 16 + 5, fails)
    resources = {"save_every_steps": 2}
    with monkeypatch.context() as patch:
        patch.setitem(rewards_library.REWARDS, "length_penalty", late.make)
        with pytest.raises(RewardError) as caught:
            align("grpo", world.inputs, tmp_path / "run", CHANGES, resources=resources)
    problem = the_problem(caught)
    assert problem.where == "rewards.length_penalty"
    assert f"row {rows.index(late.row) + 1}: {sentence}" in str(problem)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [2, 4] and checkpoints.problems(4) == []
    assert not (tmp_path / "run" / "out" / "model.safetensors").exists()
    if sentence == "it gave nan":
        again = align("grpo", world.inputs, tmp_path / "run", CHANGES, resources=resources)
        assert [line["step"] for line in again.lines("resume")] == [4]
        whole = align("grpo", world.inputs, tmp_path / "whole", CHANGES, resources=resources)
        name = "model.safetensors"
        assert digest_file(again.context.out / name) == digest_file(whole.context.out / name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda scores: scores[:-1], r"rewards\.reward_model: expected 4 values, got 3"),
        (lambda scores: [*scores, 0.0], r"rewards\.reward_model: expected 4 values, got 5"),
        (lambda scores: scores[0], r"rewards\.reward_model: expected 4 values, got one float"),
        (lambda scores: [math.nan] * len(scores), r"rewards\.reward_model: row \d+: it gave nan"),
        (lambda scores: torch.tensor([scores, scores]), r"rewards\.reward_model: expected 4 values, got 2"),
    ],
    ids=["fewer", "more", "one", "nan", "a matrix"],
)
def test_a_reward_model_that_gives_other_than_one_number_each(
    change: Callable[[list[float]], Any],
    sentence: str,
    world: OnPolicyWorld,
    reward_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first four held-out completions are scored together."""
    score = RewardModelScorer.score
    monkeypatch.setattr(RewardModelScorer, "score", lambda self, chats: change(score(self, chats)))
    with pytest.raises(RewardError, match=sentence):
        align("grpo", {**world.inputs, "reward": reward_model}, tmp_path, {**CHANGES, "rewards": [LEARNED]})


def test_rows_that_a_reward_cannot_score_are_found_before_anything_is_written(
    world: OnPolicyWorld, tmp_path: Path
) -> None:
    rewards = [{"kind": "exact_match", "column": "answer"}]
    with pytest.raises(RewardError, match=r"rewards\.exact_match: cannot score .* rows: row 1: .*'answer'"):
        align("grpo", world.inputs, tmp_path, {**CHANGES, "rewards": rewards})
    lines = list(read_journal(tmp_path / "journal.jsonl"))
    assert {line["event"] for line in lines} == {"note", "progress"}
    told = [line["what"] for line in lines if line["event"] == "progress"]
    assert told == ["train prompts tokenized", "heldout prompts tokenized"]


# Models


def test_a_reward_model_that_scores_otherwise_than_its_manifest_says(
    world: OnPolicyWorld, reward_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(reward_model, tmp_path / "copy")
    facts = read_manifest(copy).facts
    moved = {**(facts.fixed_prompt_scores or {})}
    moved["arithmetic"] += 0.5
    write_manifest(copy, Kind.REWARD_MODEL, **{**facts.model_dump(), "fixed_prompt_scores": moved})
    with pytest.raises(ArtifactError, match="scores the fixed prompt arithmetic with") as caught:
        align("ppo", {**world.inputs, "reward": copy}, tmp_path / "run", {"rewards": [LEARNED]})
    assert the_problem(caught).where == str(copy)


def test_a_reward_model_that_reads_no_chat_so_long(world: OnPolicyWorld, tmp_path: Path) -> None:
    reward = write_reward_model(tmp_path / "reward", make_other_tokenizer(), max_position_embeddings=60)
    with pytest.raises(
        DataError, match=r"a prompt with its completion has \d+ of its tokens, and the model takes 60"
    ) as caught:
        align("grpo", {**world.inputs, "reward": reward}, tmp_path / "run", {**CHANGES, "rewards": [LEARNED]})
    assert the_problem(caught).where == "reward model reward"


def test_a_policy_with_fewer_embeddings_than_its_tokenizer_has_tokens(world: OnPolicyWorld, tmp_path: Path) -> None:
    """One token was added to the tokenizer after the model was made."""
    model = shutil.copytree(world.model, tmp_path / "model")
    tokenizer = make_tokenizer()
    count = len(tokenizer)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(ArtifactError, match=f"has {count + 1} tokens, and the model embeds {count}") as caught:
        align("grpo", {**world.inputs, "model": model}, tmp_path / "run", CHANGES)
    assert the_problem(caught).where == str(model)


def test_a_policy_whose_tokenizer_is_not_the_one_of_its_manifest(world: OnPolicyWorld, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    digest = tokenizer_digest(world.tokenizer)
    write_manifest(model, Kind.CAUSAL_LM, tokenizer_digest="f" * 64)
    with pytest.raises(ArtifactError, match=rf"its tokenizer \({digest[:8]}\) is not the one .*\(ffffffff\)"):
        align("grpo", {**world.inputs, "model": model}, tmp_path / "refused", CHANGES)
    write_manifest(model, Kind.CAUSAL_LM, tokenizer_digest=digest)
    align("grpo", {**world.inputs, "model": model}, tmp_path / "run", {**CHANGES, "rollouts": 1})


@pytest.mark.parametrize("role", ["reference", "value"])
def test_models_that_read_other_tokens(role: str, world: OnPolicyWorld, reward_model: Path, tmp_path: Path) -> None:
    other = reward_model
    if role == "reference":
        other = write_policy(tmp_path / "other", with_end(make_other_tokenizer()))
    with pytest.raises(ArtifactError, match=f"inputs.{role}: the tokenizer of .* is not the one of"):
        align("ppo", {**world.inputs, role: other}, tmp_path / "run")


def with_end(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


# Prompts


def test_a_window_that_is_longer_than_the_models_positions(world: OnPolicyWorld, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="121 and max_new_tokens 8 are 129, and the model takes 128 tokens"):
        align("grpo", world.inputs, tmp_path, {**CHANGES, "max_prompt_tokens": 121})


def test_too_many_prompts_that_are_too_long(world: OnPolicyWorld, tmp_path: Path) -> None:
    """They are dropped, not cut. 7 of 8 training prompts and 1 of 4 held-out ones are: 8 of 12, 67 percent."""
    short, long = ({"messages": [{"role": "user", "content": text}]} for text in ("Why?", "Why not? " * 20))
    prompts = write_prompts(tmp_path / "prompts", [short, *[long] * 7], [long, short, short, short])
    inputs = {"model": world.model, "prompts": prompts}
    with pytest.raises(DataError, match=r"67% of the prompts cannot be used: 8 prompt_too_long \(for example "):
        align("grpo", inputs, tmp_path / "many", CHANGES)
    seen = align("grpo", inputs, tmp_path / "run", {**CHANGES, "max_dropped_fraction": 0.7, "rollouts": 1})
    assert {tuple(each.prompt_ids) for each in seen.experiences[0].episodes} == {
        tuple(encode_prompt(world.tokenizer, short["messages"]))
    }
    assert seen.result.facts.dropped_rows == {"prompt_too_long": 8}
    with pytest.raises(DataError, match=r"none of the 8 prompts can be used: 8 prompt_too_long \(for example .*raise"):
        align("grpo", inputs, tmp_path / "all", {**CHANGES, "max_prompt_tokens": 3})
