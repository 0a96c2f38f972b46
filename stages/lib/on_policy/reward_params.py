"""What a recipe says of its rewards. Imports no torch, because `slipway plan` reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from pipeline.errors import did_you_mean
from pipeline.settings.strict import OutsideFile, Strict
from stages.lib.formulas.bounds import Scale, SignedWeight, Weight
from stages.lib.on_policy.json_answers import schema_fault
from stages.lib.on_policy.user_functions import parameters_of, text_of_program

LEARNED = "reward_model"
"""The kind of the reward that is no function."""


def compiles(pattern: str) -> str:
    """The pattern, if it is a regular expression that says anything."""
    if not pattern:
        raise ValueError("'' matches every text")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(compiles)]
"""A regular expression as Python's `re` reads it; flags stand in it, such as (?s) for a dot that matches line breaks."""


class WeightedReward(Strict):
    """What all rewards have in common."""

    weight: SignedWeight = 1.0
    """What the reward is multiplied by before the rewards of a completion are added up; below 0, it is a penalty. Not 0."""

    @field_validator("weight")
    @classmethod
    def check_weight(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("is 0, so the reward counts for nothing. Leave the reward out, or give it a weight.")
        return weight


class LearnedReward(WeightedReward):
    """The score of a reward model."""

    kind: Literal["reward_model"]
    """The score that the reward model gives, which is the stage's input `reward`."""
    uncertainty_penalty: Weight = Field(default=0.0, exclude_if=lambda penalty: not penalty)
    """How many standard deviations over the heads of an ensemble are taken off their mean, so that completions on which the heads disagree earn less. Only where the reward model has several heads."""


class ExactMatchReward(WeightedReward):
    """Whether the completion says what a column of its row says."""

    kind: Literal["exact_match"]
    """1 where the completion and a column of its row are the same, else 0. Whitespace at the ends never counts."""
    column: str = Field(min_length=1)
    """The column that holds the answer: one that the row's source names in `carry`. Numbers and truth values are compared as JSON writes them; 1,000 and 1000 differ."""
    extract: Pattern | None = None
    """A regular expression that finds the answer, in the completion and in the column alike: the first group of its last match, or the whole match where it has no group. Matches of nothing but whitespace do not count. A completion without a match gets 0, a column without one is an error. null: the answer is the whole text."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""


class RegularExpressionReward(WeightedReward):
    """Whether a regular expression matches the completion."""

    kind: Literal["regular_expression"]
    """1 where a regular expression matches the completion, else 0."""
    pattern: Pattern
    """The regular expression, as Python's `re` reads it; (?s) at its beginning lets a dot match line breaks, (?i) ignores case."""
    whole: bool = False
    """Whether it must match the completion from its first to its last character. Otherwise it may match anywhere in it."""


class LengthPenaltyReward(WeightedReward):
    """What a completion loses by being long."""

    kind: Literal["length_penalty"]
    """0 up to a number of tokens, and from there less with every token."""
    target_tokens: int = Field(ge=0)
    """Longest completion without a penalty, in tokens, the one that ends it included."""
    per_token: Scale
    """What each token beyond target_tokens costs."""
    max_penalty: Scale = 1.0
    """Most that a completion loses, however long it is."""


class FormatReward(WeightedReward):
    """Whether the completion has the wanted form."""

    kind: Literal["format"]
    """1 where the completion holds all parts in order and, if asked, ends; else 0, or with partial_credit a share of 1."""
    parts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Texts that must stand in the completion in this order, such as ["<think>", "</think>"]. Anything may stand between them, and each may stand there more than once."""
    must_end: bool = True
    """Whether the policy must have ended the completion itself, rather than being cut off at the limit."""
    whole: bool = False
    """Whether the completion must also begin with the first part and end with the last, whitespace at the ends aside."""
    partial_credit: bool = False
    """Whether what is fulfilled is rewarded in proportion: each part in order counts once, and so do the end (must_end), the beginning and the last part's place (whole). It teaches a policy that never gets everything right by chance, which without it sees no difference between its completions."""


class ContainedReward(WeightedReward):
    """What rewards have in common that run what others wrote, in a process of its own."""

    max_seconds: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Most seconds of wall-clock time for one completion (code_tests: for one test). Far above what it should take: how busy the machine is counts as well."""
    max_memory_gib: Annotated[float, Field(ge=0.125, le=65_536)] = 4.0
    """Most memory, in GiB, of the process and all that it starts."""


class FileReward(ContainedReward):
    """What a function in a Python file of the user's says."""

    kind: Literal["file"]
    """The number that a function of your own gives for a completion. It runs in a process of its own, a new one for each rollout."""
    path: OutsideFile
    """The Python file. Its content is part of what the step's result is known by; what else it reads or imports is not."""
    function: str
    """The function, a `def` at the top level of the file. It is given, by name, what its parameters ask for: `prompt` (messages, or a text), `completion` (its text), `ended` (whether the policy ended it itself), `num_tokens`, `columns` (all that the row carries, by name), and single columns by their own names; with `episodes`, where `completion` is the last turn, also `turns` (the messages between it and the prompt). It gives one finite number."""
    max_load_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Most seconds for the file itself to run, with all that it imports."""
    on_error: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    """What a completion gets for which the function hangs, raises, takes too much or gives no finite number; each is counted. null: the stage stops, and says for which row."""

    _source: str = PrivateAttr()

    @property
    def source(self) -> str:
        """What the file said when these params were read: before its digest was compared with the step's."""
        return self._source

    @model_validator(mode="after")
    def check_function(self) -> FileReward:
        self._source = text_of_program(self.path)
        parameters_of(self._source, self.function, str(self.path))
        return self


class MathVerifyReward(ContainedReward):
    """Whether the completion gives the same mathematical answer as a column of its row."""

    kind: Literal["math_verify"]
    """1 where the completion's last answer is, as mathematics, that of a column of its row (1/2, 0.5 and \\frac{1}{2} are the same), else 0, as the package math-verify finds and compares answers. One that takes too long to compare gets 0, and is counted."""
    column: str = Field(min_length=1)
    """The column that holds the right answer: one that the row's source names in `carry`."""
    column_is: Literal["text", "latex"] = "text"
    """text: the answer is found in the column as in a completion, the last number of it where it holds no formula. latex: the whole column is one formula without dollar signs around it, such as \\frac{1}{2} or x^2 + 1."""


class JsonSchemaReward(ContainedReward):
    """Whether the completion is JSON of a given form."""

    kind: Literal["json_schema"]
    """1 where the completion is JSON that a JSON schema allows, else 0. `format` is not looked at; NaN and Infinity are no JSON. One that takes too long to check gets 0, and is counted."""
    json_schema: dict[str, Any] | None = None
    """The schema, written as YAML; of the draft 2020-12, where it has no `$schema`. null: it stands in a column."""
    column: str | None = Field(default=None, min_length=1)
    """The column that holds the schema as JSON text: one that the row's source names in `carry`."""
    extract: Pattern | None = None
    """A regular expression that finds the JSON in the completion: the first group of its last match, or the whole match where it has no group. A completion without a match gets 0. null: the whole completion, whitespace at the ends aside."""

    @model_validator(mode="after")
    def check_schema(self) -> JsonSchemaReward:
        if (self.json_schema is None) == (self.column is None):
            raise ValueError("give json_schema, or the column that holds it: one of the two")
        if self.json_schema is not None and (fault := schema_fault(self.json_schema)):
            raise ValueError(f"json_schema: {fault}")
        return self


class CodeTestsReward(ContainedReward):
    """Whether the completion's code passes tests."""

    kind: Literal["code_tests"]
    """1 where the completion's Python code passes all tests in a column of its row, else 0. The code runs in a process of its own, without the variables of yours, as your user: it can read and write your files, and reach your network. What it prints is not kept."""
    column: str = Field(min_length=1)
    """The column that holds the tests, one that the row's source names in `carry`: a Python program that raises where the code is wrong, such as `assert add(1, 2) == 3`; or a JSON list of such programs, or of objects {"input": text, "output": text} for code that reads and prints; or a JSON object {"inputs": [...], "outputs": [...]} of the same. Tests that an empty program passes are refused."""
    extract: Pattern | None = None
    """A regular expression that finds the code in the completion: the first group of its last match, or the whole match where it has no group. A completion without a match gets 0. null: the whole completion is code."""
    partial_credit: bool = False
    """Whether a completion gets the share of tests that it passes. They run in their order, and none runs after one that had to be ended."""


def kind_of(model: type[Strict]) -> str:
    """What a recipe writes as the `kind` of such a reward."""
    return str(get_args(model.model_fields["kind"].annotation)[0])


def has_known_kind(block: Any) -> Any:
    """The block itself; an unknown kind is told in our words. Whatever else is wrong is left for pydantic to report."""
    if isinstance(block, Mapping):
        known = [kind_of(model) for model in (LearnedReward, *get_args(ProgrammaticReward), *get_args(AnyContained))]
        if "kind" not in block:
            raise ValueError(f"kind: is required ({did_you_mean('', known)})")
        if block["kind"] not in known:
            raise ValueError(f"kind: there is no reward '{block['kind']}' ({did_you_mean(str(block['kind']), known)})")
    return block


ProgrammaticReward = ExactMatchReward | RegularExpressionReward | LengthPenaltyReward | FormatReward

"""Functions of ours, computed where the policy is trained."""
AnyContained = FileReward | MathVerifyReward | JsonSchemaReward | CodeTestsReward
"""What runs in a process of its own."""


Reward = Annotated[
    LearnedReward | ProgrammaticReward | AnyContained, Field(discriminator="kind"), BeforeValidator(has_known_kind)
]
"""A block of `kind` and the fields of that kind."""


def at_most_one_learned(rewards: list[Reward]) -> list[Reward]:
    if sum(isinstance(params, LearnedReward) for params in rewards) > 1:
        raise ValueError("reward_model stands there more than once, and the stage has one input `reward`. Keep one.")
    return rewards


Rewards = Annotated[list[Reward], Field(min_length=1), AfterValidator(at_most_one_learned)]
"""The rewards of a stage: at least one, and at most one of them learned."""


# Scoring


def learned(rewards: Iterable[Reward]) -> LearnedReward | None:
    """The learned reward among them, if there is one."""
    return next((params for params in rewards if isinstance(params, LearnedReward)), None)


def programmatic(rewards: Iterable[Reward]) -> list[ProgrammaticReward]:
    """The rewards that are functions of ours, in their order."""
    return [params for params in rewards if not isinstance(params, LearnedReward | ContainedReward)]


def reward_names(rewards: Iterable[Reward]) -> list[str]:
    """A name for each reward, for metrics and messages: its kind, and from the second of a kind on with a number."""
    seen: Counter[str] = Counter()
    names = []
    for params in rewards:
        seen[params.kind] += 1
        names.append(params.kind if seen[params.kind] == 1 else f"{params.kind}_{seen[params.kind]}")
    return names
