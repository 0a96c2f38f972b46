"""The steps of a plan that have to run, as links: each says after which others it can begin."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import Problem, RecipeError
from pipeline.running.plan import Action, Plan, Step


@dataclass(frozen=True)
class Link:
    """A step that has to run, and the names of the links that make what it reads."""

    step: Step
    after: tuple[str, ...]


def links_of(plan: Plan) -> list[Link]:
    """The steps that have to run, in order. Raises one `RecipeError` with all that can never begin.

    A step that is running counts, and so does one that waits for what another link makes.
    """
    links: list[Link] = []
    makers: dict[str, str] = {}
    problems = []
    for step in plan.chosen:
        if step.action is Action.SKIP:
            continue
        lacking = [name for name in step.reason.waits_for if name not in makers.values()]
        if lacking:
            what, hint = f"needs {', '.join(lacking)}, which this command does not submit", "Leave out --only."
            problems.append(Problem(f"stages.{step.name}", what, hint))
        elif step.reason.refused:
            problems.append(Problem(f"stages.{step.name}", str(step.reason)))
        else:
            after = dict.fromkeys(makers[each] for each in step.input_ids.values() if each in makers)
            links.append(Link(step, tuple(after)))
        makers[step.artifact_id] = step.name
    if problems:
        raise RecipeError(*problems)
    return links
