"""The dpo stage on a tiny model and pairs of answers: its reference pass, what it learns, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ArtifactError, DataError, Preempted
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.artifact import digest_file
from stages.alignment.dpo import STAGE, DPOParams
from stages.lib.preferring.pairs import Pairs
from stages.lib.preferring.reference import ReferencePass
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_chat, encode_prompt
from tests.integration.preference_world import (
    PreferenceWorld,
    make_model,
    make_preference_world,
    run,
    run_in_processes,
    tokenized,
)
from tests.integration.tiny_language_model import make_tokenizer

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 3e-3, "max_length_tokens": 256}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    return make_preference_world(tmp_path_factory.mktemp("world"))


def logprobs_in(folder: Path) -> dict[str, Any]:
    """What an artifact holds of its reference, read whole: the file is closed."""
    with np.load(folder / "reference_logprobs.npz") as found:
        return dict(found)


def inputs(world: PreferenceWorld) -> dict[str, Path]:
    return {"model": world.model, "preferences": world.preferences}


@pytest.fixture(scope="module")
def trained(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Context]:
    return run(STAGE, inputs(world), {**TRAINING, "max_steps": 30}, tmp_path_factory.mktemp("dpo"))


def logprob_by_hand(folder: Path, row: dict[str, Any], side: str) -> float:
    """The sum of log softmax(logits)[next token] over what follows the prompt, for one sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = encode_chat(tokenizer, [*row["prompt"], *row[side]]).input_ids
    prompt = encode_prompt(tokenizer, row["prompt"])
    assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[place - 1, ids[place]] for place in range(len(prompt), len(ids))))


def test_it_learns_the_pairs(trained: tuple[Result, Context]) -> None:
    metrics = trained[0].metrics
    assert metrics["heldout_accuracy"] > 0.7
    assert metrics["heldout_margin"] > 0.1
    assert metrics["heldout_loss"] < metrics["heldout_loss_base"] - 0.05
    assert metrics["heldout_chosen_logprob_change"] > metrics["heldout_rejected_logprob_change"]


def test_the_margin_is_beta_times_the_difference_of_changes(trained: tuple[Result, Context]) -> None:
    """mean beta ((c - ref_c) - (r - ref_r)) = 0.1 x (mean change of the chosen - mean change of the rejected)."""
    metrics = trained[0].metrics
    difference = metrics["heldout_chosen_logprob_change"] - metrics["heldout_rejected_logprob_change"]
    assert metrics["heldout_margin"] == pytest.approx(0.1 * difference, rel=1e-5)


