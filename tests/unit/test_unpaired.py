"""Single answers as tokens: which other answer stands after which prompt, what is cut, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stages.alignment.kto import KTOParams, told_mismatched
from stages.lib.preferring.unpaired import Mismatched, Unpaired, mismatched_among, mismatched_in_steps, other_answers
from stages.lib.preferring.unpaired_objective import told_balance
from stages.lib.text.tokenized_parts import TokenizedPart, TokenizedRow, TokenizedRows
from stages.lib.training.scheduling import ScheduledData

PARAMS: dict[str, Any] = {"global_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "max_length_tokens": 16}


def rows_of(folder: Path, *said: tuple[list[int], list[int]]) -> Unpaired:
    """Rows of a prompt and an answer each."""
    part = TokenizedPart()
    for index, (prompt, answer) in enumerate(said):
        columns = {
            "desirable": float(index % 2),
            "source": "",
            "prompt": str(prompt),
            "prompt_tokens": float(len(prompt)),
        }
        mask = [0] * len(prompt) + [1] * len(answer)
        part.add(index, TokenizedRow([([*prompt, *answer], mask)], columns))
    part.write(folder)
    return Unpaired(TokenizedRows([folder]))


def test_a_mismatched_answer_is_that_of_the_next_other_prompt() -> None:
    """Prompts a a b a c: the first goes past the second, which has its own prompt; the last comes round to the first."""
    rows: Any = SimpleNamespace(prompt_N=np.array([0, 0, 1, 0, 2]))
    assert other_answers(rows, np.arange(5)).tolist() == [2, 2, 3, 4, 0]
    assert other_answers(rows, np.array([4, 2, 1])).tolist() == [2, 1, 4]
    assert other_answers(rows, np.array([0, 1, 3])).tolist() == [1, 3, 0], "nothing else stands beside them"


def test_a_prompt_is_followed_by_the_others_answer_up_to_the_longest(tmp_path: Path) -> None:
    """10 11 | 12 and 20 | 21 22 23 of at most 4 tokens: 10 11 | 21 22, whose end is cut, and 20 | 12."""
    rows = rows_of(tmp_path / "rows", ([10, 11], [12]), ([20], [21, 22, 23]))
    found = mismatched_among(rows, 4)
    assert [[each.tolist() for each in found[index]] for index in range(2)] == [
        [[10, 11, 21, 22], [0, 0, 1, 1]],
        [[20, 12], [0, 1]],
    ]
    assert found.sequence_lengths.tolist() == [[4], [2]] and found.whole_lengths.tolist() == [5, 2]
    assert (found.num_cut, found.num_matched) == (1, 0)


def test_mismatched_answers_of_training_are_of_the_same_step(tmp_path: Path) -> None:
    """5 rows in steps of 4, 3 steps: at each place the schedule's own prompt, and an answer out of the same four places."""
    rows = rows_of(tmp_path / "rows", *(([10 * k], [10 * k + 1]) for k in range(1, 6)))
    found = mismatched_in_steps(rows, seed=3, steps=3, step_rows=4, max_length_tokens=8)
    schedule = ScheduledData(rows, 3, 12)
    own = [schedule.index(position) for position in range(12)]
    assert found.prompt_M.tolist() == own
    for step in range(3):
        places = slice(4 * step, 4 * step + 4)
        assert set(found.answer_M[places]) <= set(own[places])
        assert all(found.prompt_M[places] != found.answer_M[places])
    assert len(found) == 12 and isinstance(found, Mismatched)


def test_what_is_cut_and_what_matches_after_all_is_told(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", ([10], [11]), ([10], [12, 13, 14]))
    told = told_mismatched(mismatched_in_steps(rows, 0, 1, 2, 3), mismatched_among(rows, 8))
    assert "2 of training, one for each place of each step, and 2 held-out" in told
    assert "1 of them lose their end" in told and "4 answer their own prompt after all" in told


@pytest.mark.parametrize(
    ("good", "bad", "weights", "told"),
    [
        (4, 4, {}, "together weigh 1 to 1"),
        (4, 3, {}, "together weigh 1.33 to 1"),
        # 3 desirable of 10: 7 / 3 = 2.333 to 4/3 x 7 / 3 = 3.111.
        (3, 7, {}, "weigh 0.429 to 1: desirable_weight from 2.333 to 3.111 would make it 1 to 4/3"),
        (3, 7, {"desirable_weight": 2.5}, "together weigh 1.07 to 1"),
        (3, 7, {"undesirable_weight": 0.0}, "together weigh inf to 1"),
        (0, 7, {}, "nothing says what to prefer"),
    ],
)
def test_how_both_kinds_are_balanced_is_told(good: int, bad: int, weights: dict[str, float], told: str) -> None:
    said = told_balance(KTOParams(**PARAMS, **weights), np.array([True] * good + [False] * bad))
    assert said.startswith(f"{good} desirable and {bad} undesirable training answers")
    assert told in said and ("advise" in said) == ("from" in told)


def test_params_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="both 0, so that nothing is learned"):
        KTOParams(**PARAMS, desirable_weight=0, undesirable_weight=0)
    with pytest.raises(ValidationError, match="take a larger one, or the loss apo_zero_unpaired"):
        KTOParams(**{**PARAMS, "global_batch_size": 1})
    assert KTOParams(**{**PARAMS, "global_batch_size": 1}, loss="apo_zero_unpaired").global_batch_size == 1
