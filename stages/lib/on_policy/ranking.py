"""Which of a prompt's completions become training data: the best against the worst, or the best alone.

Imports no torch: what decides is text, ends and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

CUT_OFF = "cut_off"
"""The limit ended it, not the policy."""


TOO_SHORT = "too_short"
"""It has fewer tokens than asked for, or nothing but whitespace."""


SPECIAL = "special_token_within"
"""A special token stands before its end: as the text of a message it would be spelled, and read as other tokens."""


BROKEN = "broken_character"
"""Its bytes are no whole characters: what its text says is not what was drawn."""


REPEATED = "repeated"
"""An earlier completion of the prompt says the same: two equal answers cannot be preferred to each other."""


TOO_FEW = "fewer_than_two_answers"
"""Of the prompt's completions fewer than two are of use and say different things."""


ALIKE = "all_score_alike"
"""All of the prompt's answers score the same: none is better than another."""


BELOW_MARGIN = "below_min_margin"
"""The best answer is better than the worst by less than asked for."""


NO_ANSWER = "no_answer_of_use"
"""None of the prompt's completions is of use."""


BELOW_SCORE = "below_min_score"
"""The best answer scores less than asked for."""


@dataclass(frozen=True)
class Candidate:
    """A completion, and what is known of it."""

    text: str
    num_tokens: int
    """How many tokens the policy made, the one that ends it included."""
    ended: bool
    """Whether the policy ended it, rather than being cut off at the limit."""
    rewards: tuple[float, ...]
    """What each reward gives it, without weights."""
    score: float
    """Their weighted sum."""
    unusable: str = ""
    """Why it cannot become training data; empty if it can."""
    retokenized: bool = False
    """Whether its text, as a message, becomes other tokens than were drawn."""
    troubles: Mapping[str, str] = field(default_factory=dict)
    """Name of a reward that runs what others wrote -> the word for what went wrong with it here."""


class Chosen(NamedTuple):
    """The places of a prompt's best and worst answer among its completions."""

    best: int
    worst: int


def ranked(candidates: Sequence[Candidate]) -> list[int]:
    """The places of the completions that are of use, the best first; of equal scores the one drawn first."""
    usable = [place for place, each in enumerate(candidates) if not each.unusable]
    return sorted(usable, key=lambda place: (-candidates[place].score, place))


def choose_pair(candidates: Sequence[Candidate], min_margin: float, min_score: float | None) -> Chosen | str:
    """The best answer and the worst; or why the prompt gives no pair. Of equal scores the one drawn first counts, on either side."""
    order = ranked(candidates)
    if len(order) < 2:
        return TOO_FEW
    if isinstance(found := choose_best(candidates, min_score), str):
        return found
    best, lowest = order[0], candidates[order[-1]].score
    worst = next(place for place in order if candidates[place].score == lowest)
    margin = candidates[best].score - lowest
    if margin <= 0:
        return ALIKE
    return Chosen(best, worst) if margin >= min_margin else BELOW_MARGIN


def choose_best(candidates: Sequence[Candidate], min_score: float | None) -> int | str:
    """The place of the best answer; or why the prompt gives none."""
    order = ranked(candidates)
    if not order:
        return NO_ANSWER
    if min_score is not None and candidates[order[0]].score < min_score:
        return BELOW_SCORE
    return order[0]
