"""The losses over single answers, in value and gradient, against TRL's `KTOTrainer` and against the paper's formula in a slow loop.

TRL's loss function is called as it stands, with a model in its place whose logits are given; so is ours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.alignment.kto import KTOParams
from stages.lib.formulas.calibration import area_under_roc
from stages.lib.formulas.token_losses import Tensors
from stages.lib.formulas.unpaired_losses import UNPAIRED_LOSSES
from stages.lib.preferring.answers import answer_logprobs
from stages.lib.preferring.unpaired import MISMATCHED
from stages.lib.preferring.unpaired_objective import UnpairedObjective, mismatched_part

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""

TRAINING: dict[str, Any] = {"global_batch_size": 6, "max_steps": 1, "learning_rate": 1e-3, "max_length_tokens": 16}
ANSWERS, TOKENS, VOCABULARY = 6, 10, 7
LABELS = {"both": [True, False, True, True, False, True], "good": [True] * 6, "bad": [False] * 6}


class Given(torch.nn.Module):
    """A model of one embedding and one head, so that what it says depends on the token alone, with TRL's own outputs."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, likes: float = 0.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        logits_VV = torch.randn(VOCABULARY, VOCABULARY, generator=draws)
        logits_VV[:, 0] += likes
        self.logits = torch.nn.Parameter(logits_VV)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:
        logits_BTV = self.logits[input_ids]
        logp_BTV = logits_BTV.log_softmax(-1)[:, :-1]
        asked_BT = torch.ones_like(input_ids[:, 1:]) if labels is None else labels[:, 1:] != -100
        return SimpleNamespace(
            logits=logits_BTV,
            log_probs=logp_BTV.gather(-1, input_ids[:, 1:, None]).squeeze(-1) * asked_BT,
            entropy=-(logp_BTV.exp() * logp_BTV).sum(-1),
            mean_logits=logits_BTV[:, :-1].mean(-1),
        )


def sequences(seed: int, lengths: list[int]) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, VOCABULARY, (ANSWERS, TOKENS), generator=draws)
    prompt, length_B, place_T = 3, torch.tensor(lengths), torch.arange(TOKENS)
    seen_BT = place_T < prompt + length_B[:, None]
    # Answers begin with the token that `likes` makes likelier, so that the divergence is above 0, and below without it.
    ids_BT[:, prompt : prompt + 2] = 0
    return {
        "input_ids": ids_BT,
        "attention_mask": seen_BT.long(),
        "answer_mask": ((place_T >= prompt) & seen_BT).long(),
    }


def answers(labels: str) -> Tensors:
    """Six answers of 5, 3, 6, 2, 4 and 7 tokens, and the mismatched ones, which are those of the next place."""
    own, other = sequences(1, [5, 3, 6, 2, 4, 7]), sequences(2, [3, 6, 2, 4, 7, 5])
    mismatched = {f"{MISMATCHED}{name}": tensor for name, tensor in other.items()}
    return {**own, **mismatched, "desirable_N": torch.tensor(LABELS[labels])}


def with_references(batch: Tensors, reference: Given) -> Tensors:
    with torch.no_grad():
        own, other = answer_logprobs(reference, batch), answer_logprobs(reference, mismatched_part(batch))
    return {**batch, "reference_N": own, f"{MISMATCHED}reference_N": other}


def ours(policy: Given, reference: Given, labels: str, **params: Any) -> tuple[torch.Tensor, float]:
    """Our mean loss, and the reference point."""
    objective = UnpairedObjective(KTOParams(**{**TRAINING, **params}))
    batch = with_references(answers(labels), reference)
    objective.look_ahead(policy, iter([batch]))
    return objective.loss_sum(policy, batch) / objective.count(batch), objective.kl


