"""Whether two texts give the same mathematical answer, as the package math-verify says.

Called in a process of its own: what sympy makes of an answer such as 9^9^9^9 may take forever.
"""

from __future__ import annotations

import logging
from typing import Any


def load_math() -> None:
    """Loads what the first comparison would load."""
    same_answer("$\\frac{1}{2}$", "x^2 + 1", True)


def answers_in(text: str) -> list[Any]:
    """The answers that math-verify finds in the text, as sympy's expressions and as texts; none where it finds none."""
    from math_verify import parse

    logging.disable(logging.CRITICAL)  # it advises to set a limit of time, which the process has
    return list(parse(text, parsing_timeout=None))


def as_formula(gold: str, is_latex: bool) -> str:
    return f"${gold}$" if is_latex else gold


def holds_answer(gold: str, is_latex: bool) -> float:
    """1 if the column holds an answer, else 0."""
    return float(bool(answers_in(as_formula(gold, is_latex))))


def same_answer(completion: str, gold: str, is_latex: bool) -> float:
    """1 if the completion gives the answer that the column holds, else 0."""
    from math_verify import verify

    wanted = answers_in(as_formula(gold, is_latex))
    return float(verify(wanted, answers_in(completion), timeout_seconds=None))
