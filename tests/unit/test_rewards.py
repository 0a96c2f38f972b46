"""Programmatic rewards: each value derived by hand, each mistake in a recipe, and each way a reward can fail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.errors import RewardError, SlipwayError
from pipeline.settings.strict import Strict, documentation
from stages.lib.on_policy.contained_rewards import CONTAINED
from stages.lib.on_policy.reward_params import (
    LEARNED,
    AnyContained,
    FormatReward,
    LearnedReward,
    ProgrammaticReward,
    Reward,
    Rewards,
    WeightedReward,
    learned,
    programmatic,
    reward_names,
)
from stages.lib.on_policy.rewards import (
    REWARDS,
    Completion,
    RewardFunction,
    Sample,
    Unscorable,
    check_rows,
    check_scores,
    combine,
    count_in_order,
    score_programmatic,
)
from stages.lib.rows.canonical import Row
from tests.unit.running_stages import params_of, problems_of, read_files


class Params(Strict):
    """As a stage has them."""

    rewards: Rewards
    """What completions are rewarded for."""


def read(*blocks: dict[str, Any]) -> Any:
    return params_of(Params, {"rewards": list(blocks)}, Path()).rewards


def told(*blocks: Any) -> str:
    return problems_of(Params, {"rewards": list(blocks)}, Path())


def sample(text: str = "", *, index: int = 0, tokens: int = 1, ended: bool = True, **row: Any) -> Sample:
    return Sample(index, "prompt", Completion(text, tokens, ended), row)


def value(block: dict[str, Any], text: str = "", *, tokens: int = 1, ended: bool = True, **columns: Any) -> float:
    """What the reward gives for one completion of a row with these columns."""
    ((found,),) = score_programmatic(read(block), [sample(text, tokens=tokens, ended=ended, columns=columns)])
    return found


# Exact match


@pytest.mark.parametrize(
    ("how", "text", "column", "expected"),
    [
        ({}, "72", "72", 1.0),
        ({}, " 72\n", "\t72 ", 1.0),
        ({}, "7 2", "72", 0.0),
        ({}, "It is 72", "72", 0.0),
        ({}, "1,000", "1000", 0.0),
        ({}, "72", 72, 1.0),
        ({}, "72", 72.0, 0.0),
        ({}, "72.0", 72.0, 1.0),
        ({}, "true", True, 1.0),
        ({}, "True", True, 0.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "PARIS", "Paris", 1.0),
        ({"ignore_case": True}, "STRASSE", "Stra\u00dfe", 1.0),
        # a whole match where there is no group: the last number of both
        ({"extract": r"\d+"}, "6 times 12 is 72.", "Half of 144, 72", 1.0),
        ({"extract": r"\d+"}, "72 is 6 times 12.", "72", 0.0),
        # the first group
        ({"extract": r"#### (\d+)( apples)?"}, "so #### 72 apples", "12\n#### 72", 1.0),
        # of the last match
        ({"extract": r"#### (\S+)"}, "#### 5 no, #### 72", "#### 72", 1.0),
        ({"extract": r"#### (\S+)"}, "#### 72 no, #### 5", "#### 72", 0.0),
        # no match in the completion
        ({"extract": r"#### (\S+)"}, "72", "#### 72", 0.0),
        ({"extract": r"#### (\S+)"}, "", "#### 72", 0.0),
        # `\d*` matches nothing behind every letter, and a group can take no part: neither is an answer
        ({"extract": r"\d*"}, "72 apples", "72", 1.0),
        ({"extract": r"\d*"}, "apples", "72", 0.0),
        ({"extract": r"(\d+)|end"}, "72 end", "72", 1.0),
        # what is extracted is stripped and compared like the whole
        ({"extract": "answer:(.*)", "ignore_case": True}, "answer: Yes ", "answer:yes", 1.0),
    ],
)
def test_exact_match(how: dict[str, Any], text: str, column: Any, expected: float) -> None:
    assert value({"kind": "exact_match", "column": "answer", **how}, text, answer=column) == expected


def test_a_missing_column_names_the_row_and_the_columns_it_has() -> None:
    (reward,) = read({"kind": "exact_match", "column": "anser"})
    samples = [
        sample("a", index=0, columns={"anser": "a"}),
        sample("a", index=6, id="q7", source="math", columns={"answer": "a", "level": 3}),
    ]
    with pytest.raises(RewardError) as caught:
        score_programmatic([reward], samples)
    assert str(caught.value) == (
        "rewards.exact_match: row 7 (id 'q7', source 'math'): there is no column 'anser'; it has answer, level. "
        "Name it in `carry` of the source of the rows."
    )
    with pytest.raises(RewardError, match=r"row 4: there is no column 'anser'; it has no columns"):
        score_programmatic([reward], [sample("a", index=3)])


def test_a_column_in_which_nothing_is_found_is_an_error() -> None:
    """Else every completion of the row would get 0, whatever it says."""
    block = {"kind": "exact_match", "column": "answer", "extract": "#### (.*)"}
    with pytest.raises(
        RewardError, match=r"row 1: extract finds nothing in the column 'answer': '72'\. Give a pattern"
    ):
        value(block, "#### 72", answer="72")


@pytest.mark.slow
def test_exact_match_on_the_answers_of_gsm8k(shared_data: Path, tmp_path: Path) -> None:
    """Each of the 7,473 answers ends in `#### ` and a number; the reference itself and the bare line are right, the same
    line with a 9 behind the number is wrong."""
    rows, ledger = read_files(
        tmp_path,
        paths=[str(shared_data / "chat/gsm8k_train.jsonl")],
        layout="alpaca",
        columns={"instruction": "question", "output": "answer"},
        carry=["answer"],
    )
    assert (len(rows), ledger.dropped) == (7_473, {})
    first = rows[0]["columns"]["answer"]
    assert first == rows[0]["messages"][1]["content"]
    assert first.endswith("\n#### 72")
    rewards = read({"kind": "exact_match", "column": "answer", "extract": r"####\s*(\S+)"})
    check_rows(rewards, [(index, row["messages"][:1], row) for index, row in enumerate(rows)])
    for change, expected in (
        (lambda text: text, 1.0),
        (lambda text: text.split("\n")[-1], 1.0),
        (lambda text: text + "9", 0.0),
    ):
        samples = [
            Sample(index, row["messages"][:1], Completion(change(row["columns"]["answer"]), 1, True), row)
            for index, row in enumerate(rows)
        ]
        assert set(score_programmatic(rewards, samples)[0]) == {expected}


# Regular expressions


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ({"pattern": "b+"}, "abbc", 1.0),
        ({"pattern": "b+"}, "ac", 0.0),
        ({"pattern": "b+", "whole": True}, "bb", 1.0),
        ({"pattern": "b+", "whole": True}, "abb", 0.0),
        ({"pattern": "b+", "whole": True}, "bb\n", 0.0),
        ({"pattern": "a.c"}, "a\nc", 0.0),
        ({"pattern": "(?s)a.c"}, "a\nc", 1.0),
        ({"pattern": "(?i)A"}, "a", 1.0),
    ],
)
def test_regular_expression(how: dict[str, Any], text: str, expected: float) -> None:
    assert value({"kind": "regular_expression", **how}, text) == expected


# Length


@pytest.mark.parametrize(
    ("tokens", "expected"),
    # L_max = 100 and L_cache = 20 of DAPO: 0 up to 80 tokens, then (80 - 90) / 20, -1 at 100 and beyond
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (1_000, -1.0)],
)
def test_length_penalty(tokens: int, expected: float) -> None:
    found = value({"kind": "length_penalty", "target_tokens": 80, "per_token": 0.05}, tokens=tokens)
    assert found == pytest.approx(expected, abs=1e-12)
    assert math.copysign(1, found) == (1 if expected == 0 else -1)


def test_the_largest_length_penalty_can_be_set() -> None:
    """3 tokens too many at 0.5 each are 1.5; 9 would be 4.5, and no more than 2 is taken."""
    block = {"kind": "length_penalty", "target_tokens": 1, "per_token": 0.5, "max_penalty": 2.0}
    assert [value(block, tokens=tokens) for tokens in (4, 10)] == [-1.5, -2.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_length_penalty_is_trls_soft_overlong_punishment() -> None:
    """Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=12, soft_punish_cache=8)
    block = {"kind": "length_penalty", "target_tokens": 4, "per_token": 1 / 8}
    lengths = range(20)
    assert [value(block, tokens=length) for length in lengths] == theirs([[1] * length for length in lengths])


