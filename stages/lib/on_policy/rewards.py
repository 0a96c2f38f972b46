"""Rewards for on-policy training: functions that say what a completion is worth, and what their values must be like.

A reward is given the prompt, the completion and the row that the prompt comes from, and gives one number. To add one: a
params class in `ProgrammaticReward` of reward_params.py, a function here that makes the reward from its params, and a line in
`REWARDS`. What others wrote runs in processes of its own: contained_rewards.py. The learned reward (`reward_model`) has no
function: its model scores whole batches, and `check_scores` checks what it gives.
Nothing here imports torch, because `slipway plan` reads the params.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.errors import Problem, RewardError
from stages.lib.on_policy.contained_calls import Means
from stages.lib.on_policy.contained_rewards import contained_scorers
from stages.lib.on_policy.reward_params import (
    ExactMatchReward,
    FormatReward,
    LengthPenaltyReward,
    ProgrammaticReward,
    RegularExpressionReward,
    Reward,
    programmatic,
    reward_names,
)
from stages.lib.on_policy.reward_values import Unscorable, described, last_match, number_of, raised
from stages.lib.on_policy.samples import Completion, Sample, column_text, problem_of
from stages.lib.rows.canonical import Row
from stages.lib.text.chat_template import Messages, Prompt

RewardFunction = Callable[[Prompt, Completion, Row], float]


# The functions


def exact_match(params: ExactMatchReward) -> RewardFunction:
    """1 if the answer in the completion is that in the row's column, else 0."""
    pattern = re.compile(params.extract) if params.extract is not None else None

    def answer_in(text: str) -> str | None:
        found = text if pattern is None else last_match(pattern, text)
        if found is None:
            return None
        return found.strip().casefold() if params.ignore_case else found.strip()

    def reward(prompt: Prompt, completion: Completion, row: Row) -> float:
        column = column_text(row, params.column)
        wanted = answer_in(column)
        if wanted is None:
            raise Unscorable(
                f"extract finds nothing in the column '{params.column}': {reprlib.repr(column)}",
                "Give a pattern that finds the answer in the column as well, or leave the row out.",
            )
        return float(answer_in(completion.text) == wanted)

    return reward


def regular_expression(params: RegularExpressionReward) -> RewardFunction:
    """1 if the pattern matches the completion (`whole`: all of it), else 0."""
    pattern = re.compile(params.pattern)
    match = pattern.fullmatch if params.whole else pattern.search
    return lambda prompt, completion, row: float(match(completion.text) is not None)


def length_penalty(params: LengthPenaltyReward) -> RewardFunction:
    """-min(max_penalty, per_token * max(0, num_tokens - target_tokens)).

    With target_tokens = L_max - L_cache, per_token = 1 / L_cache and max_penalty = 1 it is the soft overlong punishment
    of DAPO (Yu et al., 2025, arXiv:2503.14476, equation 13).
    """

    def reward(prompt: Prompt, completion: Completion, row: Row) -> float:
        excess_tokens = max(0, completion.num_tokens - params.target_tokens)
        return 0.0 - min(params.max_penalty, params.per_token * excess_tokens)

    return reward


def form(params: FormatReward) -> RewardFunction:
    """1 if all that is asked is fulfilled, else 0; with `partial_credit` the share of it that is.

    All or nothing is what TRL's `think_format_reward` and open-r1's `format_reward` do. Beside it open-r1 has
    `tag_count_reward` and verifiers a graded format reward, where the whole is too rare to be found by chance.
    """

    def reward(prompt: Prompt, completion: Completion, row: Row) -> float:
        asked, fulfilled = len(params.parts), count_in_order(completion.text, params.parts)
        if params.must_end:
            asked += 1
            fulfilled += completion.ended
        if params.whole:
            text = completion.text.strip()
            asked += 2
            fulfilled += text.startswith(params.parts[0].strip()) + text.endswith(params.parts[-1].strip())
        return fulfilled / asked if params.partial_credit else float(fulfilled == asked)

    return reward


def count_in_order(text: str, parts: Sequence[str]) -> int:
    """The most of the parts that stand in the text one after the other, in their order and without overlap."""
    ends = [0]  # ends[k]: where k of the parts seen so far can end at the earliest
    for part in parts:
        for count in reversed(range(len(ends))):
            start = text.find(part, ends[count])
            if start < 0:
                continue
            if count + 1 == len(ends):
                ends.append(start + len(part))
            else:
                ends[count + 1] = min(ends[count + 1], start + len(part))
    return len(ends) - 1


