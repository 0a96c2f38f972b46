"""The reward `code_tests`: completions' code, each in a process of its own, against the tests of its row."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from stages.lib.on_policy.contained_calls import CALLER, Means, Scored, Trouble, extracted, limits_of, prepared_for
from stages.lib.on_policy.reward_params import CodeTestsReward
from stages.lib.on_policy.reward_values import Unscorable
from stages.lib.on_policy.samples import Sample, column_text
from stages.lib.processes.contained import run_contained, surroundings


@dataclass
class CodeScorer:
    """Completions' code, each in a process of its own, several at a time."""

    name: str
    params: CodeTestsReward
    means: Means

    def prepare(self, sample: Sample) -> dict[str, Any]:
        tests = tests_in(column_text(sample.row, self.params.column), self.params.column)
        return {"code": extracted(self.params.extract, sample.completion.text), "tests": tests}

    def faults(self, prepared: Sequence[Any]) -> Iterator[tuple[int, Unscorable]]:
        yield from ()

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        prepared = prepared_for(self, self.name, samples)
        with ThreadPoolExecutor(self.means.at_a_time) as pool:
            return list(pool.map(self.outcome, prepared))

    def outcome(self, prepared: Mapping[str, Any]) -> Scored:
        """What one completion gets, and the first trouble that its code made."""
        if prepared["code"] is None:
            return Scored(0.0)
        tests, secret = prepared["tests"], secrets.token_hex(16)
        asked = [each if isinstance(each, str) else {"input": each["input"]} for each in tests]
        request = {"code": prepared["code"], "tests": asked, "secret": secret}
        ended = run_contained(
            CALLER, request, 1 + len(tests), limits_of(self.params), bare_surroundings(), self.means.heard
        )
        answers = ended.answers[1:]
        if any(answer.get("secret") != secret for answer in answers):
            return Scored(0.0, Trouble("died", "it wrote where only its outcome belongs"))
        passed = [has_passed(test, answer) for test, answer in zip(tests, answers, strict=False)]
        troubles = [Trouble(answer["trouble"], answer["what"]) for answer in answers if "trouble" in answer]
        if ended.trouble is not None:
            troubles.append(Trouble(ended.trouble, ended.how))
        share = sum(passed) / len(tests)
        return Scored(share if self.params.partial_credit else float(share == 1), troubles[0] if troubles else None)


def has_passed(test: Any, answer: Mapping[str, Any]) -> bool:
    """Whether the code did what the test asks for. Printed lines are compared without whitespace at their ends."""
    if isinstance(test, str):
        return answer.get("passed") is True
    return "output" in answer and lines_of_output(answer["output"]) == lines_of_output(test["output"])


def lines_of_output(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def bare_surroundings() -> dict[str, str]:
    """What code of a policy is given of our variables: none that may hold a secret."""
    return surroundings({name: os.environ[name] for name in ("PATH", "LANG", "SLIPWAY_RUN") if name in os.environ})


def tests_in(text: str, column: str) -> list[Any]:
    """The tests that a column holds: programs, or {"input", "output"}. Raises `Unscorable` if one of them is neither."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    tests = found if isinstance(found, list) else [text]
    hint = (
        "It holds a Python program, or a JSON list of programs or of {input, output}. Correct it, or leave the row out."
    )
    if not tests:
        raise Unscorable(f"the column '{column}' holds no test", hint)
    for number, test in enumerate(tests, start=1):
        if (
            isinstance(test, dict)
            and set(test) == {"input", "output"}
            and all(isinstance(v, str) for v in test.values())
        ):
            continue
        try:
            if not isinstance(test, str) or not test.strip():
                raise SyntaxError("it is no program")
            with warnings.catch_warnings(action="ignore"):
                compile(test, "test", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            said = error.msg if isinstance(error, SyntaxError) else str(error)
            raise Unscorable(f"test {number} of the column '{column}' cannot be run: {said}", hint) from None
    return tests