# Format


@pytest.mark.parametrize(
    ("text", "parts", "expected"),
    [
        ("abc", ["a", "b", "c"], 3),
        ("a x b x c", ["a", "b", "c"], 3),
        ("c b a", ["a", "b", "c"], 1),
        ("", ["a"], 0),
        ("b", ["a", "b"], 1),
        # b and c stand in order, though an a comes first in the list and last in the text
        ("b c a", ["a", "b", "c"], 2),
        # no overlap: one `aa` is one part
        ("aa", ["aa", "a"], 1),
        ("aaa", ["aa", "a"], 2),
        ("``` ```", ["```", "```"], 2),
        ("```", ["```", "```"], 1),
        # the first a may stand anywhere before the b
        ("b a a b", ["a", "b"], 2),
    ],
)
def test_parts_in_order(text: str, parts: list[str], expected: int) -> None:
    assert count_in_order(text, parts) == expected


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
RIGHT = "<think>a</think> <answer>b</answer>"


@pytest.mark.parametrize(
    ("how", "text", "ended", "all_or_nothing", "share"),
    [
        # asked: four parts and the end
        ({}, RIGHT, True, 1.0, 5 / 5),
        ({}, RIGHT, False, 0.0, 4 / 5),
        ({}, "<think>a</think> b", True, 0.0, 3 / 5),
        ({}, "", False, 0.0, 0 / 5),
        ({}, f"First: {RIGHT} Done.", True, 1.0, 5 / 5),
        # four parts
        ({"must_end": False}, RIGHT, False, 1.0, 4 / 4),
        ({"must_end": False}, "<think></answer>", True, 0.0, 2 / 4),
        # four parts, the end, the first part's place and the last part's place
        ({"whole": True}, f" {RIGHT}\n", True, 1.0, 7 / 7),
        ({"whole": True}, f"First: {RIGHT}", True, 0.0, 6 / 7),
        ({"whole": True}, f"First: {RIGHT} Done.", True, 0.0, 5 / 7),
        ({"whole": True}, "<think>", False, 0.0, 2 / 7),
    ],
)
def test_format(how: dict[str, Any], text: str, ended: bool, all_or_nothing: float, share: float) -> None:
    block = {"kind": "format", "parts": TAGS, **how}
    assert value(block, text, ended=ended) == all_or_nothing
    assert value({**block, "partial_credit": True}, text, ended=ended) == share


