"""Which of the measured steps is the best, and whether there is any use in going on: functions of what was measured alone.

What a recipe says of it stands here too. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from pipeline.errors import did_you_mean, shown
from pipeline.settings.strict import Strict
from stages.lib.formulas.bounds import Weight

Better = Literal["lower", "higher"]

BETTER: dict[str, Better] = {
    "heldout_loss": "lower",
    "heldout_perplexity": "lower",
    "heldout_perplexity_ratio": "lower",
    "heldout_kl": "lower",
    "heldout_calibration_error": "lower",
    "heldout_mse": "lower",
    "heldout_mse_of_*": "lower",
    "heldout_token_accuracy": "higher",
    "heldout_agreement": "higher",
    "heldout_accuracy": "higher",
    "heldout_accuracy_plain": "higher",
    "heldout_accuracy_per_token": "higher",
    "heldout_accuracy_of_*": "higher",
    "heldout_margin": "higher",
    "heldout_auc": "higher",
    "heldout_correlation": "higher",
    "heldout_correlation_of_*": "higher",
    "heldout_answer_accuracy": "higher",
    "heldout_answer_auc": "higher",
    "heldout_macro_f1": "higher",
    "heldout_f1": "higher",
    "heldout_f1_of_*": "higher",
    "heldout_f1_has_answer": "higher",
    "heldout_precision": "higher",
    "heldout_recall": "higher",
    "heldout_exact_match": "higher",
    "heldout_exact_match_has_answer": "higher",
    "heldout_exact_match_no_answer": "higher",
}
"""Held-out metrics of which it is known which way is better; `*` stands for a name that data decides. Of all others a recipe says it."""

TOKEN_METRICS = ("heldout_loss", "heldout_perplexity", "heldout_token_accuracy")
"""What every model of tokens is measured by."""

Measured = Sequence[tuple[int, float]]
"""(optimizer step, value) of one metric, in the order of the steps."""


class Watched(Strict):
    """A held-out metric, and which way it is better."""

    metric: str = Field(min_length=1)
    """The held-out metric by which the measured steps are compared, such as heldout_loss."""
    better: Better | None = None
    """Whether a lower or a higher value is the better one. null: as is known of the metric; of metrics that can be read either way, as heldout_score, it must be said."""

    @property
    def direction(self) -> Better:
        """Which way is better: known, or said."""
        direction = self.better or known_direction(self.metric)
        assert direction is not None, "checked with the params"
        return direction


class PublishBest(Watched):
    """Which of the measured steps is published."""


class StopEarly(Watched):
    """When a training ends before its last step."""

    patience: int = Field(ge=1)
    """Measurements in a row without an improvement after which training ends."""
    least_improvement: Weight = 0.0
    """By how much more than this a value must be better than the last improvement before it, in order to be one."""


def known_direction(metric: str) -> Better | None:
    """Which way a metric is better, as far as the table knows it."""
    if metric in BETTER:
        return BETTER[metric]
    return next((better for name, better in BETTER.items() if "*" in name and fnmatchcase(metric, name)), None)


def watched_problem(param: str, watched: Watched, measures: Sequence[str]) -> str | None:
    """What is wrong with a metric that `param` names, given those that the stage measures (none: not known yet)."""
    metric = watched.metric
    if measures and not any(fnmatchcase(metric, name) and "*" not in metric for name in measures):
        nearest = did_you_mean(metric, measures)
        hint = f" ({nearest})" if nearest.startswith("Did") else ""
        return f"{param}.metric: the stage does not measure {shown(metric)}{hint}; it measures {', '.join(measures)}"
    known = known_direction(metric)
    if known is None and watched.better is None:
        return f"{param}.better: {metric} can be read either way: write `better: lower` or `better: higher`"
    if known is not None and watched.better not in (None, known):
        return f"{param}.better: {metric} is better when it is {known}, not {watched.better}: remove `better`"
    return None


def gain(value: float, over: float, better: Better) -> float:
    """By how much a value is better than another one; below 0 where it is worse."""
    return over - value if better == "lower" else value - over


def best_step(measured: Measured, better: Better) -> int | None:
    """The step with the best value, of equals the earliest; None where nothing was measured."""
    best: tuple[int, float] | None = None
    for step, value in measured:
        if best is None or gain(value, best[1], better) > 0:
            best = step, value
    return best[0] if best else None


def measured_in_vain(measured: Measured, better: Better, least_improvement: float = 0.0) -> int:
    """How many measurements in a row, up to the last, were no improvement. The first of all is one."""
    waited, reference = 0, None
    for _, value in measured:
        if reference is None or gain(value, reference, better) > least_improvement:
            waited, reference = 0, value
        else:
            waited += 1
    return waited
