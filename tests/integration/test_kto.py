"""The kto stage on a tiny model and single answers: its reference pass, what it learns, and that nothing but rows decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import Preempted
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.artifact import digest_file
from stages.alignment.kto import STAGE, KTOParams
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_chat, encode_prompt
from tests.integration.preference_world import (
    PreferenceWorld,
    make_model,
    make_preference_world,
    run,
    run_in_processes,
    unpaired_of,
)

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 3e-3, "max_length_tokens": 256}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    """82 training pairs, of which two are of no use, and 40 held-out ones."""
    return make_preference_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unpaired(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """82 training answers and 40 held-out ones, of which every third is undesirable."""
    return unpaired_of(world.preferences, tmp_path_factory.mktemp("unpaired"))


@pytest.fixture(scope="module")
def inputs(world: PreferenceWorld, unpaired: Path) -> dict[str, Path]:
    return {"model": world.model, "unpaired_preferences": unpaired}


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Context]:
    return run(STAGE, inputs, {**TRAINING, "max_steps": 30}, tmp_path_factory.mktemp("kto"))


def logprob(folder: Path, prompt: list[int], answer: list[int]) -> float:
    """The sum of log softmax(logits)[next token] over the answer, for one sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = [*prompt, *answer]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[place - 1, ids[place]] for place in range(len(prompt), len(ids))))


def parts(folder: Path, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids of prompt and answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = list(encode_chat(tokenizer, [*row["prompt"], *row["completion"]]).input_ids)
    prompt = list(encode_prompt(tokenizer, row["prompt"]))
    assert ids[: len(prompt)] == prompt
    return prompt, ids[len(prompt) :]


def heldout_rows(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "heldout.jsonl"))


def test_it_learns_what_is_desirable(trained: tuple[Result, Context]) -> None:
    metrics = trained[0].metrics
    assert metrics["heldout_auc"] > max(0.7, metrics["heldout_auc_base"])
    assert metrics["heldout_margin"] > 0.1
    assert metrics["heldout_loss"] < metrics["heldout_loss_base"] - 0.02
    assert metrics["heldout_desirable_logprob_change"] > metrics["heldout_undesirable_logprob_change"]


def test_the_loss_starts_at_one_half(trained: tuple[Result, Context]) -> None:
    """Policy and reference are equal before the first step: 1 - sigmoid(0) = 1/2 for every answer of weight 1."""
    result, context = trained
    assert next(context.journal.events("step"))["loss"] == pytest.approx(0.5, abs=1e-6)
    assert result.metrics["heldout_loss_base"] == pytest.approx(0.5, abs=1e-6)


