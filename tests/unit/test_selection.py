"""Which step is the best, when a training ends early, and what a recipe may say of either, by hand."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.strict import content_of, validate
from stages import STAGES
from stages.compression.distill import OF_STUDENT
from stages.lib.training.params import TrainingParams
from stages.lib.training.selection import BETTER, best_step, known_direction, measured_in_vain

LOSSES = [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0), (10, 1.9375), (12, 1.875)]
REQUIRED: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "sft": {"max_length_tokens": 64},
    "reward": {"max_length_tokens": 64},
    "dpo": {"max_length_tokens": 64},
    "kto": {"max_length_tokens": 64},
    "distill": {},
    "classify": {},
    "extract": {},
    "answer": {},
}
"""Every stage that trains on fixed data -> what it needs besides."""


def values(**changes: Any) -> dict[str, Any]:
    return {"global_batch_size": 8, "max_steps": 40, "learning_rate": 1e-3, **changes}


def problems(kind: str, **changes: Any) -> list[str]:
    _, found = validate(STAGES[kind].params, values(**REQUIRED[kind], **changes), "params")
    return [str(problem) for problem in found]


def test_the_best_step_is_the_earliest_of_equals() -> None:
    assert best_step([], "lower") is None
    assert best_step(LOSSES[:4], "lower") == 4
    assert best_step(LOSSES, "lower") == 12
    assert best_step(LOSSES, "higher") == 2


@pytest.mark.parametrize(
    ("better", "least", "expected"),
    [
        # 3.0 is the first, 2.0 better, 2.5 and 2.0 are not, 1.9375 and 1.875 are.
        ("lower", 0.0, [0, 0, 1, 2, 0, 0]),
        # Better than 2.0 by more than 0.0625: 1.9375 is not, 1.875 is.
        ("lower", 0.0625, [0, 0, 1, 2, 3, 0]),
        ("lower", 10.0, [0, 1, 2, 3, 4, 5]),
        ("higher", 0.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_measurements_in_vain(better: Any, least: float, expected: list[int]) -> None:
    counted = [measured_in_vain(LOSSES[: number + 1], better, least) for number in range(len(LOSSES))]
    assert counted == expected
    assert measured_in_vain([], better, least) == 0


def test_a_direction_is_known_or_said_and_never_guessed() -> None:
    assert known_direction("heldout_f1_of_person") == "higher"
    assert known_direction("heldout_score_mean_chosen") is None
    assert known_direction("train_loss") is None
    read_either_way = "params: publish_best.better: heldout_score can be read either way"
    assert problems("reward", evaluate_every_steps=5, publish_best={"metric": "heldout_score"})[0].startswith(
        read_either_way
    )
    said = {"metric": "heldout_score", "better": "higher"}
    assert problems("reward", evaluate_every_steps=5, publish_best=said) == []
    (problem,) = problems("reward", evaluate_every_steps=5, publish_best={"metric": "heldout_loss", "better": "higher"})
    assert "heldout_loss is better when it is lower, not higher: remove `better`" in problem


@pytest.mark.parametrize("kind", REQUIRED)
@pytest.mark.parametrize("param", ["publish_best", "stop_early"])
def test_a_metric_that_the_stage_does_not_measure_is_refused_with_those_that_it_does(kind: str, param: str) -> None:
    patience = {"patience": 1} if param == "stop_early" else {}
    (problem,) = problems(kind, evaluate_every_steps=5, **{param: {"metric": "heldout_bleu", **patience}})
    assert f"{param}.metric: the stage does not measure 'heldout_bleu'" in problem
    params = STAGES[kind].params.model_validate(values(**REQUIRED[kind]))
    assert isinstance(params, TrainingParams)
    assert params.measures()
    for name in params.measures():
        assert name in problem
        metric = name.replace("*", "somebody")
        better = {} if known_direction(metric) else {"better": "lower"}
        assert problems(kind, evaluate_every_steps=5, **{param: {"metric": metric, **better, **patience}}) == []


def test_all_stages_that_train_on_fixed_data_say_what_they_measure() -> None:
    assert {kind for kind, stage in STAGES.items() if issubclass(stage.params, TrainingParams)} == set(REQUIRED)
    named = {name for kind in REQUIRED for name in STAGES[kind].params(**values(**REQUIRED[kind])).measures()}
    without = STAGES["dpo"].params(**values(**REQUIRED["dpo"], loss="simpo", beta=2.0)).measures()
    assert set(BETTER) <= named | set(without), "the table names metrics that nothing measures"
    assert "heldout_chosen_logprob_change" in named and "heldout_chosen_logprob_change" not in without


def test_a_near_name_is_proposed() -> None:
    (problem,) = problems("sft", evaluate_every_steps=5, publish_best={"metric": "heldout_los"})
    assert "(Did you mean 'heldout_loss'?)" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish_best": {"metric": "heldout_loss"}}, "set evaluate_every_steps, too"),
        (
            {"publish_best": {"metric": "heldout_loss"}, "evaluate_every_steps": 40},
            "evaluate_every_steps 40 must be below the 40 steps: else only the last one is measured",
        ),
        (
            {"stop_early": {"metric": "heldout_loss", "patience": 4}, "evaluate_every_steps": 8},
            "a patience of 4 ends at step 40 at the earliest, and there are 40: lower either, or remove stop_early",
        ),
        (
            {"stop_early": {"metric": "heldout_loss", "patience": 0}, "evaluate_every_steps": 8},
            "greater than or equal to 1",
        ),
        ({"schedule_steps": 50, "schedule": "constant"}, "schedule_steps has no effect on the constant schedule"),
        ({"stretch_schedule": True, "schedule": "constant"}, "stretch_schedule has no effect on the constant schedule"),
        (
            {"schedule_steps": 30},
            "the learning rate would be 0 from then on: raise it, or set min_learning_rate_fraction",
        ),
        (
            {"schedule_steps": 50, "warmup_steps": 50, "max_steps": 60},
            "warmup_steps 50 must be below schedule_steps 50",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems("sft", **changes)), problems("sft", **changes)


def identity(**changes: Any) -> dict[str, Any]:
    params = STAGES["sft"].params.model_validate(values(**REQUIRED["sft"], **changes))

    def digest(path: Path) -> str:
        raise AssertionError(path)

    return content_of(params, digest)


def test_the_cadence_of_measuring_is_part_of_an_identity_only_where_it_decides() -> None:
    """What is not asked for is not in it at all, so that recipes without it make what they made before."""
    plain = identity()
    assert plain["evaluate_every_steps"] is None
    assert not {"publish_best", "stop_early", "schedule_steps", "stretch_schedule"} & set(plain)
    assert identity(evaluate_every_steps=5) == plain
    best = {"publish_best": {"metric": "heldout_loss"}}
    assert identity(evaluate_every_steps=5, **best)["evaluate_every_steps"] == 5
    assert identity(evaluate_every_steps=5, **best) != identity(evaluate_every_steps=6, **best)
    # Where nothing asks for an identity, the params are told as they are.
    params = STAGES["sft"].params.model_validate(values(**REQUIRED["sft"], evaluate_every_steps=5))
    assert params.model_dump(mode="json")["evaluate_every_steps"] == 5


def covered(kind: str, names: set[str]) -> bool:
    said = STAGES[kind].params(**values(**REQUIRED[kind])).measures()
    return all(any(fnmatchcase(name, each) for each in said) for name in names)


@pytest.mark.slow
def test_what_stages_say_they_measure_is_what_they_measure() -> None:
    """Where the functions that name the metrics can be called by themselves."""
    from stages.lib.encoding.answering import APART
    from stages.lib.encoding.classification import accuracy_and_macro_f1
    from stages.lib.formulas.metrics import Tally, span_metrics
    from stages.lib.formulas.token_losses import token_metrics

    tokens = set(token_metrics({"nats": 2.0, "tokens": 1.0, "correct": 1.0}))
    assert covered("pretrain", tokens) and covered("sft", tokens)
    assert covered("distill", set(OF_STUDENT))
    assert covered("extract", {*span_metrics({"person": Tally(1, 1, 1)}, "heldout_"), "heldout_f1_of_person"})
    assert covered("answer", {"heldout_exact_match", "heldout_f1", *(f"heldout_{name}" for name in APART)})
    assert covered("classify", {f"heldout_{name}" for name in accuracy_and_macro_f1({0: Tally(1, 1, 1)}, 1)})
    assert not covered("classify", {"heldout_perplexity"})
