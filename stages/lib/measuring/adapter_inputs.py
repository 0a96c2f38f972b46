"""What is wrong with adapters that are to be measured beside models, before the step runs. Imports no torch, for `plan`."""

from __future__ import annotations

from pipeline.errors import Problem
from pipeline.stage import Forecast
from stages.lib.models.adapters.folders import unreadable_adapter


def adapter_input_problems(forecast: Forecast) -> list[Problem]:
    """Nothing to measure, names that two of them have, a base that no adapter needs, folders that hold no adapter."""
    names = {role: {r.partition(".")[2] for r in forecast.inputs if r.startswith(f"{role}.")} for role in GROUPS}
    problems = []
    if not any(names.values()):
        problems.append(Problem("inputs", "there is no model to measure", "Add models, or adapters with their base."))
    for name in sorted(names["models"] & names["adapters"]):
        what = "is the name of a model too, and measures are told apart by their names"
        problems.append(Problem(f"inputs.adapters.{name}", what, "Give one of the two another name."))
    if names["adapters"] and not names["models"] and "base" not in forecast.inputs:
        what = "are put on the model that they were trained on, and there is none"
        problems.append(
            Problem("inputs.adapters", what, "Add it to models; or as base, where it need not be measured.")
        )
    if "base" in forecast.inputs and not names["adapters"]:
        problems.append(Problem("inputs.base", "is what adapters are put on, and there are none", "Move it to models."))
    for role, known in forecast.inputs.items():
        if role.startswith("adapters.") and known.folder is not None:
            problems += unreadable_adapter(known.folder, f"inputs.{role}")
    return problems


GROUPS = ("models", "adapters")
"""The roles of language models that are measured."""
