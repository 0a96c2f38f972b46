"""Which completions of a prompt become a pair, or the best answer, by rules that can be followed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.resources import Resources
from pipeline.settings.strict import Reading, validate
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import REWARD_READING, Kind
from stages import STAGES
from stages.lib.on_policy.ranking import (
    ALIKE,
    BELOW_MARGIN,
    BELOW_SCORE,
    CUT_OFF,
    NO_ANSWER,
    REPEATED,
    TOO_FEW,
    Candidate,
    Chosen,
    choose_best,
    choose_pair,
    ranked,
)
from stages.lib.on_policy.sampled_rows import RETOKENIZED, SampledRows, faults_of
from stages.lib.rows.ledger import Ledger
from stages.lib.text.prompts import PromptRow
from tests.unit.running_stages import params_of

STAGE = STAGES["sample_preferences"]


def candidates(*scores: float, **faults: str) -> list[Candidate]:
    """One for each score, named a, b, c, ...; `faults`: name -> why it is of no use."""
    names = "abcdefgh"[: len(scores)]
    return [
        Candidate(name, 3, faults.get(name) != CUT_OFF, (score,), score, faults.get(name, ""))
        for name, score in zip(names, scores, strict=True)
    ]


def test_the_best_come_first_and_equal_ones_in_the_order_they_were_drawn() -> None:
    assert ranked(candidates(1.0, 3.0, 2.0, 3.0, 0.0)) == [1, 3, 2, 0, 4]
    assert ranked(candidates(1.0, 3.0, 2.0, 3.0, 0.0, b=CUT_OFF, e=REPEATED)) == [3, 2, 0]


@pytest.mark.parametrize(
    ("found", "min_margin", "min_score", "expected"),
    [
        (candidates(1.0, 3.0, 2.0), 0.0, None, Chosen(1, 0)),
        (candidates(2.0, 3.0, 2.0, 3.0), 0.0, None, Chosen(1, 0)),
        (candidates(1.0, 3.0, 2.0, b=CUT_OFF), 0.0, None, Chosen(2, 0)),
        (candidates(1.0, 3.0, 2.0, a=CUT_OFF), 1.0, None, Chosen(1, 2)),
        (candidates(1.0, 3.0, 2.0), 2.0, None, Chosen(1, 0)),
        (candidates(1.0, 3.0, 2.0), 2.5, None, BELOW_MARGIN),
        (candidates(2.0, 2.0, 2.0), 0.0, None, ALIKE),
        (candidates(2.0, 2.0), 0.5, None, ALIKE),
        (candidates(1.0, 3.0, b=CUT_OFF), 0.0, None, TOO_FEW),
        (candidates(1.0), 0.0, None, TOO_FEW),
        (candidates(1.0, 3.0, 2.0), 0.0, 3.0, Chosen(1, 0)),
        (candidates(1.0, 3.0, 2.0), 0.0, 3.5, BELOW_SCORE),
    ],
)
def test_the_best_against_the_worst(
    found: list[Candidate], min_margin: float, min_score: float | None, expected: Chosen | str
) -> None:
    assert choose_pair(found, min_margin, min_score) == expected


@pytest.mark.parametrize(
    ("found", "min_score", "expected"),
    [
        (candidates(1.0, 3.0, 2.0), None, 1),
        (candidates(1.0, 1.0), 1.0, 0),
        (candidates(1.0, 3.0, b=CUT_OFF), 2.0, BELOW_SCORE),
        (candidates(1.0, 3.0, a=CUT_OFF, b=REPEATED), None, NO_ANSWER),
    ],
)
def test_the_best_alone(found: list[Candidate], min_score: float | None, expected: int | str) -> None:
    assert choose_best(found, min_score) == expected


def prompt(index: int) -> PromptRow:
    asked = [{"role": "user", "content": f"question {index}"}]
    row = {"prompt": asked, "group": f"g{index}", "columns": {"answer": "4"}, "margin": 9.0, "corruption": "cut"}
    return PromptRow(index, [1, 2, 3], asked, row)


def test_rows_in_are_rows_out_and_dropped() -> None:
    """Three prompts, one pair: scores 1 and 3 of three completions of which one, of 5, was cut off.

    Reward of all seven completions: (1 + 3 + 5 + 2 + 2 + 0 + 0) / 7 = 13/7; of the best per prompt (3 + 2) / 2, of the worst
    (1 + 2) / 2: the third prompt has no answer.
    """
    ledger, side = Ledger(read=3), SampledRows("train", "policy", ["format"])
    first = candidates(1.0, 3.0, 5.0, c=CUT_OFF)
    first[0] = Candidate("a", 3, True, (1.0,), 1.0, retokenized=True)
    side.add_pair(prompt(0), first, 0.0, None, ledger)
    side.add_pair(prompt(1), candidates(2.0, 2.0), 0.0, None, ledger)
    side.add_pair(prompt(2), candidates(0.0, 0.0, a=CUT_OFF, b=CUT_OFF), 0.0, None, ledger)
    assert ledger.dropped == {ALIKE: 1, TOO_FEW: 1}
    assert ledger.read == len(side.rows) + ledger.dropped.total()
    assert ledger.noticed == {RETOKENIZED: 1} and ledger.noticed_examples == {RETOKENIZED: ["a"]}
    assert ledger.examples[TOO_FEW] == ["question 2"]
    (row,) = side.rows
    assert row == {
        "prompt": [{"role": "user", "content": "question 0"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "margin": 2.0,
        "group": "g0",
        "columns": {"answer": "4"},
        "sampled": {
            "policy": "policy",
            "scores": {"chosen": 3.0, "rejected": 1.0},
            "mean_score": 2.0,
            "completions": 3,
            "usable": 2,
        },
    }
    became = [{name: each[name] for name in each if name not in ("split", "completions")} for each in side.drawn]
    assert became == [
        {"row": 0, "chosen": 1, "rejected": 0},
        {"row": 1, "dropped": ALIKE},
        {"row": 2, "dropped": TOO_FEW},
    ]
    assert side.metrics() == pytest.approx(
        {
            "train_reward": 13 / 7,
            "train_ended": 4 / 7,
            "train_length_tokens": 3.0,
            "train_reward_best": 2.5,
            "train_reward_worst": 1.5,
            "train_margin": 2.0,
        }
    )
    assert faults_of([side]) == {"completions": 7.0, "completions_cut_off": 3.0}


def test_of_the_best_answers_chat_nothing_else_is_learned() -> None:
    said = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    ledger, side = Ledger(read=1), SampledRows("train", "policy", ["format"])
    side.add_best(PromptRow(0, [1], said, {"messages": said}), candidates(1.0, 2.0), None, ledger)
    assert side.rows[0]["messages"] == [
        said[0],
        {**said[1], "train": False},
        said[2],
        {"role": "assistant", "content": "b"},
    ]
    assert "margin" not in side.rows[0] and side.rows[0]["sampled"]["scores"] == {"chosen": 2.0}


PARAMS: dict[str, Any] = {
    "rewards": [{"kind": "regular_expression", "pattern": "a"}],
    "max_prompt_tokens": 8,
    "max_new_tokens": 8,
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"completions_per_prompt": 1}, "completions_per_prompt is 1, and a pair has two answers"),
        ({"write": "best", "min_margin": 0.5}, "min_margin is between the two answers of a pair"),
        ({"min_new_tokens": 9}, "min_new_tokens 9 is above max_new_tokens 8"),
    ],
)
def test_params_that_contradict_each_other(given: dict[str, Any], said: str) -> None:
    _, problems = validate(STAGE.params, {**PARAMS, **given}, "params", Reading([]))
    assert len(problems) == 1 and said in str(problems[0])


def test_what_is_written_is_what_stages_read() -> None:
    for write, kind, reader, role in (
        ("pairs", Kind.PREFERENCES, "dpo", "preferences"),
        ("best", Kind.CHATS, "sft", "chats"),
    ):
        params = STAGE.params(**PARAMS, write=write)
        assert STAGE.output_kind(params, {}) == kind
        assert kind in STAGES[reader].inputs[role].kinds


def test_all_problems_with_the_inputs_are_told_at_once() -> None:
    """The model takes 12 tokens, and prompt and completion are 16; the reward model is given, and no reward is learned."""
    model = Estimate(architecture={"model_type": "llama", "max_position_embeddings": 12}, parameters=10)
    forecast = Forecast(STAGE.params(**PARAMS), Resources(), {"model": model, "reward": Estimate(parameters=3)})
    assert [str(problem) for problem in STAGE.check(forecast)] == [
        "inputs.reward: is given, and no reward uses it. Add {kind: reward_model} to params.rewards.",
        "params.max_prompt_tokens: 8 and max_new_tokens 8 are 16, and the model takes 12 tokens. Lower one of them.",
    ]
    assert STAGE.estimate(forecast).memory_bytes_per_rank == 4 * (10 + 3)
    learned = STAGE.params(**{**PARAMS, "rewards": [{"kind": "reward_model"}], "max_new_tokens": 4})
    (missing,) = STAGE.check(Forecast(learned, Resources(), {"model": model}))
    assert missing.where == "inputs.reward"


def test_virtual_tokens_stand_before_the_prompt(tmp_path: Path) -> None:
    """8 + 8 tokens are what the model takes; with three virtual ones they are 19."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}')
    (tmp_path / "adapter_model.safetensors").touch()
    model = Estimate(architecture={"model_type": "llama", "max_position_embeddings": 16}, parameters=10)
    inputs = {"model": model, "adapter": Estimate(folder=tmp_path)}
    assert STAGE.check(Forecast(STAGE.params(**PARAMS), Resources(), {"model": model})) == []
    assert [str(problem) for problem in STAGE.check(Forecast(STAGE.params(**PARAMS), Resources(), inputs))] == [
        (
            "params.max_prompt_tokens: 8 and max_new_tokens 8 behind 3 virtual tokens are 19, and the model takes 16 tokens."
            " Lower one of them."
        )
    ]


def test_prompts_of_every_kind_that_training_takes_are_taken() -> None:
    assert STAGE.inputs["prompts"] == STAGES["grpo"].inputs["prompts"]


def test_a_process_reward_model_that_no_reward_asks_is_refused() -> None:
    """A critic may start from a reward model; from one that judges steps it does not."""
    params = params_of(
        STAGES["ppo"].params,
        {
            "rewards": [{"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}],
            "rollouts": 1,
            "rollout_batch_size": 8,
            "global_batch_size": 8,
            "learning_rate": 1e-3,
            "max_prompt_tokens": 8,
            "max_new_tokens": 8,
        },
        Path(),
    )
    for reading, refused in (({"step_separator": "\n", "answer_score": "min"}, True), (None, False)):
        inputs = {"model": Estimate(), "reward": Estimate(architecture={REWARD_READING: reading})}
        found = [str(problem) for problem in STAGES["ppo"].check(Forecast(params, Resources(), inputs))]
        assert any(each.startswith("inputs.reward: is given, and no reward uses it") for each in found) is refused