def test_a_format_of_one_part_may_be_all_of_the_text() -> None:
    block = {"kind": "format", "parts": ["yes"], "whole": True}
    assert [value(block, text) for text in ("yes", "yes and yes", "yes.", "no")] == [1.0, 1.0, 0.0, 0.0]


# In a recipe


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            {"kind": "exact_mach", "column": "a"},
            "params.rewards.0: kind: there is no reward 'exact_mach' (Did you mean 'exact_match'?).",
        ),
        ({"column": "a"}, "params.rewards.0: kind: is required (Known: reward_model, exact_match, "),
        ({"kind": ["format"]}, "params.rewards.0: kind: there is no reward '['format']'"),
        ("format", "params.rewards.0"),
        (
            {"kind": "exact_match", "column": "a", "extrat": "b"},
            "params.rewards.0.exact_match.extrat: unknown field. Did you mean 'extract'?",
        ),
        ({"kind": "exact_match"}, "params.rewards.0.exact_match.column: is required. The column that holds the answer"),
        (
            {"kind": "exact_match", "column": "a", "extract": "(b"},
            "params.rewards.0.exact_match.extract: '(b' is no regular expression: missing ), unterminated subpattern",
        ),
        (
            {"kind": "regular_expression", "pattern": "a{1,2}{3}"},
            "params.rewards.0.regular_expression.pattern: 'a{1,2}{3}' is no regular expression: multiple repeat",
        ),
        (
            {"kind": "regular_expression", "pattern": "a{99999999999999999999}"},
            "params.rewards.0.regular_expression.pattern: 'a{99999999999999999999}' is no regular expression",
        ),
        ({"kind": "format", "parts": []}, "params.rewards.0.format.parts: list should have at least 1 item"),
        ({"kind": "format", "parts": ["a", ""]}, "params.rewards.0.format.parts.1: string should have at least 1"),
        (
            {"kind": "length_penalty", "target_tokens": -1, "per_token": 0.0, "max_penalty": 0.0},
            "params.rewards.0.length_penalty.max_penalty: input should be greater than or equal to 0.000001",
        ),
        ({"kind": "reward_model", "weight": 0}, "params.rewards.0.reward_model.weight: is 0, so the reward counts"),
        ({"kind": "reward_model", "weight": math.inf}, "reward_model.weight: input should be a finite number"),
    ],
)
def test_mistakes_are_told_where_they_stand(block: Any, problem: str) -> None:
    assert problem in told(block)


