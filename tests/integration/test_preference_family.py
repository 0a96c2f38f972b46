"""dpo with every loss on a tiny model: it trains, measures, resumes, and is the same however its pairs are spread."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from pipeline.errors import Preempted, RecipeError
from pipeline.stage import Context, Result
from pipeline.store.artifact import digest_file
from stages.alignment.dpo import STAGE
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES
from stages.lib.preferring.reference import ReferencePass
from stages.lib.rows.canonical import read_rows
from tests.integration.preference_world import PreferenceWorld, make_preference_world, run, run_in_processes
from tests.integration.test_dpo import logprob_by_hand

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 3e-3, "max_length_tokens": 256, "max_steps": 2}
SMOOTHING = {name: 0.1 for name, loss in PREFERENCE_LOSSES.items() if loss.needs_label_smoothing}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    """24 pairs, of which 8 are held out."""
    return make_preference_world(tmp_path_factory.mktemp("world"), num_pairs=24, heldout=8)


def trained(
    world: PreferenceWorld, folder: Path, micro_batch_size: int | None = None, **params: Any
) -> tuple[Result, Context]:
    resources = {"micro_batch_size": micro_batch_size} if micro_batch_size else {}
    inputs = {"model": world.model, "preferences": world.preferences}
    return run(STAGE, inputs, {**TRAINING, **params}, folder, resources=resources)


def losses(context: Context) -> list[float]:
    return [event["loss"] for event in context.journal.events("step")]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_trains(name: str, world: PreferenceWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: weights move, and the same is measured of every loss. One without a reference asks no model for it."""
    loss = PREFERENCE_LOSSES[name]
    if not loss.needs_reference:
        monkeypatch.setattr(ReferencePass, "run", lambda *_: pytest.fail("a reference that is not needed"))
    result, context = trained(world, tmp_path, loss=name, label_smoothing=SMOOTHING.get(name, 0.0))
    assert (context.out / "reference_logprobs.npz").exists() == loss.needs_reference
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (world.model, context.out))
    assert any(not after[name].equal(before[name]) for name in before)
    metrics = result.metrics
    named = {"accuracy", "margin", "loss", "chosen_logprob_change", "rejected_logprob_change", "accuracy_plain"}
    bases = {"accuracy_base", "accuracy_base_per_token", "accuracy_longer", "loss_base"}
    assert {f"heldout_{each}" for each in named | bases} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["heldout_loss"] != metrics["heldout_loss_base"]
    assert metrics["heldout_chosen_logprob_change"] != 0


