"""Losses between teacher and student, against numbers worked out by hand and against torch's own KL divergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from stages.lib.formulas import distillation_losses as losses
from stages.lib.formulas.distillation_losses import (
    distillation_loss_sum,
    distillation_losses,
    divergences,
    measure_distillation,
)
from stages.lib.formulas.token_losses import IGNORE

LN2 = math.log(2)


def logits(*rows: list[float]) -> torch.Tensor:
    """Logits that give these probabilities."""
    return torch.tensor(rows).log()


def test_divergence_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4): 1/2 log 2 - 1/4 log 2 + 0 = 1/4 log 2. Of equal ones: 0.

    It is not symmetric: teacher (1/2, 1/2), student (1/4, 3/4) gives 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3); the other
    way round 1/4 log(1/2) + 3/4 log(3/2).
    """
    student, teacher = logits([0.25, 0.5, 0.25], [0.2, 0.3, 0.5]), logits([0.5, 0.25, 0.25], [0.2, 0.3, 0.5])
    assert divergences(student, teacher).tolist() == pytest.approx([LN2 / 4, 0.0], abs=1e-7)
    one, other = logits([0.25, 0.75]), logits([0.5, 0.5])
    assert divergences(one, other).item() == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    assert divergences(other, one).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


def test_divergence_at_a_temperature_by_hand() -> None:
    """Probabilities (4/5, 1/5) at temperature 2 become (2, 1) / 3: square roots, made to sum to 1. The other is (1/2, 1/2).

    2/3 log(4/3) + 1/3 log(2/3).
    """
    found = divergences(logits([0.5, 0.5]), logits([0.8, 0.2]), temperature=2.0).item()
    assert found == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-7)


def test_loss_by_hand() -> None:
    """The target is token 0. Cross entropy: -log 1/4 = 2 log 2. KL as above: 1/4 log 2. At alpha 0.25 and temperature 1:
    1/16 log 2 + 3/4 x 2 log 2 = 25/16 log 2.
    """
    student, teacher = logits([0.25, 0.5, 0.25]), logits([0.5, 0.25, 0.25])
    target = torch.tensor([0])
    loss = distillation_losses(student, teacher, target, temperature=1.0, alpha=0.25)
    assert loss.item() == pytest.approx(25 / 16 * LN2, rel=1e-6)


def random_case(num_places: int = 40, width: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(4, num_places // 4, width, generator=generator) for _ in range(2))
    targets = torch.randint(width, (4, num_places // 4), generator=generator)
    targets[:, -1] = IGNORE
    targets[1, 2] = IGNORE
    return student, teacher, targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_against_torch(alpha: float, temperature: float) -> None:
    """alpha T^2 kl_div(log p_student, p_teacher) + (1 - alpha) cross_entropy over the places that are asked."""
    student, teacher, targets = random_case()
    asked = targets != IGNORE
    soft = kl_div(
        (student[asked] / temperature).log_softmax(-1), (teacher[asked] / temperature).softmax(-1), reduction="sum"
    )
    hard = cross_entropy(student[asked], targets[asked], reduction="sum")
    expected = alpha * temperature**2 * soft + (1 - alpha) * hard
    found = distillation_loss_sum(student, teacher, targets, temperature=temperature, alpha=alpha)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_by_hand() -> None:
    """d/ds T^2 KL = T (softmax(s / T) - softmax(t / T)) per place, and nothing where nothing is asked."""
    student, teacher, targets = random_case()
    student.requires_grad_()
    distillation_loss_sum(student, teacher, targets, temperature=3.0, alpha=1.0).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    expected = torch.where((targets != IGNORE)[..., None], expected, 0.0)
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 places in chunks of 7, the last of them 5, and all at once: the same value, gradient and measures."""

    def all_of_it() -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        student, teacher, targets = random_case()
        student.requires_grad_()
        loss = distillation_loss_sum(student, teacher, targets, temperature=2.0, alpha=0.5)
        loss.backward()
        assert student.grad is not None
        with torch.no_grad():
            sums = measure_distillation(student, teacher, targets)
        return loss.detach(), student.grad, {name: float(value) for name, value in sums.items()}

    whole = all_of_it()
    monkeypatch.setattr(losses, "CHUNK_PLACES", 7)
    parts = all_of_it()
    assert parts[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    assert torch.allclose(parts[1], whole[1], atol=1e-7)
    assert parts[2] == pytest.approx(whole[2], rel=1e-6)


def test_measures_by_hand() -> None:
    """Three places with targets 0, 1 and none. Student (1/2, 1/4, 1/4), (1/4, 1/4, 1/2); teacher (1/4, 1/2, 1/4) twice.

    Student: -log 1/2 - log 1/4 = 3 log 2, right at the first. Teacher: -log 1/4 - log 1/2 = 3 log 2, right at the second.
    KL: 1/4 log(1/2) + 1/2 log 2 = 1/4 log 2, and 1/2 log 2 + 1/4 log(1/2) = 1/4 log 2. Never the same favourite but at
    the third place, where nothing is asked.
    """
    student = logits([0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.2, 0.6, 0.2])[None]
    teacher = logits([0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.2, 0.6, 0.2])[None]
    sums = measure_distillation(student, teacher, torch.tensor([[0, 1, IGNORE]]))
    expected = {
        "tokens": 2,
        "nats": 3 * LN2,
        "nats_teacher": 3 * LN2,
        "kl": LN2 / 2,
        "correct": 1,
        "correct_teacher": 1,
    }
    assert {name: float(value) for name, value in sums.items()} == pytest.approx({**expected, "agreed": 0}, abs=1e-6)


def test_padding_of_one_vocabulary_is_not_compared() -> None:
    """A teacher with two more embeddings than there are tokens is compared on the tokens, made to sum to 1."""
    student, teacher, _ = random_case()
    padded = torch.cat([teacher, torch.full((*teacher.shape[:2], 2), 5.0)], dim=-1)
    assert torch.equal(divergences(student, padded), divergences(student, teacher))
    assert torch.equal(divergences(padded, student), divergences(teacher, student))


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, _, targets = random_case()
    found = distillation_loss_sum(student, None, targets, temperature=1.0, alpha=0.0)
    expected = cross_entropy(student.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
