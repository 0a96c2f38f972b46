"""Losses between a teacher's and a student's logits.

K: places, V: vocabulary. `targets_K` holds the token that the logits of a place are to predict, or `token_losses.IGNORE`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from stages.lib.formulas.token_losses import IGNORE, Tensors

CHUNK_PLACES = 1024
"""Softmaxes are taken, in float32, of so many places at a time."""


def divergences(student_KV: torch.Tensor, teacher_KV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_teacher || p_student) of each place in nats, with p = softmax(logits / temperature).

    Of vocabularies of different size only the ids that both have are compared: those beyond are padding of one's embeddings.
    """
    width = min(student_KV.shape[-1], teacher_KV.shape[-1])
    student, teacher = (
        (logits[..., :width].float() / temperature).log_softmax(-1) for logits in (student_KV, teacher_KV)
    )
    return kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def distillation_losses(
    student_KV: torch.Tensor,
    teacher_KV: torch.Tensor | None,
    targets_K: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """alpha T^2 KL(p_teacher || p_student) at temperature T + (1 - alpha) cross entropy; 0 where nothing is asked.

    Hinton et al. (2015): the factor T^2 keeps the share of the soft targets in the gradient when T changes. The teacher
    may be absent where alpha is 0.
    """
    asked_K = targets_K != IGNORE
    loss_K = torch.zeros(targets_K.shape, dtype=torch.float32, device=targets_K.device)
    if alpha < 1:
        hard_K = cross_entropy(student_KV.float(), targets_K, ignore_index=IGNORE, reduction="none")
        loss_K = loss_K + (1 - alpha) * hard_K
    if alpha > 0:
        assert teacher_KV is not None, "soft targets are a teacher's"
        soft_K = divergences(student_KV, teacher_KV, temperature)
        loss_K = loss_K + alpha * temperature**2 * torch.where(asked_K, soft_K, 0.0)
    return loss_K


def distillation_loss_sum(
    student_BTV: torch.Tensor,
    teacher_BTV: torch.Tensor | None,
    targets_BT: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """`distillation_losses` summed over all places. A scalar.

    Chunk by chunk, and again in the backward pass: else several float32 copies of all logits, the largest tensors there
    are, would lie in memory at once.
    """

    def of_chunk(student_KV: torch.Tensor, teacher_KV: torch.Tensor | None, targets_K: torch.Tensor) -> torch.Tensor:
        return distillation_losses(student_KV, teacher_KV, targets_K, temperature=temperature, alpha=alpha).sum()

    total = student_BTV.new_zeros((), dtype=torch.float32)
    for chunk in chunks(student_BTV, teacher_BTV, targets_BT):
        # Nothing random happens within: there is no generator to put back.
        total = total + checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total


def chunks(
    student_BTV: torch.Tensor, teacher_BTV: torch.Tensor | None, targets_BT: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Views of `CHUNK_PLACES` places."""
    student = student_BTV.flatten(0, 1).split(CHUNK_PLACES)
    targets = targets_BT.flatten().split(CHUNK_PLACES)
    if teacher_BTV is None:
        yield from ((each, None, asked) for each, asked in zip(student, targets, strict=True))
    else:
        yield from zip(student, teacher_BTV.flatten(0, 1).split(CHUNK_PLACES), targets, strict=True)


def measure_distillation(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, targets_BT: torch.Tensor) -> Tensors:
    """Sums over the tokens asked for, and `tokens`, their number.

    `nats` and `correct` of either: - log p(target), and whether it has the highest logit; `kl`: KL(p_teacher || p_student);
    `agreed`: whether both have the same highest logit.
    """
    sums: dict[str, torch.Tensor] = {}
    for student_KV, teacher_KV, targets_K in chunks(student_BTV, teacher_BTV, targets_BT):
        asked_K = targets_K != IGNORE
        assert teacher_KV is not None
        best, teachers_best = student_KV.argmax(-1), teacher_KV.argmax(-1)
        found = {
            "tokens": asked_K,
            "nats": cross_entropy(student_KV.float(), targets_K, ignore_index=IGNORE, reduction="none"),
            "nats_teacher": cross_entropy(teacher_KV.float(), targets_K, ignore_index=IGNORE, reduction="none"),
            "kl": torch.where(asked_K, divergences(student_KV, teacher_KV), 0.0),
            "correct": best == targets_K,
            "correct_teacher": teachers_best == targets_K,
            "agreed": asked_K & (best == teachers_best),
        }
        for name, values_K in found.items():
            sums[name] = sums.get(name, 0) + values_K.double().sum()
    return sums