def test_all_mistakes_are_told_at_once() -> None:
    first = {"kind": "length_penalty", "target_tokens": -1, "per_token": 0.0}
    lines = told(first, {"kind": "regular_expression", "pattern": "["}).split("\n")
    assert [line.partition(": ")[0] for line in lines] == [
        "params.rewards.0.length_penalty.target_tokens",
        "params.rewards.0.length_penalty.per_token",
        "params.rewards.1.regular_expression.pattern",
    ]


def test_there_is_a_reward_and_at_most_one_is_learned() -> None:
    assert "params.rewards: list should have at least 1 item" in told()
    assert "params.rewards: reward_model stands there more than once" in told({"kind": LEARNED}, {"kind": LEARNED})


def test_a_weight_may_be_negative() -> None:
    (reward,) = read({"kind": "regular_expression", "pattern": "sorry", "weight": -2})
    assert reward.weight == -2.0


KINDS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(Reward)[0])}


def test_every_kind_is_learned_or_stands_in_one_table() -> None:
    assert sorted(KINDS) == sorted([LEARNED, *REWARDS, *CONTAINED])
    assert {KINDS[kind] for kind in REWARDS} == set(get_args(ProgrammaticReward))
    assert {KINDS[kind] for kind in CONTAINED} == set(get_args(AnyContained))
    assert KINDS[LEARNED] == LearnedReward


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_documented(kind: str) -> None:
    model = KINDS[kind]
    assert issubclass(model, WeightedReward)
    assert set(documentation(model)) == set(model.model_fields)


# Scoring


def test_values_of_several_rewards_come_in_their_order() -> None:
    """ "ab" and "b", of 3 and 5 tokens with 4 free: found and not, no penalty and one token's."""
    rewards = read(
        {"kind": "regular_expression", "pattern": "a", "weight": 2.0},
        {"kind": "length_penalty", "target_tokens": 4, "per_token": 0.25},
    )
    values = score_programmatic(rewards, [sample("ab", tokens=3), sample("b", tokens=5)])
    assert values == [[1.0, 0.0], [0.0, -0.25]]
    assert combine([reward.weight for reward in rewards], values) == [2.0, -0.25]
    assert score_programmatic(rewards, []) == [[], []]


def test_the_prompt_is_given_to_the_function_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(REWARDS, "format", lambda params: lambda *given: seen.append(given) or 0.5)
    messages = [{"role": "user", "content": "a"}]
    samples = [Sample(0, messages, Completion("b", 2, False), {"id": "1"}), sample("c")]
    assert score_programmatic(read({"kind": "format", "parts": ["a"]}), samples) == [[0.5, 0.5]]
    assert seen == [(each.prompt, each.completion, each.row) for each in samples]


def test_names_tell_rewards_of_one_kind_apart() -> None:
    pattern = {"kind": "regular_expression", "pattern": "a"}
    rewards = read(pattern, {"kind": LEARNED}, pattern, {"kind": "format", "parts": ["a"]}, pattern)
    names = ["regular_expression", "regular_expression_2", "format", "regular_expression_3"]
    assert reward_names(programmatic(rewards)) == names
    assert reward_names(rewards) == [names[0], LEARNED, *names[1:]]
    assert learned(rewards) == LearnedReward(kind="reward_model")
    assert learned(programmatic(rewards)) is None


