"""Layouts of answers whose steps are labelled one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import (
    TRUTHS,
    Conversion,
    Dropped,
    is_blank,
    is_whole,
    list_of,
    text_of,
    truth_of,
    type_name,
)
from stages.lib.sources.layouts_preferences import assistant
from stages.lib.sources.layouts_unpaired import prompt_before
from stages.lib.sources.turns import without_train

STEP_WORDS = {**TRUTHS, "+": True, "-": False, "good": True, "bad": False, "right": True, "wrong": False}
"""How the label of a step may be written as a text."""

SHEPHERD_MARK = "\u043a\u0438"
"""What stands behind each step in Math-Shepherd's `input`; in its `label`, + or - stands there."""


def stepwise(row: Row, conversion: Conversion) -> Row:
    """prompt, completions and labels (TRL's stepwise supervision): a text and a truth value, or null, for each step."""
    steps, labels = list_of(row, "completions"), list_of(row, "labels")
    known = [truth_of({"labels": label}, "labels", STEP_WORDS) for label in labels]
    return labelled_steps(without_train(prompt_before(row, conversion)), steps, known)


def math_shepherd(row: Row, conversion: Conversion) -> Row:
    """input and label of Math-Shepherd (Wang et al., 2024): the question and `Step 1: ...`, each step with its mark behind it."""
    text, labelled = text_of(row, "input"), text_of(row, "label")
    *marked, rest = text.split(SHEPHERD_MARK)
    if not marked or not is_blank(rest):
        raise Dropped("bad_steps", f"input does not end with the mark {SHEPHERD_MARK} of a step")
    labels, place = [], 0
    for part in marked:
        end = place + len(part)
        if labelled[place:end] != part or labelled[end : end + 1] not in ("+", "-"):
            raise Dropped("bad_steps", "label is not what input says, with + or - in the place of each mark")
        labels.append(labelled[end] == "+")
        place = end + 1
    question, found, first = marked[0].partition("Step 1:")
    if not found or is_blank(question):
        raise Dropped("bad_steps", "input has no question before Step 1:")
    steps = [f"Step 1:{first}", *marked[1:]]
    return labelled_steps([{"role": "user", "content": question.strip()}], [step.strip() for step in steps], labels)


def prm800k(row: Row, conversion: Conversion) -> Row:
    """question and label of PRM800K (Lightman et al., 2023): of each step the completion that was chosen, rated 1, 0 or -1; where
    none was, the first, which ends the answer, or what a person wrote, which is right. 0 counts as right, as in the paper.
    """
    problem, said = row.get("question"), row.get("label")
    if not isinstance(problem, dict) or not isinstance(said, dict):
        raise Dropped("missing_field", "question and label, which are mappings")
    steps, labels, alternatives, neutral = [], [], 0, 0
    for step in list_of(said, "steps"):
        completions = step.get("completions") if isinstance(step, dict) else None
        if not isinstance(completions, list):
            raise Dropped("wrong_type", "label.steps holds something else than steps with completions")
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is None and human is not None:
            steps.append(human.get("text") if isinstance(human, dict) else human)
            labels.append(True)
            continue
        if (
            not (chosen is None or is_whole(chosen))
            or not completions
            or not 0 <= (chosen or 0) < len(completions)
            or not isinstance(completions[chosen or 0], dict)
        ):
            raise Dropped("bad_steps", "a step has no completion that was chosen, and none that was not")
        taken = completions[chosen or 0]
        rating = taken.get("rating")
        if rating not in (None, -1, 0, 1):
            raise Dropped("wrong_type", f"a step is rated {rating!r}, neither 1, 0 nor -1")
        steps.append(taken.get("text"))
        labels.append(None if rating is None else rating >= 0)
        alternatives, neutral = alternatives + len(completions) - 1, neutral + (rating == 0)
        if chosen is None:
            break
    found = labelled_steps([{"role": "user", "content": text_of(problem, "problem")}], steps, labels)
    conversion.repair("steps_not_chosen_left_out", alternatives)
    conversion.repair("neutral_steps_called_right", neutral)
    return found


def labelled_steps(prompt: Sequence[Row], steps: Sequence[Any], labels: Sequence[bool | None]) -> Row:
    """The canonical row. Raises `Dropped` unless each step is a text, and has a label that may be null; one must be known."""
    if len(steps) != len(labels):
        raise Dropped("bad_steps", f"{len(steps)} steps and {len(labels)} labels")
    for step in steps:
        if not isinstance(step, str):
            raise Dropped("wrong_type", f"a step is {type_name(step)}, not a text")
        if is_blank(step):
            raise Dropped("empty_field", "a step")
    if all(label is None for label in labels):
        raise Dropped("unrated")
    return {"prompt": list(prompt), "steps": [assistant(step) for step in steps], "labels": list(labels)}