def theirs(policy: Given, reference: Given, labels: str, **options: Any) -> tuple[torch.Tensor, float]:
    """The loss of TRL's `KTOTrainer`, of a trainer that holds nothing but what its function reads, and its divergence."""
    from trl import KTOTrainer

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, unwrap_model=lambda x: x)
    metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        **{"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0, **options},
        model=policy,
        ref_model=reference,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=options["loss_type"] == "kto",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    batch = answers(labels)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs |= {"completion_mask": batch["answer_mask"], "label": batch["desirable_N"]}
    other = mismatched_part(batch)
    inputs |= {"KL_input_ids": other["input_ids"], "KL_attention_mask": other["attention_mask"]}
    inputs["KL_completion_mask"] = other["answer_mask"]
    loss: torch.Tensor = KTOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    return loss, metrics["train"]["kl"][0]


@pytest.mark.parametrize("likes", [2.0, -2.0], ids=["above 0", "below 0"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_value_and_gradient(name: str, labels: str, likes: float) -> None:
    """With a divergence above 0, which is the reference point, and with one below, in whose place 0 stands."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    policies = [Given(2, likes), Given(2, likes)]
    mine, point = ours(policies[0], Given(3), labels, loss=name, beta=0.3, **weights)
    other, kl = theirs(policies[1], Given(3), labels, loss_type=name, **weights)
    for loss in (mine, other):
        loss.backward()  # type: ignore[no-untyped-call]
    assert float(mine) == pytest.approx(float(other), rel=1e-6)
    torch.testing.assert_close(policies[0].logits.grad, policies[1].logits.grad, rtol=1e-5, atol=1e-7)
    assert float(policies[1].logits.grad.abs().max()) > 1e-3, "else the comparison would see nothing"
    assert point == pytest.approx(kl, rel=1e-6)
    assert (point > 0) == (name == "kto" and likes > 0)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_the_formula_of_the_paper_in_a_slow_loop(name: str) -> None:
    """lambda_y - v(x, y) with v = lambda_D sigmoid(beta (r - z)) or lambda_U sigmoid(beta (z - r)), answer by answer."""
    policy, reference = Given(2, 2.0), Given(3)
    loss, _ = ours(policy, reference, "both", loss=name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)
    batch = with_references(answers("both"), reference)

    def ratio(ids: list[int], mask: list[int]) -> float:
        total = 0.0
        for place in range(1, len(ids)):
            if mask[place]:
                for sign, model in ((1, policy), (-1, reference)):
                    row = model.logits[ids[place - 1]].tolist()
                    total += sign * (row[ids[place]] - math.log(sum(math.exp(each) for each in row)))
        return total

    def ratios(part: Tensors) -> list[float]:
        return [ratio(*each) for each in zip(part["input_ids"].tolist(), part["answer_mask"].tolist(), strict=True)]

    point = max(0.0, sum(ratios(mismatched_part(batch))) / ANSWERS) if name == "kto" else 0.0
    expected = 0.0
    for found, good in zip(ratios(batch), LABELS["both"], strict=True):
        weight, signed = (1.5, found - point) if good else (0.75, point - found)
        expected += (weight - weight / (1 + math.exp(-0.3 * signed))) / ANSWERS
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_reference_point_is_that_of_all_micro_batches() -> None:
    """Of a step of two micro batches the mean over both, which neither has by itself; and learning nothing from it."""
    policy, reference = Given(2, 2.0), Given(3)
    objective = UnpairedObjective(KTOParams(**TRAINING))
    batch = with_references(answers("both"), reference)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    points = []
    for batches in ([batch], halves, halves[:1], halves[1:]):
        objective.look_ahead(policy, iter(batches))
        points.append(objective.kl)
    assert points[1] == pytest.approx(points[0], rel=1e-6)
    assert points[0] == pytest.approx((2 * points[2] + 4 * points[3]) / 6, rel=1e-6)
    assert abs(points[2] - points[3]) > 1e-2
    assert policy.training and policy.logits.grad is None


def test_the_area_under_the_roc_curve() -> None:
    """Of 2 x 3 pairs: 3 over 1, 2, 2 is three, 2 over 1 one, 2 over 2 two halves: 5 of 6."""
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0]), torch.tensor([True, False, True, False, False])
    assert area_under_roc(scores, positive) == pytest.approx(5 / 6)
    assert area_under_roc(-scores, positive) == pytest.approx(1 / 6)