def test_the_loss_starts_at_log_2(trained: tuple[Result, Context]) -> None:
    """Policy and reference are equal before the first step, in spite of the model's dropout: -log sigmoid(0) = log 2."""
    result, context = trained
    assert AutoModelForCausalLM.from_pretrained(context.inputs["model"]).config.attention_dropout == 0.1
    first = next(context.journal.events("step"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["heldout_loss_base"] == pytest.approx(math.log(2), abs=1e-6)


def test_reference_logprobs_are_those_of_the_input_model(
    trained: tuple[Result, Context], world: PreferenceWorld
) -> None:
    """What lies beside the model, against one sequence at a time, without padding, in double precision."""
    found = logprobs_in(trained[1].out)
    assert found["train"].shape == (80, 2) and found["heldout"].shape == (40, 2)
    for split in ("train", "heldout"):
        rows = list(read_rows(world.preferences / f"{split}.jsonl"))
        for index in (0, 7, 39):
            expected = [logprob_by_hand(world.model, rows[index], side) for side in ("chosen", "rejected")]
            assert found[split][index].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_base_is_measured_from_the_reference(trained: tuple[Result, Context]) -> None:
    result, context = trained
    heldout = logprobs_in(context.out)["heldout"]
    assert result.metrics["heldout_accuracy_base"] == np.mean(heldout[:, 0] > heldout[:, 1])


def test_the_artifact_is_a_chat_model(trained: tuple[Result, Context], world: PreferenceWorld) -> None:
    result, context = trained
    model, report = AutoModelForCausalLM.from_pretrained(context.out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == result.facts.stop_token_ids
    assert result.facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (context.out / name).read_bytes() == (world.model / name).read_bytes()
    ledger = json.loads((context.out / "ledger.json").read_text())
    assert {reason: entry["count"] for reason, entry in ledger["dropped"].items()} == result.facts.dropped_rows
    assert result.facts.dropped_rows == {"chosen_equals_rejected": 1, "too_long": 1}


@pytest.mark.parametrize(("loss", "at_start"), [("hinge", 1.0), ("ipo", 25.0)])
def test_other_losses_start_at_the_reference_and_fall(
    loss: str, at_start: float, world: PreferenceWorld, tmp_path: Path
) -> None:
    """max(0, 1 - 0) = 1, and (0 - 1 / (2 x 0.1))^2 = 25."""
    result, _ = run(STAGE, inputs(world), {**TRAINING, "max_steps": 10, "loss": loss}, tmp_path)
    assert result.metrics["heldout_loss_base"] == pytest.approx(at_start, rel=1e-5)
    assert result.metrics["heldout_loss"] < at_start - 0.05


def test_the_reference_may_be_another_model(world: PreferenceWorld, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", world.tokenizer, seed=1, initializer_range=0.1)
    result, context = run(STAGE, {**inputs(world), "reference": other}, {**TRAINING, "max_steps": 1}, tmp_path / "run")
    row = next(read_rows(world.preferences / "heldout.jsonl"))
    found = logprobs_in(context.out)["heldout"][0]
    assert found.tolist() == pytest.approx(
        [logprob_by_hand(other, row, side) for side in ("chosen", "rejected")], rel=1e-5
    )
    assert abs(result.metrics["heldout_loss_base"] - math.log(2)) > 1e-3


def test_a_reference_with_another_tokenizer_is_refused(world: PreferenceWorld, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", make_tokenizer(["other words"], 300))
    with pytest.raises(ArtifactError, match="tokenizer"):
        run(STAGE, {**inputs(world), "reference": other}, {**TRAINING, "max_steps": 1}, tmp_path / "run")


def test_a_reference_that_is_not_finite_leaves_holes(world: PreferenceWorld, tmp_path: Path) -> None:
    broken = shutil.copytree(world.model, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"120 of 120 pairs, the first of them \[0, 1, 2, 3, 4\]"):
        run(STAGE, {**inputs(world), "reference": broken}, {**TRAINING, "max_steps": 1}, tmp_path / "run")


def test_sequences_longer_than_the_model_are_refused(world: PreferenceWorld, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes 512 tokens"):
        run(STAGE, inputs(world), {**TRAINING, "max_steps": 1, "max_length_tokens": 513}, tmp_path)


def test_too_many_dropped_pairs_are_an_error(world: PreferenceWorld, tmp_path: Path) -> None:
    params = {**TRAINING, "max_steps": 1, "max_length_tokens": 40, "max_dropped_fraction": 0.1}
    with pytest.raises(DataError, match="too_long"):
        run(STAGE, inputs(world), params, tmp_path)


def test_a_parameter_that_would_be_ignored_is_refused() -> None:
    DPOParams(**TRAINING, max_steps=1, loss="sigmoid", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="label_smoothing has no effect with the loss ipo"):
        DPOParams(**TRAINING, max_steps=1, loss="ipo", label_smoothing=0.1)


# The reference pass by itself.


class Stops:
    """Asks to stop from the `after`-th time that it is asked on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def pairs(world: PreferenceWorld, tmp_path: Path) -> Pairs:
    found = tokenized(list(read_rows(world.preferences / "heldout.jsonl")), world.tokenizer, tmp_path / "pairs")
    assert isinstance(found, Pairs)
    return found


def context_in(folder: Path, **options: Any) -> Context:
    """The context of a stage that does nothing."""
    from pipeline.settings.strict import Strict
    from pipeline.stage import Stage
    from pipeline.store.artifact import Kind

    idle = Stage("idle", 1, "", Strict, {}, Kind.CAUSAL_LM, run=lambda ctx, params: Result())
    return run(idle, {}, {}, folder, **options)[1]


def test_an_interrupted_pass_goes_on_where_it_was(world: PreferenceWorld, pairs: Pairs, tmp_path: Path) -> None:
    """40 pairs in batches of 8 are 5 batches. Stopped after 2 of them, 3 are left, and the end is the same bit for bit."""
    whole = ReferencePass(context_in(tmp_path / "whole"), world.model, [pairs], "fp32").run(world.tokenizer)[0]

    stopped = ReferencePass(context_in(tmp_path / "half", stop_requested=Stops(2)), world.model, [pairs], "fp32")
    with pytest.raises(Preempted):
        stopped.run(world.tokenizer)
    left = np.load(stopped.file)
    assert np.isneginf(left).all(axis=1).sum() == 24
    assert np.array_equal(left[~np.isneginf(left)], whole[~np.isneginf(left)])

    context = context_in(tmp_path / "half")
    again = ReferencePass(context, world.model, [pairs], "fp32")
    assert np.array_equal(again.run(world.tokenizer)[0], whole)
    assert "3 of 5 batches to do" in list(context.journal.events("note"))[-1]["text"]
    assert digest_file(again.file) == digest_file(next((tmp_path / "whole").glob("reference_logprobs-*.npy")))

    notes = len(list(context.journal.events("note")))
    again.run(world.tokenizer)
    assert len(list(context.journal.events("note"))) == notes, "what is finished is not computed again"


def test_the_file_names_model_and_pairs(world: PreferenceWorld, pairs: Pairs, tmp_path: Path) -> None:
    """Another model, other pairs or another length give another file: a stale one is never found."""
    context = context_in(tmp_path / "run")
    other = make_model(tmp_path / "other", world.tokenizer, seed=1)
    rows = list(read_rows(world.preferences / "heldout.jsonl"))
    fewer = tokenized(rows[:-1], world.tokenizer, tmp_path / "fewer")
    swapped = tokenized(
        [*rows[:-1], {**rows[-1], "chosen": rows[-1]["rejected"], "rejected": rows[-1]["chosen"]}],
        world.tokenizer,
        tmp_path / "swapped",
    )
    passes = [
        ReferencePass(context, world.model, [pairs], "fp32"),
        ReferencePass(context, other, [pairs], "fp32"),
        ReferencePass(context, world.model, [fewer], "fp32"),
        ReferencePass(context, world.model, [swapped], "fp32"),
        ReferencePass(context, world.model, [pairs], "bf16"),
    ]
    assert len({each.file for each in passes}) == 5
    assert ReferencePass(context, world.model, [pairs], "fp32").file == passes[0].file


def test_holes_are_named(world: PreferenceWorld, pairs: Pairs, tmp_path: Path) -> None:
    """A pass that fills all batches but one leaves the pairs of that batch at -inf."""

    class Careless(ReferencePass):
        def fill(self, logprobs_N2: Any, waiting: list[Any], tokenizer: Any) -> None:
            super().fill(logprobs_N2, waiting[:-1], tokenizer)

    careless = Careless(context_in(tmp_path / "run"), world.model, [pairs], "fp32")
    first = sorted(careless.batches()[-1].tolist())[:5]
    with pytest.raises(ArtifactError, match="8 of 40 pairs") as caught:
        careless.run(world.tokenizer)
    assert str(first) in str(caught.value)


def test_that_it_can_write_is_seen_before_the_work(
    world: PreferenceWorld, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ReferencePass, logprobs_N2: Any) -> None:
        raise PermissionError("read-only")

    reference = ReferencePass(context_in(tmp_path / "run"), world.model, [pairs], "fp32")
    monkeypatch.setattr(ReferencePass, "save", refuse)
    monkeypatch.setattr(ReferencePass, "fill", lambda *_: pytest.fail("worked before it knew that it can write"))
    with pytest.raises(PermissionError):
        reference.run(world.tokenizer)


def test_the_plan_counts_the_reference_and_compares_vocabularies(world: PreferenceWorld) -> None:
    """Under ZeRO-3 on 64 processes training holds 1/64 of a model, and the reference pass all of it: 4 bytes a parameter."""
    architecture = json.loads((world.model / "config.json").read_text())
    known = Estimate(parameters=10**9, architecture=architecture, vocabulary_size=600)
    params = DPOParams(**{**TRAINING, "global_batch_size": 64}, max_steps=1)
    resources = Resources(processes=8, nodes=8, deepspeed="zero3", device="cpu")
    forecast = Forecast(params, resources, {"model": known})
    assert STAGE.estimate(forecast).memory_bytes_per_rank == 4 * 10**9
    assert STAGE.check(forecast) == []
    other = Forecast(params, resources, {"model": known, "reference": Estimate(vocabulary_size=700)})
    assert [problem.where for problem in STAGE.check(other)] == ["inputs.reference"]


# Interrupted training, and several processes.


def test_a_stopped_training_ends_as_one_never_stopped(world: PreferenceWorld, tmp_path: Path) -> None:
    """80 pairs in batches of 8: 14 steps reach into the second pass. Stopped at step 7, started again."""
    params = {**TRAINING, "max_steps": 14}
    _, whole = run(STAGE, inputs(world), params, tmp_path / "whole")
    folder = tmp_path / "stopped"

    def at_step_7() -> bool:
        journal = folder / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return any(line["event"] == "step" and line["step"] == 7 for line in lines)

    with pytest.raises(Preempted):
        run(STAGE, inputs(world), params, folder, stop_requested=at_step_7)
    assert not (folder / "out" / "model.safetensors").exists()
    _, again = run(STAGE, inputs(world), params, folder)
    assert [event["step"] for event in again.journal.events("resume")] == [7]
    for name in ("model.safetensors", "reference_logprobs.npz"):
        assert digest_file(again.out / name) == digest_file(whole.out / name), name


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_two_processes_train_what_one_trains(layout: str, world: PreferenceWorld, tmp_path: Path) -> None:
    """The same pairs in the same steps, so the same losses and reference, up to the rounding of sums in another order."""
    params = {**TRAINING, "max_steps": 4, "learning_rate": 1e-3}
    alone, context = run(STAGE, inputs(world), params, tmp_path / "alone")
    together = run_in_processes("dpo", inputs(world), params, tmp_path / "together", 2, layout)
    steps = [event["loss"] for event in context.journal.events("step")]
    assert together["losses"] == pytest.approx(steps, rel=1e-5)
    assert set(together["metrics"]) == set(alone.metrics)
    for name, value in alone.metrics.items():
        assert together["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    reference, expected = (logprobs_in(folder) for folder in (tmp_path / "together" / "out", context.out))
    assert np.array_equal(reference["train"], expected["train"])
