"""What a recipe says of episodes of several turns. Imports no torch, because `slipway plan` reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from pipeline.settings.strict import OutsideFile, Strict
from stages.lib.on_policy.user_functions import parameters_of, text_of_program


class EpisodeParams(Strict):
    """How an episode goes on where the policy has ended a turn: by what a function of the user's own observes."""

    path: OutsideFile
    """The Python file. Its content is part of what the step's result is known by; what else it reads or imports is not."""
    function: str
    """The function, a `def` at the top level of the file, called in a process of its own where the policy ends a turn. It is given, by name, what its parameters ask for: `completion` (the text of this turn), `turns` (messages of the episode before it: the policy's turns and the observations between them), `prompt` (messages), `columns` (all that the row carries, by name), and single columns by their own names. It gives a text, which the policy reads as the next message, or None where the episode is done. It keeps nothing between calls: what it has to know stands in its arguments."""
    max_turns: int = Field(default=4, ge=2, le=1000)
    """Most turns of the policy in an episode. After the last one the function is not called."""
    role: Literal["tool", "user"] = "tool"
    """As whom the observation stands in the chat template. A template that knows no tools has what they return as a user's message, between marks."""
    max_observation_tokens: int = Field(default=256, ge=1)
    """Longest observation, in tokens of its text; what is beyond is cut off, and counted. What the template writes around it comes on top. All of it counts in max_new_tokens."""
    max_seconds: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Most seconds of wall-clock time for one call. Far above what it should take: how busy the machine is counts as well."""
    max_memory_gib: Annotated[float, Field(ge=0.125, le=65_536)] = 4.0
    """Most memory, in GiB, of the process and all that it starts."""
    max_load_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Most seconds for the file itself to run, with all that it imports."""
    on_error: str | None = None
    """What the policy reads where the function hangs, raises, takes too much or gives neither a text nor None; each is counted. null: the stage stops, and says for which row."""

    _source: str = PrivateAttr()

    @property
    def source(self) -> str:
        """What the file said when these params were read: before its digest was compared with the step's."""
        return self._source

    @model_validator(mode="after")
    def check_function(self) -> EpisodeParams:
        self._source = text_of_program(self.path)
        parameters_of(self._source, self.function, str(self.path))
        return self

    def require_fit(self, rendering: str, generation: str, max_new_tokens: int) -> None:
        """Raises `ValueError` with all that hinders episodes in the other params of the stage."""
        wrong = []
        if rendering == "raw":
            wrong.append("rendering: raw has no turns that an observation could stand between: write rendering: chat")
        if generation == "vllm":
            wrong.append("generation: vllm writes single turns here: write generation: transformers")
        if self.max_observation_tokens >= max_new_tokens:
            wrong.append(
                f"max_observation_tokens {self.max_observation_tokens} must be below max_new_tokens {max_new_tokens},"
                " which an observation is a part of: lower the one, or raise the other"
            )
        if wrong:
            raise ValueError("episodes: " + "; ".join(wrong))
