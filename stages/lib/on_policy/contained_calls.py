"""What others wrote, called in a process of its own, and what became of each call."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.errors import Problem, RewardError
from stages.lib.on_policy import reward_caller
from stages.lib.on_policy.reward_params import ContainedReward
from stages.lib.on_policy.reward_values import Unscorable, last_match
from stages.lib.on_policy.samples import Sample, problem_of
from stages.lib.on_policy.user_functions import Parameters, arguments_for, text_of_program
from stages.lib.processes.contained import Abandoned, Ended, ProgramLimits, going_on, run_contained, surroundings
from stages.lib.training.evaluating import StopRequested

LOADING_SECONDS = 60.0
"""For what of ours is loaded before the first completion: packages that lie on a slow disk take their time."""
CALLER = Path(str(reward_caller.__file__))


class Trouble(NamedTuple):
    """What went wrong with one completion."""

    word: str
    """raised, not_a_number, not_a_text, timeout, memory, processes or died."""
    what: str
    """As a sentence that begins with `it`."""


class Scored(NamedTuple):
    """What a completion is worth. Where there was trouble, the value is what is given instead."""

    value: float
    trouble: Trouble | None = None


@dataclass(frozen=True)
class Means:
    """What a stage gives such rewards to work with."""

    at_a_time: int = 1
    """Processes that may run completions' code at once."""
    asked_to_stop: Callable[[], bool] = going_on
    """Called while a process runs: so that a long rollout is not taken for a hang, and ends where the step is to stop."""


class ContainedScorer(Protocol):
    """A reward of this kind, ready to score."""

    name: str
    """What it is called in messages."""

    def prepare(self, sample: Sample) -> Any:
        """What is handed to the process for the sample. Raises `Unscorable` where the row lacks something."""

    def faults(self, prepared: Sequence[Any]) -> Iterator[tuple[int, Unscorable]]:
        """(place, why) of those prepared rows that no completion can be scored for, found out in a process."""

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """One a sample. Raises `RewardError` with the first that cannot be scored, `Abandoned` where the step is to stop."""


def limits_of(params: ContainedReward, first_seconds: float = LOADING_SECONDS) -> ProgramLimits:
    return ProgramLimits(params.max_seconds, first_seconds, int(params.max_memory_gib * (1 << 30)))


# Functions


@dataclass(frozen=True)
class Called:
    """A function in a file."""

    where: str
    """What it is called in messages: rewards.NAME, or another place of a recipe."""
    path: str
    source: str
    function: str
    limits: ProgramLimits
    asked_to_stop: Callable[[], bool]
    warm_up: str | None = None
    """A function of the file that is called first, in the time for loading."""

    def each(self, calls: Sequence[Mapping[str, Any]], *, goes_on: bool = True) -> Iterator[float | Trouble]:
        """The number that each call gives, as `answers`."""
        return (read_answer(each) for each in self.answers(calls, goes_on=goes_on))

    def texts(self, calls: Sequence[Mapping[str, Any]], *, goes_on: bool = True) -> Iterator[str | Trouble | None]:
        """The text that each call gives, or None, as `answers`."""
        return (read_text_answer(each) for each in self.answers(calls, goes_on=goes_on, gives="text"))

    def answers(
        self, calls: Sequence[Mapping[str, Any]], *, goes_on: bool, gives: Literal["number", "text"] = "number"
    ) -> Iterator[Mapping[str, Any]]:
        """What each call gives, one after the other, in a process that is started anew after one that had to be ended.

        Without `goes_on`, nothing comes after the first trouble. Raises `RewardError` if the file itself cannot be run.
        """
        done = 0
        while done < len(calls):
            ended = self.run(calls[done:], gives)
            found = ended.answers[1:]
            if ended.trouble is not None:
                found.append({"trouble": ended.trouble, "what": ended.how})
            for each in found:
                yield each
                if "trouble" in each and not goes_on:
                    return
            done += len(found)

    def run(self, calls: Sequence[Mapping[str, Any]], gives: Literal["number", "text"] = "number") -> Ended:
        """Runs the file, and calls the function until it has to be ended. Raises `RewardError` if the file cannot be run."""
        request = {
            "source": self.source,
            "path": self.path,
            "function": self.function,
            "warm_up": self.warm_up,
            "gives": gives,
            "calls": calls,
        }
        ended = run_contained(
            CALLER, request, 1 + len(calls), self.limits, surroundings(os.environ), self.asked_to_stop
        )
        self.show_prints(ended)
        self.require_loaded(ended)
        return ended

    def require_loaded(self, ended: Ended) -> None:
        """Raises `RewardError` if the file did not come to its end."""
        first = ended.answers[0] if ended.answers else {"trouble": ended.trouble, "what": ended.how}
        if "trouble" in first:
            what = f"{self.path} cannot be run: {first['what']}"
            raise RewardError(Problem(self.where, what, "Correct the file, or what it imports."))

    def show_prints(self, ended: Ended) -> None:
        """Shows what was printed in this process's own output, which is the step's log."""
        if ended.printed_bytes:
            more = f", of which the first {len(ended.printed):,}" if ended.printed_bytes > len(ended.printed) else ""
            text = ended.printed.decode("utf-8", errors="replace")
            # Written at once, with its line break: other processes write to the same pipe.
            sys.stderr.write(f"{self.where} printed {ended.printed_bytes:,} bytes{more}:\n{text}\n")
            sys.stderr.flush()