REWARDS: dict[str, Callable[[Any], RewardFunction]] = {
    "exact_match": exact_match,
    "regular_expression": regular_expression,
    "length_penalty": length_penalty,
    "format": form,
}
"""Kind -> what makes the reward from its params."""


def score_programmatic(rewards: Sequence[ProgrammaticReward], samples: Sequence[Sample]) -> list[list[float]]:
    """For each reward its values, one a sample, without weights.

    Raises `RewardError` with the first sample of each reward for which there is no finite number.
    """
    values: list[list[float]] = []
    problems = []
    for name, params in zip(reward_names(rewards), rewards, strict=True):
        function = REWARDS[params.kind](params)
        values.append([])
        for sample in samples:
            try:
                values[-1].append(value_of(function, sample))
            except Unscorable as error:
                problems.append(problem_of(name, sample.row_index, sample.row, error))
                break
    if problems:
        raise RewardError(*problems)
    return values


def check_rows(
    rewards: Iterable[Reward],
    prompts: Iterable[tuple[int, Prompt, Row]],
    turns: Messages | None = None,
    means: Means | None = None,
) -> None:
    """Raises `RewardError` if a reward cannot score some of the (row index, prompt, row), with how many and the first.

    It tries every function of ours on an empty completion, and prepares what is handed to processes, so that a row that lacks a
    column is found before anything is trained. A user's function is not called. `turns`: those of an empty episode, or None.
    """
    rewards = list(rewards)
    functions = [REWARDS[params.kind](params) for params in programmatic(rewards)]
    names = reward_names(programmatic(rewards))
    scorers = list(contained_scorers(rewards, means or Means()).values())
    prepared: list[list[tuple[int, Row, Any]]] = [[] for _ in scorers]
    failed: Counter[str] = Counter()
    first: dict[str, Problem] = {}
    total = 0

    def fail(name: str, row_index: int, row: Row, error: Unscorable) -> None:
        failed[name] += 1
        first.setdefault(name, problem_of(name, row_index, row, error))

    for row_index, prompt, row in prompts:
        total += 1
        sample = Sample(row_index, prompt, Completion(text="", num_tokens=0, ended=True, turns=turns), row)
        for name, function in zip(names, functions, strict=True):
            try:
                value_of(function, sample)
            except Unscorable as error:
                fail(name, row_index, row, error)
        for scorer, found in zip(scorers, prepared, strict=True):
            try:
                found.append((row_index, row, scorer.prepare(sample)))
            except Unscorable as error:
                fail(scorer.name, row_index, row, error)
    for scorer, found in zip(scorers, prepared, strict=True):
        for place, error in scorer.faults([each[2] for each in found]):
            fail(scorer.name, *found[place][:2], error)
    if first:
        raise RewardError(
            *(
                Problem(problem.where, f"cannot score {failed[name]:,} of {total:,} rows: {problem.what}", problem.hint)
                for name, problem in first.items()
            )
        )


def check_scores(name: str, values: Any, samples: Sequence[Sample]) -> list[float]:
    """What a reward gave for a batch (a list, array or tensor), as one finite number a sample.

    Raises `RewardError` if there are more or fewer, and with the first that is none.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    hint = "A reward gives one number for each sample."
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RewardError(Problem(f"rewards.{name}", f"expected {len(samples)} values, got {described(values)}", hint))
    if len(values) != len(samples):
        raise RewardError(Problem(f"rewards.{name}", f"expected {len(samples)} values, got {len(values)}", hint))
    checked = []
    for value, sample in zip(values, samples, strict=True):
        try:
            checked.append(number_of(value))
        except Unscorable as error:
            raise RewardError(problem_of(name, sample.row_index, sample.row, error)) from None
    return checked


def combine(weights: Sequence[float], values: Sequence[Sequence[float]]) -> list[float]:
    """The weighted sum of a sample's rewards, one a sample. `values` holds one sequence for each weight."""
    rows = zip(*values, strict=True)
    return [math.fsum(weight * value for weight, value in zip(weights, row, strict=True)) for row in rows]


def value_of(function: RewardFunction, sample: Sample) -> float:
    """What the function gives for the sample. Raises `Unscorable` whatever else happens."""
    try:
        value = function(sample.prompt, sample.completion, sample.row)
    except Unscorable:
        raise
    except Exception as error:  # a reward may be anybody's function
        raise Unscorable(raised(error), "Correct the function, or the row.") from error
    return number_of(value)
