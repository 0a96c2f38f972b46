"""The date that chat templates are told: the same on every day, because an artifact made tomorrow must be the one made today."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import wraps
from typing import Annotated, Any

from pydantic import AfterValidator

from pipeline.settings.strict import Strict
from pipeline.stage import Context, Result

DEFAULT = "2024-07-26"
"""That of Llama's templates, which write it where nobody tells them any."""

TOLD = [DEFAULT]
"""What templates are told now, the last one."""


def told_date() -> date:
    """The day on which templates are rendered."""
    return date.fromisoformat(TOLD[-1])


@contextmanager
def telling(day: str) -> Iterator[None]:
    """Templates are told this day, as 2025-01-31, within the block."""
    TOLD.append(day)
    try:
        yield
    finally:
        TOLD.pop()


def iso_day(value: str) -> str:
    try:
        day = date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is no date: write one as {DEFAULT}") from None
    if not 1970 <= day.year <= 9999 or day.isoformat() != value:
        raise ValueError(f"{value!r} is no date: write one as {DEFAULT}")
    return value


class TemplateDateParams(Strict):
    """A stage that renders chats."""

    template_date: Annotated[str, AfterValidator(iso_day)] = DEFAULT
    """The date, as 2025-01-31, for chat templates that write today's (`strftime_now`: Llama 3.1 to 3.3, gpt-oss and others do). It is a part of the artifact, and no other day changes it."""


def on_template_date(run: Callable[[Context, Any], Result]) -> Callable[[Context, Any], Result]:
    """The stage's `run`, with templates told the date of its params."""

    @wraps(run)
    def dated(ctx: Context, params: Any) -> Result:
        with telling(params.template_date):
            return run(ctx, params)

    return dated