def read_answer(answer: Mapping[str, Any]) -> float | Trouble:
    """What a call gave."""
    match answer:
        case {"trouble": str(word), "what": str(what)}:
            return Trouble(word, what)
        case {"value": float(value)}:
            return value
    return Trouble("died", "it wrote where only its answers belong")


def read_text_answer(answer: Mapping[str, Any]) -> str | Trouble | None:
    """What a call gave that is to give a text."""
    match answer:
        case {"text": str() | None as text}:
            return text
    found = read_answer(answer)
    return found if isinstance(found, Trouble) else Trouble("died", "it wrote where only its answers belong")


def call_arguments(
    function: str, parameters: Parameters, given: Mapping[str, Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """What the user's function is called with. Raises `Unscorable` where a row lacks, or names otherwise, what it asks for."""
    if hidden := sorted(given.keys() & columns.keys()):
        what = f"the column '{hidden[0]}' has the name of something else that {function} may ask for"
        raise Unscorable(what, "Rename the column in the source of the rows.")
    try:
        return arguments_for(parameters, given, columns)
    except KeyError as error:
        has = f"the row has {', '.join(columns)}" if columns else "the row has no columns"
        what = f"{function} asks for '{error.args[0]}', and {has}"
        hint = f"Name it in `carry` of the source of the rows, or ask for {', '.join(given)}."
        raise Unscorable(what, hint) from None


def prepared_for(scorer: ContainedScorer, name: str, samples: Sequence[Sample]) -> list[Any]:
    """What the process is handed for each sample. Raises `RewardError` with the first row that lacks something."""
    found = []
    for sample in samples:
        try:
            found.append(scorer.prepare(sample))
        except Unscorable as error:
            raise RewardError(problem_of(name, sample.row_index, sample.row, error)) from None
    return found


def called_here(name: str, module: Any, function: str, warm_up: str, params: ContainedReward, means: Means) -> Called:
    """A function of this project that is called as a user's is, once another of its module has loaded what it needs."""
    path = Path(str(module.__file__))
    return Called(
        f"rewards.{name}", str(path), text_of_program(path), function, limits_of(params), means.asked_to_stop, warm_up
    )


def require_all_scored(found: Iterable[object]) -> None:
    """Raises, in all processes, what is wrong in any, where `found` has what each of them met: `RewardError` with all of it; or
    `StopRequested`, where nothing is wrong and one was asked to stop.
    """
    met = list(found)
    if problems := [problem for each in met if isinstance(each, RewardError) for problem in each.problems]:
        raise RewardError(*dict.fromkeys(problems))
    if any(isinstance(each, Abandoned) for each in met):
        raise StopRequested


def or_zero(found: Iterable[float | Trouble]) -> list[Scored]:
    return [Scored(0.0, each) if isinstance(each, Trouble) else Scored(each) for each in found]


@functools.lru_cache(maxsize=64)
def compiled_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def extracted(pattern: str | None, text: str) -> str | None:
    """What the pattern finds last; the whole text where there is no pattern."""
    return text if pattern is None else last_match(compiled_pattern(pattern), text)