def raising(*given: Any) -> float:
    raise KeyError("level")


class Array:
    """What numpy and torch give: no list, but it has a length and can be made one."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        if not isinstance(self.values, list):
            raise TypeError("len() of a 0-d array")
        return len(self.values)

    def tolist(self) -> Any:
        return self.values


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (raising, "it raised KeyError: 'level' (test_rewards.py, line "),
        (lambda *given: math.nan, "it gave nan. A reward must be finite."),
        (lambda *given: math.inf, "it gave inf. A reward must be finite."),
        (lambda *given: -math.inf, "it gave -inf. A reward must be finite."),
        (lambda *given: [1.0, 2.0, 3.0], "it gave 3 values (list) instead of one number. A reward is one number."),
        (lambda *given: (1.0,), "it gave 1 value (tuple) instead of one number."),
        (lambda *given: Array([1.0, 2.0]), "it gave 2 values (Array) instead of one number."),
        (lambda *given: Array(1.0), "it gave one Array instead of one number."),
        (lambda *given: True, "it gave True instead of one number."),
        (lambda *given: None, "it gave None instead of one number."),
        (lambda *given: "1.0", "it gave '1.0' instead of one number."),
        (lambda *given: 1j, "it gave one complex instead of one number."),
    ],
)
def test_a_reward_that_is_not_one_finite_number(
    function: RewardFunction, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "format", lambda params: function)
    rewards = read({"kind": "regular_expression", "pattern": "a"}, {"kind": "format", "parts": ["a"]})
    with pytest.raises(RewardError) as caught:
        score_programmatic(rewards, [sample("a", index=4, id="q5")])
    assert str(caught.value).startswith(f"rewards.format: row 5 (id 'q5'): {what}")


def test_whole_numbers_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "format", lambda params: lambda *given: 2)
    ((found,),) = score_programmatic(read({"kind": "format", "parts": ["a"]}), [sample()])
    assert isinstance(found, float)
    assert found == 2.0


def test_every_reward_that_fails_is_told_with_its_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each: the second row is the first without a column, and the function raises at once."""
    monkeypatch.setitem(REWARDS, "format", lambda params: raising)
    rewards = read({"kind": "exact_match", "column": "answer"}, {"kind": "format", "parts": ["a"]})
    samples = [sample(index=0, columns={"answer": "a"}), sample(index=1), sample(index=2)]
    with pytest.raises(RewardError) as caught:
        score_programmatic(rewards, samples)
    lines = str(caught.value).split("\n")
    assert [line.partition(" (")[0].rpartition(": ")[0] for line in lines] == [
        "rewards.exact_match: row 2",
        "rewards.format: row 1: it raised KeyError",
    ]


def test_a_reward_error_is_the_users_to_mend() -> None:
    """So it ends a command with exit code 2 and without a traceback."""
    assert issubclass(RewardError, SlipwayError)
    assert issubclass(RewardError, ValueError)


def test_rows_are_checked_before_anything_is_trained() -> None:
    """Of three rows one lacks the column, and one holds nothing that is extracted."""
    rewards = read(
        {"kind": LEARNED},
        {"kind": "exact_match", "column": "answer", "extract": r"\d+"},
        {"kind": "exact_match", "column": "level"},
        {"kind": "format", "parts": ["a"]},
    )
    rows: list[Row] = [
        {"columns": {"answer": "1", "level": 1}},
        {"columns": {"answer": "one", "level": 1}, "id": "b"},
        {"columns": {"level": 1}},
    ]
    with pytest.raises(RewardError) as caught:
        check_rows(rewards, [(index, "prompt", row) for index, row in enumerate(rows)])
    assert str(caught.value).split("\n") == [
        (
            "rewards.exact_match: cannot score 2 of 3 rows: row 2 (id 'b'): extract finds nothing in the column "
            "'answer': 'one'. Give a pattern that finds the answer in the column as well, or leave the row out."
        )
    ]
    check_rows(rewards, [(0, "prompt", rows[0])])


