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
from stages.lib.processes.contained import Ended, run_contained, surroundings


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
        """Those whose tests an empty program passes, all of them, or with `partial_credit` one: so would whatever a policy writes."""
        passed = self.passed_by_nothing([test for each in prepared for test in each["tests"] if isinstance(test, str)])
        for place, each in enumerate(prepared):
            empty = [test in passed if isinstance(test, str) else has_passed(test, NOTHING) for test in each["tests"]]
            if self.params.partial_credit and any(empty) and not all(empty):
                which = f"test {empty.index(True) + 1} of the column '{self.params.column}'"
                what = f"an empty program passes {which}, and partial_credit pays for it"
                yield place, Unscorable(what, "Take that test out, leave the row out, or set partial_credit: false.")
            elif all(empty):
                what = f"an empty program passes the tests of the column '{self.params.column}', so they test nothing"
                hint = (
                    "Have them call the code and raise where it is wrong (after a definition of `check` comes its call),"
                    " and not below `if __name__ == '__main__'`; or leave the row out."
                )
                yield place, Unscorable(what, hint)

    def passed_by_nothing(self, programs: Sequence[str]) -> set[str]:
        """Those test programs that raise nothing without any code, each run once, as many in one process as it can bear."""
        waiting, passed = list(dict.fromkeys(programs)), set()
        while waiting:
            ended = self.run("", waiting, "")
            answers = ended.answers[1:]
            passed |= {test for test, answer in zip(waiting, answers, strict=False) if has_passed(test, answer)}
            waiting = waiting[len(answers) + (ended.trouble is not None) :]
        return passed

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        prepared = prepared_for(self, self.name, samples)
        with ThreadPoolExecutor(self.means.at_a_time) as pool:
            return list(pool.map(self.outcome, prepared))

    def outcome(self, prepared: Mapping[str, Any]) -> Scored:
        """What one completion gets, and the first trouble that its code made."""
        if prepared["code"] is None:
            return Scored(0.0)
        tests, secret = prepared["tests"], secrets.token_hex(16)
        ended = self.run(prepared["code"], tests, secret)
        answers = ended.answers[1:]
        if any(answer.get("secret") != secret for answer in answers):
            return Scored(0.0, Trouble("died", "it wrote where only its outcome belongs"))
        passed = [has_passed(test, answer) for test, answer in zip(tests, answers, strict=False)]
        troubles = [Trouble(answer["trouble"], answer["what"]) for answer in answers if "trouble" in answer]
        if ended.trouble is not None:
            troubles.append(Trouble(ended.trouble, ended.how))
        share = sum(passed) / len(tests)
        return Scored(share if self.params.partial_credit else float(share == 1), troubles[0] if troubles else None)

    def run(self, code: str, tests: Sequence[Any], secret: str) -> Ended:
        """Runs the code against the tests, which are told without the outputs that they ask for."""
        asked = [each if isinstance(each, str) else {"input": each["input"]} for each in tests]
        request = {"code": code, "tests": asked, "secret": secret}
        return run_contained(
            CALLER, request, 1 + len(tests), limits_of(self.params), bare_surroundings(), self.means.asked_to_stop
        )


NOTHING = {"output": ""}
"""What a program that does nothing answers to an input."""


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


HINT = (
    "It holds a Python program, a JSON list of programs or of {input, output}, or a JSON object {inputs, outputs} of two lists."
    " Correct it, or leave the row out."
)


def tests_in(text: str, column: str) -> list[Any]:
    """The tests that a column holds: programs, or {"input", "output"}. Raises `Unscorable` if one of them is neither."""
    tests = listed_tests(text, column)
    if not tests:
        raise Unscorable(f"the column '{column}' holds no test", HINT)
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
            raise Unscorable(f"test {number} of the column '{column}' cannot be run: {said}", HINT) from None
    return tests


def listed_tests(text: str, column: str) -> list[Any]:
    """What stands in a column's JSON, as a list; what is no JSON is one program.

    {"inputs": [...], "outputs": [...]} is the form of APPS (Hendrycks et al., 2021) and TACO (Li et al., 2023). Raises
    `Unscorable` for JSON that is neither: as a Python program it would be an expression, which every code passes.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    match found:
        case list():
            return found
        case {"fn_name": _, **_others}:
            what = f"the column '{column}' holds calls of a function (fn_name), which are not read"
            raise Unscorable(what, "Write each as a program, such as `assert add(1, 2) == 3`, or leave the row out.")
        case {"inputs": list(inputs), "outputs": list(outputs), **others} if not others:
            if len(inputs) != len(outputs):
                what = f"the column '{column}' holds {len(inputs)} inputs and {len(outputs)} outputs"
                raise Unscorable(what, HINT)
            return [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
    raise Unscorable(f"the column '{column}' holds JSON that is no tests: {text.strip()[:80]!r}", HINT)