def test_weights_weigh_the_loss(inputs: dict[str, Path], tmp_path: Path) -> None:
    """With 1.5 and 0.5 the first loss is (1.5 x desirable + 0.5 x undesirable) / 2 / answers, of all held-out rows."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    result, _ = run(STAGE, inputs, {**TRAINING, "max_steps": 1, **weights}, tmp_path)
    labels = np.array([row["label"] for row in heldout_rows(inputs["unpaired_preferences"])])
    expected = np.where(labels, 1.5, 0.5).mean() / 2
    assert result.metrics["heldout_loss_base"] == pytest.approx(expected, abs=1e-6)


def test_the_reference_is_asked_for_answers_after_their_own_and_after_other_prompts(
    trained: tuple[Result, Context], world: PreferenceWorld, unpaired: Path
) -> None:
    """What lies beside the model, against one sequence at a time in double precision: held-out row k, and row k's prompt with
    the next row's answer, the last one's with the first's. Of training one for each of 30 steps x 8 places.
    """
    found = np.load(trained[1].out / "reference_logprobs.npz")
    shapes = {"train": (82,), "heldout": (40,), "train_mismatched": (240,), "heldout_mismatched": (40,)}
    assert {name: found[name].shape for name in found} == shapes
    rows = heldout_rows(unpaired)
    for index in (0, 7, 39):
        prompt, answer = parts(world.model, rows[index])
        _, other = parts(world.model, rows[(index + 1) % 40])
        assert found["heldout"][index] == pytest.approx(logprob(world.model, prompt, answer), rel=1e-5)
        assert found["heldout_mismatched"][index] == pytest.approx(logprob(world.model, prompt, other), rel=1e-5)


def test_what_is_measured_is_what_the_models_say(
    trained: tuple[Result, Context], world: PreferenceWorld, unpaired: Path
) -> None:
    """By hand, from both models asked one sequence at a time: z, losses, accuracy and the area under the ROC curve by pairs."""
    result, context = trained
    rows = heldout_rows(unpaired)
    pieces = [parts(world.model, row) for row in rows]
    others = [(prompt, pieces[(index + 1) % 40][1]) for index, (prompt, _) in enumerate(pieces)]
    ratios, mismatched = (
        np.array([logprob(context.out, *each) - logprob(world.model, *each) for each in asked])
        for asked in (pieces, others)
    )
    labels = np.array([row["label"] for row in rows])
    kl = max(0.0, mismatched.mean())
    signed = np.where(labels, ratios - kl, kl - ratios)
    expected = {
        "heldout_kl": kl,
        "heldout_loss": np.mean(1 - 1 / (1 + np.exp(-0.1 * signed))),
        "heldout_accuracy": np.mean(signed > 0),
        "heldout_auc": np.mean([x > y for x in ratios[labels] for y in ratios[~labels]]),
        "heldout_margin": 0.1 * (ratios[labels].mean() - ratios[~labels].mean()),
        "heldout_accuracy_majority": max(labels.mean(), 1 - labels.mean()),
    }
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_pair_is_two_answers(world: PreferenceWorld, tmp_path: Path) -> None:
    """80 usable training pairs of 82 are 160 answers, half of them desirable, and none has its own pair's prompt beside it."""
    pairs = {"model": world.model, "preferences": world.preferences}
    result, context = run(STAGE, pairs, {**TRAINING, "max_steps": 2}, tmp_path)
    assert result.facts.train_rows == 160 and result.facts.heldout_rows == 80
    assert result.facts.dropped_rows == {"chosen_equals_rejected": 1, "too_long": 1}
    notes = [note["text"] for note in context.journal.events("note")]
    assert any(
        "80 desirable and 80 undesirable training answers, which together weigh 1 to 1" in note for note in notes
    )
    assert not any("answer their own prompt" in note for note in notes)
    found = np.load(context.out / "reference_logprobs.npz")
    row = next(read_rows(world.preferences / "heldout.jsonl"))
    both = [parts(world.model, {**row, "completion": row[side]}) for side in ("chosen", "rejected")]
    assert found["heldout"][:2].tolist() == pytest.approx([logprob(world.model, *each) for each in both], rel=1e-5)


def test_without_a_reference_point_no_mismatched_answers_are_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    result, context = run(STAGE, inputs, {**TRAINING, "max_steps": 10, "loss": "apo_zero_unpaired"}, tmp_path)
    assert set(np.load(context.out / "reference_logprobs.npz")) == {"train", "heldout"}
    assert result.metrics["heldout_loss"] < result.metrics["heldout_loss_base"] - 0.01
    assert "heldout_kl" not in result.metrics


