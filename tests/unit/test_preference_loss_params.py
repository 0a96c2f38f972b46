"""What a recipe may say of a loss over pairs: nothing that would be ignored, and each refusal names a way out that works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.settings.resources import Resources
from pipeline.settings.strict import validate
from pipeline.stage import Estimate, Forecast
from stages.alignment.dpo import STAGE, DPOParams
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES

PARAMS = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 1, "max_length_tokens": 64}


def read(**more: Any) -> tuple[DPOParams | None, list[str]]:
    params, problems = validate(DPOParams, {**PARAMS, **more}, "params")
    return params, [str(problem) for problem in problems]


def accepted(**more: Any) -> DPOParams:
    params, problems = read(**more)
    assert params is not None, problems
    return params


@pytest.mark.parametrize(
    ("given", "problem", "way_out"),
    [
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            (
                "params: label_smoothing has no effect with the loss ipo: remove it, or take sigmoid, robust, exo_pair, aot,"
                " aot_unpaired, simpo or cpo."
            ),
            {"loss": "robust", "label_smoothing": 0.1},
        ),
        (
            {"loss": "exo_pair"},
            "params: the loss exo_pair needs label_smoothing: without it the loss is infinite: its authors take 0.001.",
            {"loss": "exo_pair", "label_smoothing": 0.001},
        ),
        (
            {"loss": "robust"},
            (
                "params: the loss robust needs label_smoothing: without it robust is sigmoid: the share of wrong labels that"
                " you expect, such as 0.1."
            ),
            {"loss": "robust", "label_smoothing": 0.1},
        ),
        (
            {"loss_options": {"target_margin": 1.0}},
            (
                "params: loss_options.target_margin has no effect with the loss sigmoid, which has no options: remove it, or"
                " take simpo."
            ),
            {"loss": "simpo", "loss_options": {"target_margin": 1.0}},
        ),
        (
            {"loss": "simpo", "loss_options": {"target_margin": -1.0}},
            (
                "params: loss_options.target_margin must be from 0 to 1e+06, not -1.0: by how much beta x the log-probability"
                " per token is to be higher."
            ),
            {"loss": "simpo", "loss_options": {"target_margin": 0.0}},
        ),
        (
            {"loss": "simpo", "f_divergence": "forward_kl"},
            (
                "params: f_divergence has no effect with the loss simpo: remove it, or take sigmoid, hinge, ipo, sigmoid_norm,"
                " robust, exo_pair or discopop."
            ),
            {"loss": "hinge", "f_divergence": "forward_kl"},
        ),
        (
            {"f_divergence": "js_divergence", "f_divergence_alpha": 0.3},
            "params: f_divergence_alpha has no effect without f_divergence: alpha_divergence: remove it, or write that too.",
            {"f_divergence": "alpha_divergence", "f_divergence_alpha": 0.3},
        ),
        (
            {"loss": {"sigmoid": 1.0, "ipo": 1.0}, "tail_weight": 0.5},
            (
                "params: tail_weight has no effect with the loss ipo: remove it, or take sigmoid, hinge, robust, exo_pair,"
                " discopop, nca_pair, bco_pair, apo_zero, apo_down, sppo_hard, aot, aot_unpaired or cpo."
            ),
            {"loss": {"sigmoid": 1.0, "hinge": 1.0, "sft": 1.0}, "tail_weight": 0.5},
        ),
        (
            {"loss": "sigmoid_norm", "length_penalty": 0.1},
            (
                "params: length_penalty has no effect with the loss sigmoid_norm: remove it, or take sigmoid, hinge, robust,"
                " exo_pair or discopop."
            ),
            {"loss": "discopop", "length_penalty": 0.1},
        ),
        (
            {"loss": "aot", "policy_weighting": True},
            (
                "params: policy_weighting has no effect with the loss aot: remove it, or take sigmoid, hinge, ipo,"
                " sigmoid_norm, robust, exo_pair, discopop, nca_pair, bco_pair, apo_zero, apo_down, sppo_hard or simpo."
            ),
            {"loss": {"sft": 1.0, "simpo": 1.0}, "policy_weighting": True},
        ),
        (
            {"loss": "sft", "beta": 0.2},
            (
                "params: beta has no effect with the loss sft: remove it, or take sigmoid, hinge, ipo, sigmoid_norm, robust,"
                " exo_pair, discopop, nca_pair, bco_pair, apo_zero, apo_down, sppo_hard, aot, aot_unpaired, simpo, orpo or cpo."
            ),
            {"loss": {"sft": 1.0, "cpo": 1.0}, "beta": 0.2},
        ),
        (
            {"group_pairs": 4},
            "params: group_pairs has no effect with the loss sigmoid: remove it, or take aot or aot_unpaired.",
            {"loss": {"sigmoid": 1.0, "aot": 1.0}, "group_pairs": 4},
        ),
        (
            {"loss": "aot", "group_pairs": 3},
            "params: global_batch_size 8 is not a multiple of group_pairs 3: take 6 or 9.",
            {"loss": "aot", "group_pairs": 3, "global_batch_size": 9},
        ),
        (
            {"loss": "aot", "global_batch_size": 1},
            "params: global_batch_size is 1, and a loss that sorts pairs learns from several: take a larger one.",
            {"loss": "aot", "global_batch_size": 2},
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value) if isinstance(value, Mapping) else None,
)
def test_what_would_be_ignored_is_refused_with_a_way_out(
    given: dict[str, Any], problem: str, way_out: dict[str, Any]
) -> None:
    assert read(**given)[1] == [problem]
    accepted(**way_out)


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        ("sigmod", "params.loss: there is no loss 'sigmod' (Did you mean 'sigmoid'?)."),
        (3, "params.loss: must be the name of a loss, or a mapping of names to weights, not 3."),
        (None, "params.loss: must be the name of a loss, or a mapping of names to weights, not None."),
        (["sigmoid"], "params.loss: must be the name of a loss, or a mapping of names to weights, not ['sigmoid']."),
        ({}, "params.loss: names no loss: write one, or a weight for each of several."),
        ({"sigmod": 1.0}, "params.loss: there is no loss 'sigmod' (Did you mean 'sigmoid'?)."),
        ({1: 1.0}, "params.loss: there is no loss 1 "),
        ({"sft": 0}, "params.loss: sft: the weight must be from 1e-08 to 1e+06, not 0; leave out what is 0."),
        ({"sft": -1.0}, "params.loss: sft: the weight must be from 1e-08 to 1e+06, not -1.0; leave out what is 0."),
        (
            {"sft": float("nan")},
            "params.loss: sft: the weight must be from 1e-08 to 1e+06, not nan; leave out what is 0.",
        ),
        ({"sft": "1"}, "params.loss: sft: the weight must be a number, not '1'."),
        ({"sft": True}, "params.loss: sft: the weight must be a number, not "),
        ({"sft": {"weight": 1}}, "params.loss: sft: the weight must be a number, not "),
    ],
)
def test_what_names_no_loss(loss: Any, problem: str) -> None:
    (found,) = read(loss=loss)[1]
    assert found.startswith(problem)


def test_one_that_is_like_no_loss_is_answered_with_all_of_them() -> None:
    (problem,) = read(loss="kto")[1]
    assert all(name in problem for name in PREFERENCE_LOSSES)


def test_the_order_of_weights_says_nothing() -> None:
    """Two recipes that ask for the same have one identity, and add up in one order."""
    first, second = accepted(loss={"sft": 1, "sigmoid": 0.5}), accepted(loss={"sigmoid": 0.5, "sft": 1.0})
    assert first.model_dump_json() == second.model_dump_json()
    assert list(first.losses) == ["sigmoid", "sft"]


IDENTITY = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}
"""What the params of a recipe were, of all that may be said of a loss, before there was more to say."""


def test_what_is_not_said_is_no_part_of_an_identity() -> None:
    """So that recipes written before there were these params have the artifacts that they made."""
    plain = accepted().model_dump(mode="json")
    new = {
        "loss_options": {"discopop_temperature": 0.1},
        "f_divergence": "alpha_divergence",
        "f_divergence_alpha": 0.0,
        "policy_weighting": True,
        "tail_weight": 0.0,
        "length_penalty": 0.5,
    }
    assert {name: plain[name] for name in IDENTITY} == IDENTITY
    assert not {*new, "group_pairs"} & set(plain)
    said = accepted(loss="discopop", **new)
    dumped = said.model_dump(mode="json")
    assert {name: dumped[name] for name in new} == new, "what is said is, 0 included"
    assert validate(DPOParams, dumped, "params") == (said, [])
    assert accepted(loss="aot", group_pairs=4).model_dump(mode="json")["group_pairs"] == 4


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_options_are_as_the_row_says_unless_given(name: str) -> None:
    loss = PREFERENCE_LOSSES[name]
    smoothing = {"label_smoothing": 0.1} if loss.needs_label_smoothing else {}
    usual = accepted(loss=name, **smoothing).options_of(name)
    assert {key: usual[key] for key in loss.options} == {key: option.default for key, option in loss.options.items()}
    for key, option in loss.options.items():
        given = accepted(loss=name, loss_options={key: option.least}, **smoothing)
        assert given.options_of(name)[key] == option.least
        for value in (option.least - 1e-4, option.most + 1):
            assert read(loss=name, loss_options={key: value}, **smoothing)[0] is None


# What depends on inputs and resources.


def problems(params: DPOParams, reference: bool = False, **resources: Any) -> list[tuple[str, str, str]]:
    inputs = {"model": Estimate(vocabulary_size=600), "preferences": Estimate()}
    if reference:
        inputs["reference"] = Estimate(vocabulary_size=600)
    forecast = Forecast(params, Resources(device="cpu", **resources), inputs)
    return [(problem.where, problem.what, problem.hint) for problem in STAGE.check(forecast)]


def test_a_reference_that_is_not_used_is_refused() -> None:
    assert problems(accepted(loss="simpo"), reference=True) == [
        (
            "inputs.reference",
            "is given, and the loss simpo compares with no reference",
            "Remove it, or take a loss that has one, such as sigmoid.",
        )
    ]
    assert problems(accepted(loss="simpo")) == []
    assert problems(accepted(loss={"simpo": 1.0, "sigmoid": 1.0}), reference=True) == []


def test_groups_are_not_split() -> None:
    """8 pairs sorted together in one micro batch of one process; in groups of 2 wherever they lie whole in a micro batch."""
    whole, by_two = accepted(loss="aot"), accepted(loss="aot", group_pairs=2)
    assert problems(whole) == []
    assert problems(whole, micro_batch_size=8) == []
    assert problems(whole, micro_batch_size=4) == [
        (
            "params.loss",
            "8 pairs are sorted together, and micro batches of 4 pairs would split them",
            "Set params.group_pairs to 4, or make resources.micro_batch_size a multiple of 8, on fewer resources.processes if need be.",
        )
    ]
    assert len(problems(whole, processes=2)) == 1
    assert problems(by_two, processes=2, micro_batch_size=2) == []
    assert problems(by_two, processes=4) == []
    ((where, _, hint),) = problems(by_two, processes=8)
    assert where == "params.group_pairs"
    assert hint == "Make resources.micro_batch_size a multiple of 2, on fewer resources.processes if need be."
    assert problems(by_two, processes=4, micro_batch_size=2) == []


def test_a_loss_without_a_reference_needs_no_memory_for_one() -> None:
    known = Estimate(parameters=10**9, vocabulary_size=600, architecture={"model_type": "llama"})
    resources = Resources(processes=8, deepspeed="zero3", device="cpu")
    memory = {
        name: STAGE.estimate(Forecast(accepted(loss=name), resources, {"model": known})).memory_bytes_per_rank
        for name in ("sigmoid", "simpo")
    }
    assert memory["sigmoid"] == 4 * 10**9
    assert memory["simpo"] is not None and memory["simpo"] < 4 * 10**9
