"""Rewards for on-policy training: functions that say what a completion is worth, and what their values must be like.

A reward is given the prompt, the completion and the row that the prompt comes from, and gives one number. To add one: a
params class in `ProgrammaticReward` of reward_params.py, a function here that makes the reward from its params, and a line in
`REWARDS`. The learned reward (`reward_model`) has no function: its model scores whole batches, and `check_scores` checks what
it gives.
Nothing here imports torch, because `slipway plan` reads the params.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import Problem, RewardError
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
from stages.lib.rows.canonical import Row
from stages.lib.text.chat_template import Prompt


@dataclass(frozen=True)
class Completion:
    """What the policy wrote."""

    text: str
    """Its text, without the token that ends it."""
    num_tokens: int
    """How many tokens the policy made, the one that ends it included."""
    ended: bool
    """Whether the policy ended it itself, with a stop token, rather than being cut off at the limit."""


class Sample(NamedTuple):
    """A completion, and the prompt and the row that it belongs to."""

    row_index: int
    """Which row of its file it is, from 0. Messages count from 1, as lines do."""
    prompt: Prompt
    completion: Completion
    row: Row


RewardFunction = Callable[[Prompt, Completion, Row], float]


class Unscorable(Exception):
    """There is no reward for this sample: what is wrong, and what to do. Rewards raise it where a row lacks something."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint


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


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group (without groups: the whole) of the last match in which that is more than whitespace."""
    group = min(pattern.groups, 1)
    found = [match[group] for match in pattern.finditer(text) if (match[group] or "").strip()]
    return found[-1] if found else None


def column_text(row: Row, column: str) -> str:
    """A carried column as text: a text as it is, a number or a truth value as JSON writes it."""
    columns = row.get("columns", {})
    if column not in columns:
        has = f"it has {', '.join(columns)}" if columns else "it has no columns"
        raise Unscorable(f"there is no column '{column}'; {has}", "Name it in `carry` of the source of the rows.")
    value = columns[column]
    return value if isinstance(value, str) else json.dumps(value)


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


def check_rows(rewards: Iterable[Reward], prompts: Iterable[tuple[int, Prompt, Row]]) -> None:
    """Raises `RewardError` if a reward cannot score some of the (row index, prompt, row), with how many and the first.

    It tries every function on an empty completion, so that a row that lacks a column is found before anything is trained.
    """
    functions = [REWARDS[params.kind](params) for params in programmatic(rewards)]
    names = reward_names(programmatic(rewards))
    failed: Counter[str] = Counter()
    first: dict[str, Problem] = {}
    total = 0
    for row_index, prompt, row in prompts:
        total += 1
        sample = Sample(row_index, prompt, Completion(text="", num_tokens=0, ended=True), row)
        for name, function in zip(names, functions, strict=True):
            try:
                value_of(function, sample)
            except Unscorable as error:
                failed[name] += 1
                first.setdefault(name, problem_of(name, row_index, row, error))
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
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise Unscorable(
            f"it raised {type(error).__name__}: {error} ({place})", "Correct the function, or the row."
        ) from error
    return number_of(value)


def number_of(value: Any) -> float:
    """The value as a float. Raises `Unscorable` if it is not one finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Unscorable(f"it gave {described(value)} instead of one number", "A reward is one number.")
    if not math.isfinite(value):
        raise Unscorable(f"it gave {float(value)}", "A reward must be finite.")
    return float(value)


def described(value: Any) -> str:
    """What a value that is no number is."""
    if value is None or isinstance(value, bool | str):
        return reprlib.repr(value)
    kind = type(value).__name__
    try:
        count = len(value)
    except TypeError:
        return f"one {kind}"
    return f"{count} value{'s' if count != 1 else ''} ({kind})"


def problem_of(name: str, row_index: int, row: Row, error: Unscorable) -> Problem:
    known = [f"{field} {row[field]!r}" for field in ("id", "source") if field in row]
    place = f"row {row_index + 1}" + (f" ({', '.join(known)})" if known else "")
    return Problem(f"rewards.{name}", f"{place}: {error.what}", error.hint)