# Scores of a batch


def test_scores_of_a_batch_are_checked() -> None:
    samples = [sample(index=index) for index in range(3)]
    assert check_scores(LEARNED, [1, 2.5, -3.0], samples) == [1.0, 2.5, -3.0]
    assert check_scores(LEARNED, Array([1.0, 2.0, 3.0]), samples) == [1.0, 2.0, 3.0]
    assert check_scores(LEARNED, [], []) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "rewards.reward_model: expected 3 values, got 2. A reward gives one number for each sample."),
        ([1.0] * 6, "rewards.reward_model: expected 3 values, got 6. A reward gives one number for each sample."),
        (1.0, "rewards.reward_model: expected 3 values, got one float. A reward gives one number for each sample."),
        (
            Array(1.0),
            "rewards.reward_model: expected 3 values, got one float. A reward gives one number for each sample.",
        ),
        (None, "rewards.reward_model: expected 3 values, got None. A reward gives one number for each sample."),
        ("abc", "rewards.reward_model: expected 3 values, got 'abc'. A reward gives one number for each sample."),
        ([1.0, math.nan, math.inf], "rewards.reward_model: row 12 (id 'q1'): it gave nan. A reward must be finite."),
        (
            Array([[1.0], [2.0], [3.0]]),
            "rewards.reward_model: row 11 (id 'q0'): it gave 1 value (list) instead of one number. A reward is one number.",
        ),
    ],
)
def test_scores_that_do_not_fit_the_batch(values: Any, message: str) -> None:
    samples = [sample(index=10 + number, id=f"q{number}") for number in range(3)]
    with pytest.raises(RewardError) as caught:
        check_scores(LEARNED, values, samples)
    assert str(caught.value) == message


def test_combine_adds_what_each_reward_weighs() -> None:
    """2 * 1 - 0.5 * 4 = 0 and 2 * 0.5 - 0.5 * 1 = 0.5; ten tenths are exactly one."""
    assert combine([2.0, -0.5], [[1.0, 0.5], [4.0, 1.0]]) == [0.0, 0.5]
    assert combine([0.1] * 10, [[1.0]] * 10) == [1.0]


@pytest.mark.parametrize(("weights", "values"), [([1.0], [[1.0], [2.0]]), ([1.0, 1.0], [[1.0, 2.0], [1.0]])])
def test_combine_refuses_what_does_not_fit_together(weights: list[float], values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="zip"):
        combine(weights, values)


def test_a_tiny_random_policy_can_learn_the_format_with_partial_credit() -> None:
    """Of the 5^3 = 125 equally likely completions of three words, one alone has all three parts in order. All or nothing,
    a policy sees a reward in 1 of 125; in proportion, exactly the 2^3 = 8 without any of the parts are left with 0."""
    words = ["a", "b", "c", "x", "y"]
    samples = [sample(one + two + three) for one in words for two in words for three in words]
    block = {"kind": "format", "parts": ["a", "b", "c"], "must_end": False}
    (strict,) = score_programmatic(read(block), samples)
    (graded,) = score_programmatic(read({**block, "partial_credit": True}), samples)
    assert (len(samples), sum(strict)) == (125, 1.0)
    assert graded.count(0.0) == 8
    assert [value == 1.0 for value in graded] == [value == 1.0 for value in strict]


def test_params_are_values_that_a_manifest_can_hold() -> None:
    (reward,) = read({"kind": "format", "parts": ["a"]})
    assert isinstance(reward, FormatReward)
    assert json.loads(json.dumps(reward.model_dump(mode="json"))) == {
        "weight": 1.0,
        "kind": "format",
        "parts": ["a"],
        "must_end": True,
        "whole": False,
        "partial_credit": False,
    }


def test_a_function_may_say_itself_that_a_row_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*given: Any) -> float:
        raise Unscorable("there is no picture", "Leave the row out.")

    monkeypatch.setitem(REWARDS, "format", lambda params: refusing)
    with pytest.raises(RewardError, match=r"^rewards.format: row 1: there is no picture. Leave the row out.$"):
        score_programmatic(read({"kind": "format", "parts": ["a"]}), [sample()])
