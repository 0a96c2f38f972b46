"""What a user can do wrong, as exceptions. Each ends a command with exit code 2 and no traceback.

    SlipwayError
    +-- RecipeError   (ValueError)    the recipe: every problem of it at once
    +-- PathError     (ValueError)    a path that names nothing a command can read
    +-- DataError     (ValueError)    rows, files or formats that a stage cannot use
    +-- ArtifactError (ValueError)    an artifact that is damaged, missing or of the wrong kind
    +-- GateError     (ValueError)    a result that misses the bar the recipe set for it
    +-- RewardError   (ValueError)    a reward that cannot be computed, or is not one finite number
    +-- StoreError    (OSError)       the store: disk full, not writable, in use
    +-- LaunchError   (RuntimeError)  processes that cannot be started, or do not find each other

`Preempted` is no error: a stage saved its state on request and stopped (exit code 75).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.figures import escaped

MOST_PROBLEMS = 100
"""After so many, a reader stops looking for more: who mends these sees the others next time."""


MOST_COMPARED = 600
"""Of the names that a word may stand for; transformers knows some 500 families. Comparing with more takes seconds."""


SHOWN_CHARACTERS = 80
"""Of what was given, as a message repeats it."""


SHOWN_PATH_CHARACTERS = 400


EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""`EX_TEMPFAIL` of sysexits.h: schedulers requeue on it."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what is wrong, and what to do."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        # Names from outside stand in a place, and a place stands on one line.
        sentence = self.what.rstrip(".")
        return f"{escaped(self.where) or repr('')}: {sentence}. {self.hint}".rstrip()


class SlipwayError(Exception):
    """A mistake that the user can mend. Holds one or more `Problem`s; prints one line each."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class RecipeError(SlipwayError, ValueError):
    """The recipe cannot be planned."""


class PathError(SlipwayError, ValueError):
    """A path that no file can have, that leads nowhere, or whose file is not one to read."""


class DataError(SlipwayError, ValueError):
    """Data from outside, or rows of an artifact, that the stage cannot use."""


class ArtifactError(SlipwayError, ValueError):
    """An artifact that is damaged, missing, or does not fit its consumer."""


class GateError(SlipwayError, ValueError):
    """The stage ran, but its result misses the bar that the recipe sets."""


class RewardError(SlipwayError, ValueError):
    """A reward that cannot be computed for a row, or is not one finite number."""


class StoreError(SlipwayError, OSError):
    """The store cannot be read or written."""


class LaunchError(SlipwayError, RuntimeError):
    """Processes that cannot be started, or whose ranks do not find each other."""


class Preempted(Exception):
    """A stage was asked to stop, saved a complete checkpoint, and stopped."""


class NothingSaved(Exception):
    """A stage was asked to stop, and stopped, before it had anything to save."""


def shown(value: object, *, quoted: bool = True, characters: int = SHOWN_CHARACTERS) -> str:
    """What was given, as a message repeats it on one line: cut in the middle where it is long. With `quoted` as Python writes
    it.
    """
    return cut(repr(value), characters) if quoted else escaped(cut(str(value), characters))


def cut(text: str, characters: int) -> str:
    """The text, or of a longer one so many of its characters, the middle left out."""
    if len(text) <= characters:
        return text
    head = characters * 2 // 3
    return f"{text[:head]}...{text[head - characters :]} ({len(text):,} characters)"


def shown_path(path: object) -> str:
    """A path as a message names it, which is to be copied from there: only one that can be none is cut."""
    return shown(str(path), quoted=False, characters=SHOWN_PATH_CHARACTERS)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest known word, else the list of known words, or of the first of very many."""
    # Comparing takes long for long words, and for many.
    known = [name for name in known if len(name) <= SHOWN_CHARACTERS]
    nearest = difflib.get_close_matches(word[:SHOWN_CHARACTERS], known[:MOST_COMPARED], n=1)
    if nearest:
        return f"Did you mean '{escaped(nearest[0])}'?"
    more = f" and {len(known) - MOST_PROBLEMS:,} more" if len(known) > MOST_PROBLEMS else ""
    return escaped(f"Known: {', '.join(known[:MOST_PROBLEMS])}{more}.") if known else ""
