"""What a function of the user's observes where the policy has ended a turn: called in a process of its own, as rewards are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.errors import Problem, RewardError
from stages.lib.on_policy.contained_calls import Called, Means, Trouble, call_arguments
from stages.lib.on_policy.episode_params import EpisodeParams
from stages.lib.on_policy.reward_values import Unscorable
from stages.lib.on_policy.samples import problem_at
from stages.lib.on_policy.user_functions import parameters_of
from stages.lib.processes.contained import ProgramLimits
from stages.lib.text.chat_template import Messages
from stages.lib.text.prompts import PromptRow

WHERE = "episodes"


class EndedTurn(NamedTuple):
    """A turn that the policy has ended."""

    row: PromptRow
    turns: Messages
    """What stands between the prompt and this turn."""
    text: str


class Observed(NamedTuple):
    """What the policy is to read next; None where its episode is done."""

    text: str | None
    trouble: Trouble | None = None


class Observer:
    """The user's function, as its file was when the params were read: what becomes of it during the step changes nothing."""

    def __init__(self, params: EpisodeParams, means: Means) -> None:
        source, path = params.source, str(params.path)
        self.params = params
        self.parameters = parameters_of(source, params.function, path)
        limits = ProgramLimits(params.max_seconds, params.max_load_seconds, int(params.max_memory_gib * (1 << 30)))
        self.called = Called(WHERE, path, source, params.function, limits, means.asked_to_stop)

    def arguments(self, turn: EndedTurn) -> dict[str, Any]:
        """What the function is called with. Raises `Unscorable` where the row lacks something that it asks for."""
        columns = turn.row.row.get("columns", {})
        given = {"prompt": turn.row.prompt, "completion": turn.text, "turns": turn.turns, "columns": columns}
        return call_arguments(self.params.function, self.parameters, given, columns)

    def check(self, rows: Iterable[PromptRow]) -> None:
        """Raises `RewardError` if the file cannot be run, or with how many rows lack something and the first of them.

        The function is not called.
        """
        total, failed, first = 0, 0, None
        for row in rows:
            total += 1
            try:
                self.arguments(EndedTurn(row, (), ""))
            except Unscorable as error:
                failed += 1
                first = first or problem_at(WHERE, row.index, row.row, error)
        if first is not None:
            what = f"cannot be used with {failed:,} of {total:,} rows: {first.what}"
            raise RewardError(Problem(first.where, what, first.hint))
        self.called.run([], "text")

    def observe(self, turns: Sequence[EndedTurn]) -> list[Observed]:
        """What follows upon each turn.

        Raises `RewardError` with the first turn that there was trouble with, if nothing is to be said in its place.
        """
        instead = self.params.on_error
        found = []
        calls = [self.arguments(turn) for turn in turns]
        for turn, each in zip(turns, self.called.texts(calls, goes_on=instead is not None), strict=False):
            found.append(self.in_trouble(turn, each) if isinstance(each, Trouble) else Observed(each))
        return found

    def in_trouble(self, turn: EndedTurn, trouble: Trouble) -> Observed:
        """What stands in the place of an observation. Raises `RewardError` where nothing is to."""
        if self.params.on_error is None:
            hint = "Correct the function, or write `on_error`: what the policy reads then."
            raise RewardError(problem_at(WHERE, turn.row.index, turn.row.row, Unscorable(trouble.what, hint)))
        return Observed(self.params.on_error, trouble)
