"""How what a reward model says is read as one score: its heads and attributes, or the steps of an answer.

It stands in the model's config.json, under `slipway_reward`, so that all who load the model read the same. A model without
it has one output, which is the score. Imports no torch, because `slipway plan` reads it.

B: sequences, H: heads, A: attributes, O = H x A: outputs of the model, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ArtifactError, Problem
from pipeline.store.artifact import REWARD_READING

if TYPE_CHECKING:
    import torch

StepsScore = Literal["min", "product", "last"]


@dataclass(frozen=True)
class RewardReading:
    """How the outputs of a model that scores whole answers become a score."""

    heads: int = 1
    """Heads on one backbone, each of which scores all attributes: an ensemble."""
    attributes: tuple[str, ...] = ("score",)
    """What each output of a head rates."""
    weights: tuple[float, ...] = (1.0,)
    """What each attribute counts in the score."""
    uncertainty_penalty: float = 0.0
    """How many standard deviations over heads are taken off their mean: the caller's choice, which no config holds."""

    @property
    def num_outputs(self) -> int:
        return self.heads * len(self.attributes)

    @property
    def is_plain(self) -> bool:
        """Whether the model's one output is the score."""
        return self.num_outputs == 1 and self.weights == (1.0,)

    @property
    def labels(self) -> list[str]:
        """A name for each output."""
        if self.heads == 1:
            return list(self.attributes)
        return [f"{attribute}_{head}" for head in range(self.heads) for attribute in self.attributes]

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of it; nothing where the one output is the score."""
        if self.is_plain:
            return {}
        labels = dict(enumerate(self.labels))
        said = {"heads": self.heads, "attributes": list(self.attributes), "weights": list(self.weights)}
        return {REWARD_READING: said, "id2label": labels, "label2id": {name: number for number, name in labels.items()}}

    def scores_by_head(self, output_BO: torch.Tensor) -> torch.Tensor:
        """B x H: what each head says of the whole answer."""
        import torch

        from stages.lib.formulas.reward_losses import weighted_score

        output_BHA = output_BO.unflatten(1, (self.heads, len(self.attributes)))
        return weighted_score(output_BHA, torch.tensor(self.weights))

    def score(self, output_BO: torch.Tensor) -> torch.Tensor:
        """B: the score of each answer."""
        from stages.lib.formulas.reward_losses import cautious_score

        if self.is_plain:
            return output_BO.squeeze(-1)
        return cautious_score(self.scores_by_head(output_BO), self.uncertainty_penalty)


@dataclass(frozen=True)
class StepsReading:
    """How the outputs of a process reward model, two for each token, become a score."""

    step_separator: str
    """The text that ends each step, the last one included; the model is read at its last token."""
    answer_score: StepsScore
    """How the steps' probabilities of being right become the score of an answer: see `reward_losses.score_of_steps`."""

    @property
    def num_outputs(self) -> int:
        """For each token: wrong and right."""
        return 2

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of it."""
        labels = {0: "wrong", 1: "right"}
        return {
            REWARD_READING: asdict(self),
            "id2label": labels,
            "label2id": {name: number for number, name in labels.items()},
        }


def reading_in(config: Mapping[str, Any], where: str) -> RewardReading | StepsReading:
    """How the model of this config is to be read. Raises `ArtifactError` if it says something else."""
    said = config.get(REWARD_READING)
    if said is None:
        return RewardReading()
    try:
        if "step_separator" in said:
            return StepsReading(**said)
        return RewardReading(int(said["heads"]), tuple(said["attributes"]), tuple(map(float, said["weights"])))
    except (TypeError, KeyError, ValueError):
        problem = Problem(
            where, f"its config.json says {said!r} as {REWARD_READING}", "Name the artifact of a reward stage."
        )
        raise ArtifactError(problem) from None


def with_penalty(
    reading: RewardReading | StepsReading, uncertainty_penalty: float, where: str
) -> RewardReading | StepsReading:
    """The reading with the penalty that its caller asks for. Raises `ArtifactError` where there is nothing to be uncertain about."""
    if not uncertainty_penalty:
        return reading
    if isinstance(reading, StepsReading) or reading.heads == 1:
        what = (
            f"has one head, and uncertainty_penalty is {uncertainty_penalty:g}, which weighs how far several are apart"
        )
        raise ArtifactError(
            Problem(where, what, "Remove uncertainty_penalty, or train a reward model with heads: 4 or so.")
        )
    return replace(reading, uncertainty_penalty=uncertainty_penalty)