def test_metrics_without_a_reference(world: PreferenceWorld, tmp_path: Path) -> None:
    """Against one sequence at a time: SimPO's margin is beta (c - r) of means over tokens, and what it changes is told.

    The base is the model that training starts from, asked by hand too.
    """
    result, context = trained(world, tmp_path, loss="simpo", beta=2.0, loss_options={"target_margin": 0.25})
    rows = list(read_rows(world.preferences / "heldout.jsonl"))
    sums = {
        folder: np.array([[logprob_by_hand(folder, row, side) for side in ("chosen", "rejected")] for row in rows])
        for folder in (world.model, context.out)
    }
    lengths = np.array([[answer_tokens(world, row, side) for side in ("chosen", "rejected")] for row in rows])
    margins = {folder: 2.0 * (found / lengths) @ [1, -1] for folder, found in sums.items()}
    metrics, moved = result.metrics, sums[context.out] - sums[world.model]
    expected = {
        "heldout_margin": margins[context.out].mean(),
        "heldout_accuracy": (margins[context.out] > 0).mean(),
        "heldout_loss": np.log1p(np.exp(0.25 - margins[context.out])).mean(),
        "heldout_loss_base": np.log1p(np.exp(0.25 - margins[world.model])).mean(),
        "heldout_chosen_logprob_change": moved[:, 0].mean(),
        "heldout_rejected_logprob_change": moved[:, 1].mean(),
        "heldout_accuracy_base": (sums[world.model] @ [1, -1] > 0).mean(),
        "heldout_accuracy_base_per_token": (margins[world.model] > 0).mean(),
        "heldout_accuracy_longer": ((lengths @ [1, -1] > 0) + 0.5 * (lengths @ [1, -1] == 0)).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def answer_tokens(world: PreferenceWorld, row: dict[str, Any], side: str) -> int:
    from stages.lib.text.chat_spans import encode_chat, encode_prompt

    whole = encode_chat(world.tokenizer, [*row["prompt"], *row[side]]).input_ids
    return len(whole) - len(encode_prompt(world.tokenizer, row["prompt"]))


def test_the_reference_counts_tails_as_the_policy_does(world: PreferenceWorld, tmp_path: Path) -> None:
    """Before the first step both are the same model: the loss is log 2 to the last digits, though tails count a tenth."""
    result, context = trained(world, tmp_path / "tails", tail_weight=0.1, max_steps=1)
    assert losses(context)[0] == pytest.approx(math.log(2), abs=1e-6)
    _, whole = trained(world, tmp_path / "whole", max_steps=1)
    with_tails, without = (np.load(each.out / "reference_logprobs.npz")["train"] for each in (context, whole))
    shorter = (with_tails - without) > 1e-3
    assert shorter.any() and not shorter.all(axis=1).any(), "the longer answer of a pair alone has a tail"
    assert digest_file(context.out / "model.safetensors") != digest_file(whole.out / "model.safetensors")
    assert result.metrics["heldout_loss_base"] == pytest.approx(math.log(2), abs=1e-6)


# However pairs are spread, and wherever a run is stopped.

CARRYING = {"loss": {"bco_pair": 1.0, "sft": 0.5}, "beta": 0.5, "max_steps": 4}


def test_what_a_loss_carries_is_carried_over_a_stop(world: PreferenceWorld, tmp_path: Path) -> None:
    """BCO's mean reward: stopped after step 2 of 4 and started again it ends with the same weights, bit for bit."""
    _, whole = trained(world, tmp_path / "whole", 4, **CARRYING)
    folder = tmp_path / "stopped"

    def at_step_2() -> bool:
        journal = folder / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return any(line["event"] == "step" and line["step"] == 2 for line in lines)

    inputs, resources = {"model": world.model, "preferences": world.preferences}, {"micro_batch_size": 4}
    with pytest.raises(Preempted):
        run(STAGE, inputs, {**TRAINING, **CARRYING}, folder, resources=resources, stop_requested=at_step_2)
    _, again = run(STAGE, inputs, {**TRAINING, **CARRYING}, folder, resources=resources)
    assert [event["step"] for event in again.journal.events("resume")] == [2]
    assert losses(again) == losses(whole)
    assert digest_file(again.out / "model.safetensors") == digest_file(whole.out / "model.safetensors")


def test_the_mean_reward_plays_a_part_from_the_second_step_on(world: PreferenceWorld, tmp_path: Path) -> None:
    """The first step knows of no reward; the second has those of the first, all 0; the third has others."""
    _, shifted = trained(world, tmp_path / "shifted", **CARRYING)
    _, plain = trained(world, tmp_path / "plain", **CARRYING, loss_options={"reward_shift": 0.0})
    apart = [abs(mine - other) for mine, other in zip(losses(shifted), losses(plain), strict=True)]
    assert max(apart[:2]) < 1e-6, "only rounding: the reference saw the same tokens beside other padding"
    assert min(apart[2:]) > 1e-4


@pytest.mark.parametrize(
    "params",
    [CARRYING, {"loss": "aot", "group_pairs": 2, "label_smoothing": 0.1}, {"loss": "aot_unpaired", "group_pairs": 2}],
    ids=["bco_pair", "aot", "aot_unpaired"],
)
def test_micro_batches_change_nothing(params: dict[str, Any], world: PreferenceWorld, tmp_path: Path) -> None:
    found = [trained(world, tmp_path / str(micro), micro, **params) for micro in (8, 2)]
    (first, one), (second, other) = found
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    for name, value in first.metrics.items():
        assert second.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_two_processes_learn_what_one_learns(world: PreferenceWorld, tmp_path: Path) -> None:
    """Sorted pairs, a carried mean and a weight of pairs at once, shared by two processes."""
    params = {
        **TRAINING,
        "loss": {"aot": 1.0, "bco_pair": 1.0, "sigmoid": 0.5},
        "group_pairs": 2,
        "policy_weighting": True,
        "beta": 0.5,
        "max_steps": 4,
    }
    inputs = {"model": world.model, "preferences": world.preferences}
    alone, context = run(STAGE, inputs, params, tmp_path / "alone")
    together = run_in_processes("dpo", inputs, params, tmp_path / "together", 2, None)
    assert together["losses"] == pytest.approx(losses(context), rel=1e-5)
    for name, value in alone.metrics.items():
        assert together["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_group_that_would_be_split_is_refused_when_it_runs(world: PreferenceWorld, tmp_path: Path) -> None:
    """What `plan` checks holds for the processes that really run, too; groups as large as a micro batch are the way out."""
    with pytest.raises(RecipeError, match=r"8 pairs are sorted together.*Set params\.group_pairs to 4"):
        trained(world, tmp_path / "refused", 4, loss="aot")
    trained(world, tmp_path / "taken", 4, loss="aot", group_pairs=4)
