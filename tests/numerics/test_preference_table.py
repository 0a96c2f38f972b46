"""What every row of the table of preference losses says of its function is true."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from pipeline.settings.strict import CHECKOUT, documentation
from stages.alignment.dpo import DPOParams
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES
from tests.numerics.test_preference_losses import LN2, log_probabilities, vectors

each_loss = pytest.mark.parametrize("name", PREFERENCE_LOSSES)


def options_of(name: str, **more: Any) -> dict[str, Any]:
    """All that the function of a loss takes by name, as a recipe has it that says nothing else but what it must."""
    loss = PREFERENCE_LOSSES[name]
    options: dict[str, Any] = {key: option.default for key, option in loss.options.items()}
    if loss.takes_beta:
        options["beta"] = 0.1
    if loss.takes_label_smoothing:
        options["label_smoothing"] = 0.1 if loss.needs_label_smoothing else 0.0
    if loss.takes_mean_reward:
        options["mean_reward"] = 0.0
    if loss.takes_nll:
        options["nll_N"] = torch.zeros(1)
    return options | more


def called(name: str, vectors_: list[torch.Tensor], **more: Any) -> torch.Tensor:
    loss = PREFERENCE_LOSSES[name]
    return loss.function(*vectors_[: 4 if loss.needs_reference else 2], **options_of(name, **more))


@each_loss
def test_a_row_names_what_its_function_takes(name: str) -> None:
    loss = PREFERENCE_LOSSES[name]
    parameters = inspect.signature(loss.function).parameters.values()
    by_place = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_place == ["chosen_N", "rejected_N", "ref_chosen_N", "ref_rejected_N"][: 4 if loss.needs_reference else 2]
    assert {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY} == set(options_of(name))


AT_REFERENCE = {
    "sigmoid": LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "sigmoid_norm": LN2,
    "robust": LN2,
    "exo_pair": 0.5108256237659907,
    "discopop": LN2 / 2 + 0.5,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 50.0,
    "aot": LN2,
    "aot_unpaired": LN2,
}


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.needs_reference])
def test_losses_at_the_reference(name: str) -> None:
    """A policy equal to its reference has margin 0 and rewards 0 on every pair, at beta 0.1.

    log 2 where it is logistic; ipo (0 - 1 / 0.2)^2 = 25, sppo twice that; exo with e = 0.1 log(1 / 2) - log(0.9 x 0.1) / 2 =
    log(5 / 3); discopop half log 2 and half 1; nca and bco 2 log 2; apo 1 - 1/2 + 1/2.
    """
    chosen, rejected = vectors([-3.25, -100.0], [-8.5, -0.125])
    loss = called(name, [chosen, rejected, chosen, rejected])
    assert loss.tolist() == pytest.approx([AT_REFERENCE[name]] * 2, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.needs_reference])
def test_losses_depend_on_ratios_only(name: str) -> None:
    """Adding c to an answer's log-probability under both policy and reference changes nothing: the ratio is the same."""
    chosen, rejected, ref_chosen, ref_rejected = log_probabilities()
    moved = called(name, [chosen + 7, rejected - 2, ref_chosen + 7, ref_rejected - 2], beta=0.5)
    assert torch.equal(moved, called(name, [chosen, rejected, ref_chosen, ref_rejected], beta=0.5))


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.compares])
def test_losses_of_a_difference_and_others(name: str) -> None:
    """What a prompt adds to both answers changes nothing of a loss of their difference; it does where each answer counts.

    Sorting and CPO's first term look at differences too, but are given no divergence: of other pairs, and of no reference.
    """
    loss = PREFERENCE_LOSSES[name]
    chosen, rejected, *reference = (each / 16 - 1 for each in log_probabilities())
    before = called(name, [chosen, rejected, *reference])
    after = called(name, [chosen - 0.25, rejected - 0.25, *reference])
    same = torch.allclose(before, after, rtol=1e-12, atol=0.0)
    assert same == (loss.of_difference or loss.sorts_pairs or name == "cpo")


@each_loss
def test_gradients_raise_the_chosen_answer(name: str) -> None:
    """At the reference every loss falls when the rejected answer becomes less likely, and the chosen one likelier.

    But for apo_down, to which the chosen one is as good as it is there: sigmoid'(0) - sigmoid'(0) = 0; sft, which does not
    look at the rejected one; and discopop, which rises with the margin there by (1 - log 2) / (4 t) - 3/4 at t = 0.05.
    """
    if name == "discopop":
        assert (1 - LN2) / 0.2 - 0.75 > 0
    sign = -1 if name == "discopop" else 1
    chosen, rejected = vectors([-3.0], [-4.0])
    policy = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    called(name, [*policy, chosen, rejected]).sum().backward()
    assert policy[0].grad is not None
    found = sign * policy[0].grad.item()
    assert found == 0 if name == "apo_down" else found < 0
    if PREFERENCE_LOSSES[name].compares:
        assert policy[1].grad is not None and sign * policy[1].grad.item() > 0
    else:
        assert policy[1].grad is None


@each_loss
def test_sorting_is_said(name: str) -> None:
    """What a pair loses alone is what it loses beside others, or the row says that it sorts."""
    together = called(name, log_probabilities())
    apart = torch.cat([called(name, [each[n : n + 1] for each in log_probabilities()]) for n in range(3)])
    assert torch.allclose(together, apart) == (not PREFERENCE_LOSSES[name].sorts_pairs)


def test_the_documents_name_every_loss_and_option() -> None:
    """The table in stages/README.md has a row for each loss, and each option stands there and in the field's documentation."""
    text = (CHECKOUT / "stages" / "README.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    assert set(PREFERENCE_LOSSES) <= rows
    said = documentation(DPOParams)["loss_options"]
    for name, loss in PREFERENCE_LOSSES.items():
        for key, option in loss.options.items():
            assert f"`{key}`" in text, key
            assert f"{key} ({name}, {option.default:g})" in said, key
