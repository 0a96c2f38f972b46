"""Losses of single scores, ratings and steps: values and gradients by formula, in slow loops and by transformers' own loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForTokenClassification, PreTrainedTokenizerFast

from pipeline.errors import DataError
from stages.lib.formulas.calibration import correlation
from stages.lib.formulas.reward_losses import (
    binary_loss,
    cautious_score,
    ordinal_loss,
    score_of_steps,
    squared_loss,
    weighted_score,
)
from stages.lib.preferring.bootstrap import bootstrap_weights, mean_over_heads
from stages.lib.preferring.labelled_steps import RIGHT, UNKNOWN, WRONG, StepsObjective, require_seen
from stages.lib.preferring.rated_objective import RatedObjective
from stages.lib.preferring.reward_reading import RewardReading
from stages.lib.preferring.scoring_params import ScoringParams

TRAINING: dict[str, Any] = {"global_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "max_length_tokens": 64}
LEVELS = [0.0, 1.0, 2.0, 4.0]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


class Saying(torch.nn.Module):
    """A model that says what it was told to, whatever it is asked."""

    def __init__(self, output: list[Any]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(output))

    def forward(self, **inputs: Any) -> Any:
        return self


BATCH = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


def test_binary_loss() -> None:
    """log 2 at 0; of score 2: log(1 + e^-2) if good, 2 + log(1 + e^-2) if bad; the slope is sigmoid(s) - y."""
    score = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = binary_loss(score, torch.tensor([True, True, False]))
    small = math.log(1 + math.exp(-2))
    assert loss.tolist() == pytest.approx([math.log(2), small, 2 + small], abs=1e-12)
    loss.sum().backward()
    assert score.grad is not None
    assert score.grad.tolist() == pytest.approx([-0.5, sigmoid(2) - 1, sigmoid(2)], abs=1e-12)


def test_squared_loss() -> None:
    """(1 - 3)^2 = 4 with the slope 2 (1 - 3) = -4; nothing of a score that is the rating."""
    score = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = squared_loss(score, torch.tensor([3, 3]))
    loss.sum().backward()
    assert (loss.tolist(), score.grad.tolist()) == ([4.0, 0.0], [-4.0, 0.0])  # type: ignore[union-attr]


def test_ordinal_loss_in_a_slow_loop() -> None:
    """Cuts of the levels 0, 1, 2, 4 are 1/2, 3/2 and 3: log(1 + e^-(s - c)) below the rating, log(1 + e^(s - c)) above."""
    given = [(0.3, 0.0), (-2.0, 4.0), (1.5, 2.0), (3.5, 1.0)]
    score = torch.tensor([each for each, _ in given], dtype=torch.float64, requires_grad=True)
    loss = ordinal_loss(score, torch.tensor([rating for _, rating in given]), levels=LEVELS)
    loss.sum().backward()
    for number, (value, rating) in enumerate(given):
        wanted = slope = 0.0
        for cut in (0.5, 1.5, 3.0):
            sign = 1 if rating > cut else -1
            wanted += math.log(1 + math.exp(-sign * (value - cut)))
            slope -= sign * sigmoid(-sign * (value - cut))
        assert float(loss[number].detach()) == pytest.approx(wanted, abs=1e-12)
        assert float(score.grad[number]) == pytest.approx(slope, abs=1e-12)  # type: ignore[index]


def test_the_ordinal_loss_is_least_at_a_level_between_equal_neighbours() -> None:
    """Of the levels 0, 1, 2 a rating of 1 lies between cuts as far below as above it: the slope at 1 is 0, and changes its sign."""
    score = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    ordinal_loss(score, torch.ones(3), levels=[0.0, 1.0, 2.0]).sum().backward()
    below, at, above = score.grad.tolist()  # type: ignore[union-attr]
    assert below < 0 < above
    assert at == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", ["squared", "ordinal"])
def test_missing_ratings_are_left_out(loss: str) -> None:
    """Of two answers and two attributes three ratings are there: their loss alone is summed, and the fourth output has no slope."""
    options = {"rating_loss": loss, **({"rating_levels": LEVELS} if loss == "ordinal" else {})}
    objective = RatedObjective(ScoringParams(**TRAINING, attributes={"b": 0.5, "a": 1.0}, **options), "ratings")
    model = Saying([[0.5, -1.0], [2.0, 7.0]])
    rated = [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 4.0)]
    batch = {**BATCH, "target_NA": torch.zeros(2, 2), "rated_NA": torch.zeros(2, 2, dtype=torch.bool)}
    for row, attribute, rating in rated:
        batch["target_NA"][row, attribute], batch["rated_NA"][row, attribute] = rating, True
    total = objective.loss_sum(model, batch)
    total.backward()
    said = model.logits.detach().clone().requires_grad_()
    function = squared_loss if loss == "squared" else lambda s, y: ordinal_loss(s, y, levels=LEVELS)
    wanted = sum(function(said[row, attribute], torch.tensor(rating)) for row, attribute, rating in rated)
    wanted.backward()  # type: ignore[union-attr]
    assert int(objective.count(batch)) == 3
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6)
    assert torch.allclose(model.logits.grad, said.grad, atol=1e-6)  # type: ignore[arg-type]
    assert model.logits.grad[1, 1] == 0  # type: ignore[index]


def test_heads_learn_from_their_own_samples() -> None:
    """Two heads; the second answer is twice in the second head's sample and not in the first's: (l11 + l12 + 2 l22) / 2."""
    objective = RatedObjective(ScoringParams(**TRAINING, heads=2), "unpaired_preferences")
    model = Saying([[0.5, -1.0], [2.0, 3.0]])
    batch = {**BATCH, "target_NA": torch.tensor([[1.0], [0.0]]), "rated_NA": torch.ones(2, 1, dtype=torch.bool)}
    batch["weight_NH"] = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    total = objective.loss_sum(model, batch)
    total.backward()
    of = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.0)), 3 + math.log(1 + math.exp(-3.0))]
    assert float(total.detach()) == pytest.approx((of[0] + of[1] + 2 * of[2]) / 2, abs=1e-6)
    slopes = [(sigmoid(0.5) - 1) / 2, (sigmoid(-1.0) - 1) / 2, 0.0, sigmoid(3.0)]
    assert model.logits.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-6)  # type: ignore[union-attr]


def test_samples_of_the_bootstrap() -> None:
    """Whole numbers of the mean 1 and the variance 1, which no other head or seed has, and more heads do not change."""
    weight_NH = bootstrap_weights(3, 20_000, 4)
    assert weight_NH.mean() == pytest.approx(1, abs=0.02)
    assert weight_NH.var() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(weight_NH.T) - np.eye(4)).max() < 0.03
    assert (bootstrap_weights(3, 20_000, 2) == weight_NH[:, :2]).all()
    assert (bootstrap_weights(4, 20_000, 1) != weight_NH[:, :1]).mean() > 0.5
    assert mean_over_heads(torch.ones(2, 2, 3), {"weight_NH": torch.tensor([[1.0, 3.0], [0.0, 0.0]])}).tolist() == [
        [2.0] * 3,
        [0.0] * 3,
    ]


def test_the_score_of_heads_and_attributes() -> None:
    """Heads say 1 x 2 - 1 x 0.5 = 1.5 and 3 x 2 + 1 x 0.5 = 6.5: mean 4, deviation 2.5; less two of them -1."""
    reading = RewardReading(heads=2, attributes=("a", "b"), weights=(2.0, 0.5))
    output = torch.tensor([[1.0, -1.0, 3.0, 1.0]])
    assert reading.scores_by_head(output).tolist() == [[1.5, 6.5]]
    assert reading.score(output).tolist() == [4.0]
    assert RewardReading(2, ("a", "b"), (2.0, 0.5), uncertainty_penalty=2.0).score(output).tolist() == [-1.0]
    assert weighted_score(output.view(1, 2, 2), torch.tensor([2.0, 0.5])).tolist() == [[1.5, 6.5]]
    assert cautious_score(torch.tensor([[1.0, 1.0, 4.0]]), 0.0).tolist() == [2.0]
    assert reading.labels == ["a_0", "b_0", "a_1", "b_1"]


@pytest.mark.parametrize(("how", "expected"), [("min", 0.5), ("product", 0.3), ("last", 0.75)])
def test_the_score_of_steps(how: str, expected: float) -> None:
    """Of steps that are right with 0.8, 0.5 and 0.75: the least is 0.5, the product 0.3."""
    assert float(score_of_steps(torch.tensor([0.8, 0.5, 0.75]), how)) == pytest.approx(expected, abs=1e-7)


def test_steps_are_learned_as_transformers_learns_labels_of_tokens() -> None:
    """The cross-entropy of two labels per token, -100 elsewhere, which TRL's process reward trainer minimized: value and gradient.

    In all there are three labelled steps; the fourth is not labelled, and transformers takes the mean over the three.
    """
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForTokenClassification(LlamaConfig(vocab_size=20, num_labels=2, **size)).eval().double()
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 0]])
    marks = torch.tensor([[0, RIGHT, 0, 0, WRONG], [0, UNKNOWN, 0, RIGHT, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "marks_BT": marks}
    objective = StepsObjective(ScoringParams(**TRAINING))
    (objective.loss_sum(model, batch) / objective.count(batch)).backward()
    ours = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[0, 4], labels[1, 3] = 1, 0, 1
    theirs = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels).loss
    theirs.backward()
    assert int(objective.count(batch)) == 3
    assert float(objective.loss_sum(model, batch).detach() / 3) == pytest.approx(float(theirs.detach()), abs=1e-6)
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6), name


def test_correlation() -> None:
    """Of (1, 2, 3) and (1, 3, 2): covariance 1, variances 2 and 2. None where one does not vary, as nothing then goes with it."""
    values = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(values, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5, abs=1e-12)
    assert correlation(values, torch.ones(3)) is None
    assert correlation(values[:1], values[:1]) is None


def test_a_separator_that_the_tokenizer_takes_away_is_refused() -> None:
    """Steps would be read where they do not end."""
    core = Tokenizer(WordLevel({"a": 0, "<step>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(
        DataError, match=r"params.step_separator: is '\\n\\n', of which the model's tokenizer makes no token"
    ):
        require_seen(tokenizer, "\n\n")
    require_seen(tokenizer, " <step> ")