def test_the_reference_may_be_another_model(world: PreferenceWorld, inputs: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", world.tokenizer, seed=1, initializer_range=0.1)
    _, context = run(STAGE, {**inputs, "reference": other}, {**TRAINING, "max_steps": 1}, tmp_path / "run")
    row = heldout_rows(inputs["unpaired_preferences"])[0]
    found = np.load(context.out / "reference_logprobs.npz")["heldout"][0]
    assert found == pytest.approx(logprob(other, *parts(other, row)), rel=1e-5)


def test_one_kind_of_answers_alone_is_told(world: PreferenceWorld, tmp_path: Path) -> None:
    """Only bad answers teach what to avoid; what compares the two kinds is not measured."""
    bad = unpaired_of(world.preferences, tmp_path / "bad", label=lambda number: False)
    inputs = {"model": world.model, "unpaired_preferences": bad}
    result, context = run(STAGE, inputs, {**TRAINING, "max_steps": 3}, tmp_path / "run")
    assert any("nothing says what to prefer" in note["text"] for note in context.journal.events("note"))
    assert "heldout_auc" not in result.metrics and "heldout_margin" not in result.metrics
    assert result.metrics["heldout_undesirable_logprob_change"] < 0


def test_the_plan_knows_rows_steps_and_inputs(world: PreferenceWorld) -> None:
    """80 answers, or 80 pairs, which are 160, in batches of 8, once: 10 and 20 steps."""
    params = KTOParams(**TRAINING, epochs=1)
    model = Estimate(
        parameters=1000, architecture=json.loads((world.model / "config.json").read_text()), vocabulary_size=600
    )

    def forecast(**inputs: Estimate) -> Forecast:
        return Forecast(params, Resources(device="cpu"), {"model": model, **inputs})

    single, pairs = (
        forecast(unpaired_preferences=Estimate(train_rows=80)),
        forecast(preferences=Estimate(train_rows=80)),
    )
    assert [STAGE.estimate(each).optimizer_steps for each in (single, pairs)] == [10, 20]
    assert STAGE.check(single) == STAGE.check(pairs) == []
    (neither,) = STAGE.check(forecast())
    assert neither.where == "inputs" and "unpaired_preferences" in str(neither)
    (both,) = STAGE.check(forecast(unpaired_preferences=Estimate(), preferences=Estimate()))
    assert "have both" in str(both)
    (other,) = STAGE.check(forecast(preferences=Estimate(), reference=Estimate(vocabulary_size=700)))
    assert other.where == "inputs.reference"


# However answers are spread, and wherever a run is stopped.


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_micro_batches_change_nothing(loss: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """The reference point is that of the whole step: 8 answers at once, or 2 at a time."""
    params = {**TRAINING, "max_steps": 4, "loss": loss, "beta": 0.5}
    runs = [
        run(STAGE, inputs, params, tmp_path / str(size), resources={"micro_batch_size": size}) for size in (8, 2, 1)
    ]
    losses = [[event["loss"] for event in context.journal.events("step")] for _, context in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert len({round(each, 4) for each in losses[0]}) == 4


def test_the_reference_point_is_not_zero_in_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Else the tests of how rows are spread would see nothing of it: kto and apo_zero_unpaired differ from some step on."""
    weights = {"undesirable_weight": 0.0}
    found = [
        [
            event["loss"]
            for event in run(STAGE, inputs, {**TRAINING, **weights, "max_steps": 4, "loss": loss}, tmp_path / loss)[
                1
            ].journal.events("step")
        ]
        for loss in ("kto", "apo_zero_unpaired")
    ]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][-1] > found[1][-1] + 1e-3


def test_a_stopped_training_ends_as_one_never_stopped(inputs: dict[str, Path], tmp_path: Path) -> None:
    """82 answers in batches of 8: 14 steps reach into the second pass. Stopped at step 7, started again."""
    params = {**TRAINING, "max_steps": 14}
    _, whole = run(STAGE, inputs, params, tmp_path / "whole")
    folder = tmp_path / "stopped"

    def at_step_7() -> bool:
        journal = folder / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return any(line["event"] == "step" and line["step"] == 7 for line in lines)

    with pytest.raises(Preempted):
        run(STAGE, inputs, params, folder, stop_requested=at_step_7)
    _, again = run(STAGE, inputs, params, folder)
    assert [event["step"] for event in again.journal.events("resume")] == [7]
    for name in ("model.safetensors", "reference_logprobs.npz"):
        assert digest_file(again.out / name) == digest_file(whole.out / name), name


@pytest.mark.parametrize("layout", [None, "zero2", "zero3"])
def test_two_processes_train_what_one_trains(layout: str | None, inputs: dict[str, Path], tmp_path: Path) -> None:
    """The same answers in the same steps, two micro batches in each process, and the same reference point."""
    params = {**TRAINING, "max_steps": 4, "learning_rate": 1e-3, "beta": 0.5}
    alone, context = run(STAGE, inputs, params, tmp_path / "alone", resources={"micro_batch_size": 2})
    together = run_in_processes(
        "kto", inputs, params, tmp_path / "together", 2, layout, resources={"micro_batch_size": 2}
    )
    steps = [event["loss"] for event in context.journal.events("step")]
    assert together["losses"] == pytest.approx(steps, rel=1e-5)
    assert set(together["metrics"]) == set(alone.metrics)
    for name, value in alone.metrics.items():
        assert together["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    reference, expected = (
        np.load(folder / "reference_logprobs.npz") for folder in (tmp_path / "together" / "out", context.out)
    )
    assert all(np.array_equal(reference[name], expected[name]) for name in expected)


def test_an_adapter_is_trained_and_published_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    adapter = {"method": "lora", "rank": 4, "publish": "adapter"}
    result, context = run(STAGE, inputs, {**TRAINING, "max_steps": 4, "adapter": adapter}, tmp_path)
    state = load_file(context.out / "adapter_model.safetensors")
    assert state and all("lora_" in name for name in state)
    assert result.metrics["heldout_loss"] != result.metrics["heldout_loss_base"]
