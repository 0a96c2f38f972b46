"""Rewards that run what others wrote, each in a process of its own: a user's function, a package, a completion's code.

Whatever that does, this process goes on: what hangs, forks, eats memory, dies, raises or gives no number is ended with all
that it started, and told as a `Trouble` of the completion that it happened with. To add one: a params class in `AnyContained` of
reward_params.py, a class here, and a line in `CONTAINED`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RewardError
from stages.lib.on_policy import json_answers, math_answers
from stages.lib.on_policy.code_tests import CodeScorer
from stages.lib.on_policy.contained_calls import (
    Called,
    ContainedScorer,
    Means,
    Scored,
    Trouble,
    call_arguments,
    called_here,
    extracted,
    limits_of,
    or_zero,
    prepared_for,
)
from stages.lib.on_policy.reward_params import (
    FileReward,
    JsonSchemaReward,
    MathVerifyReward,
    Reward,
    reward_names,
)
from stages.lib.on_policy.reward_values import Unscorable
from stages.lib.on_policy.samples import Sample, column_text, problem_of
from stages.lib.on_policy.user_functions import parameters_of


@dataclass
class FileScorer:
    """A user's function, as its file was when the params were read: what becomes of it during the step changes nothing."""

    name: str
    params: FileReward
    means: Means

    def __post_init__(self) -> None:
        path, source = self.params.path, self.params.source
        self.parameters = parameters_of(source, self.params.function, str(path))
        limits = limits_of(self.params, self.params.max_load_seconds)
        self.called = Called(
            f"rewards.{self.name}", str(path), source, self.params.function, limits, self.means.asked_to_stop
        )

    def prepare(self, sample: Sample) -> dict[str, Any]:
        columns = sample.row.get("columns", {})
        given = {
            "prompt": sample.prompt,
            "completion": sample.completion.text,
            "ended": sample.completion.ended,
            "num_tokens": sample.completion.num_tokens,
            "columns": columns,
        }
        if sample.completion.turns is not None:
            given["turns"] = sample.completion.turns
        return call_arguments(self.params.function, self.parameters, given, columns)

    def faults(self, prepared: Sequence[Any]) -> Iterator[tuple[int, Unscorable]]:
        self.called.run([])
        yield from ()

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        instead = self.params.on_error
        found = []
        calls = prepared_for(self, self.name, samples)
        for sample, each in zip(samples, self.called.each(calls, goes_on=instead is not None), strict=False):
            if not isinstance(each, Trouble):
                found.append(Scored(each))
            elif instead is not None:
                found.append(Scored(instead, each))
            else:
                hint = "Correct the function, or write `on_error`: what such a completion gets."
                raise RewardError(problem_of(self.name, sample.row_index, sample.row, Unscorable(each.what, hint)))
        return found


@dataclass
class MathScorer:
    """Answers compared by math-verify."""

    name: str
    params: MathVerifyReward
    means: Means

    def prepare(self, sample: Sample) -> dict[str, Any]:
        gold, is_latex = column_text(sample.row, self.params.column), self.params.column_is == "latex"
        if not is_latex and "\\" in gold and not any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\[")):
            what = f"the column '{self.params.column}' holds LaTeX that nothing marks: {gold[:80]!r}"
            raise Unscorable(what, "Write `column_is: latex`, or put dollar signs around it.")
        return {"completion": sample.completion.text, "gold": gold, "is_latex": is_latex}

    def faults(self, prepared: Sequence[Any]) -> Iterator[tuple[int, Unscorable]]:
        golds = list(dict.fromkeys(each["gold"] for each in prepared))
        is_latex = self.params.column_is == "latex"
        calls = [{"gold": gold, "is_latex": is_latex} for gold in golds]
        called = called_here(self.name, math_answers, "holds_answer", "load_math", self.params, self.means)
        answers = dict(zip(golds, called.each(calls), strict=True))
        for place, each in enumerate(prepared):
            found = answers[each["gold"]]
            if found != 1.0:
                why = f" ({found.what})" if isinstance(found, Trouble) else ""
                what = f"math-verify finds no answer in the column '{self.params.column}': {each['gold'][:80]!r}{why}"
                yield place, Unscorable(what, "Correct the column, write `column_is: latex`, or leave the row out.")

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        called = called_here(self.name, math_answers, "same_answer", "load_math", self.params, self.means)
        return or_zero(called.each(prepared_for(self, self.name, samples)))


@dataclass
class SchemaScorer:
    """JSON held to a schema by jsonschema."""

    name: str
    params: JsonSchemaReward
    means: Means
    schemas: dict[str, Any] = field(default_factory=dict)
    """Those that were read from columns."""

    def prepare(self, sample: Sample) -> dict[str, Any]:
        schema = self.params.json_schema if self.params.column is None else self.schema_in(sample)
        return {"text": extracted(self.params.extract, sample.completion.text), "schema": schema}

    def schema_in(self, sample: Sample) -> Any:
        assert self.params.column is not None
        text = column_text(sample.row, self.params.column)
        if text not in self.schemas:
            try:
                schema = json.loads(text, parse_constant=json_answers.refuse_constant)
                fault = json_answers.schema_fault(schema)
            except (ValueError, RecursionError) as error:
                fault = f"it is no JSON: {error}"
            if fault:
                what = f"the column '{self.params.column}' holds no JSON schema: {fault}"
                raise Unscorable(what, "Correct the column, or leave the row out.")
            self.schemas[text] = schema
        return self.schemas[text]

    def faults(self, prepared: Sequence[Any]) -> Iterator[tuple[int, Unscorable]]:
        yield from ()

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        called = called_here(self.name, json_answers, "is_valid", "load_jsonschema", self.params, self.means)
        return or_zero(called.each(prepared_for(self, self.name, samples)))


CONTAINED: dict[str, Callable[[str, Any, Means], ContainedScorer]] = {
    "file": FileScorer,
    "math_verify": MathScorer,
    "json_schema": SchemaScorer,
    "code_tests": CodeScorer,
}
"""Kind -> what makes the scorer from the reward's name and its params."""


def contained_scorers(rewards: Sequence[Reward], means: Means) -> dict[str, ContainedScorer]:
    """The scorers of those rewards that run in processes of their own, by name."""
    named = zip(reward_names(rewards), rewards, strict=True)
    return {name: CONTAINED[params.kind](name, params, means) for name, params in named if params.kind in CONTAINED}
