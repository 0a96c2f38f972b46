"""The best of the measured steps is published, and a training that no longer improves ends: in this process, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ArtifactError, Preempted, RecipeError
from pipeline.stage import Context
from stages.lib.formulas.token_losses import TokenObjective, measure_tokens, token_metrics
from stages.lib.models.loading import initial_weights, load_model
from stages.lib.training.evaluating import Evaluator
from stages.lib.training.loop import Trained, train
from stages.lib.training.params import TrainingParams
from tests.distributed.test_training_library import Rows, collate, context
from tests.distributed.training_world import LLAMA, make_tokenizer

pytestmark = pytest.mark.slow

HELDOUT = [
    {"input_ids": [(3 * row + place if place < 4 else 7 * row * place) % 40 + 8 for place in range(8)]}
    for row in range(5)
]
"""Rows that count up as those of training do, and then go on in another way: to learn by heart helps at first, and then harms."""
BEST = {"publish_best": {"metric": "heldout_loss"}, "evaluate_every_steps": 2}
COMMON = {"global_batch_size": 4, "max_steps": 16, "learning_rate": 3e-2, "schedule": "constant"}


def evaluate(evaluator: Evaluator) -> dict[str, float]:
    return token_metrics(evaluator.sums(HELDOUT, collate, measure_tokens))


def run(ctx: Context, attention_dropout: float = 0.0, **changes: Any) -> Trained:
    from transformers import AutoConfig, AutoModelForCausalLM

    params = TrainingParams.model_validate({**COMMON, **changes})
    config = AutoConfig.for_model(
        **LLAMA, attention_dropout=attention_dropout, vocab_size=384, bos_token_id=0, eos_token_id=1
    )
    source = initial_weights(ctx, lambda: AutoModelForCausalLM.from_config(config))
    return train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=make_tokenizer(),
        data=Rows(10),
        collate=collate,
        objective=TokenObjective(),
        evaluate=evaluate,
    )


def weights(ctx: Context) -> bytes:
    return (ctx.out / "model.safetensors").read_bytes()


def measured(ctx: Context, name: str = "heldout_loss") -> dict[int, float]:
    return {event["step"]: event[name] for event in ctx.journal.events("heldout") if event["step"]}


def notes(ctx: Context) -> str:
    return "\n".join(event["text"] for event in ctx.journal.events("note"))


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Trained]:
    """A run whose best step is neither the first nor the last that is measured."""
    ctx = context(tmp_path_factory.mktemp("best"), save_every_steps=5, keep_checkpoints=1)
    return ctx, run(ctx, **BEST)


def best_of(values: dict[int, float]) -> int:
    return min(values, key=lambda step: values[step])


def test_the_best_step_is_published_with_its_own_metrics_and_those_of_the_last(
    best: tuple[Context, Trained], tmp_path: Path
) -> None:
    """Its weights are those of a training of so many steps; its checkpoint outlives all that are newer."""
    ctx, trained = best
    losses = measured(ctx)
    step = best_of(losses)
    assert sorted(losses) == [2, 4, 6, 8, 10, 12, 14, 16] and 2 < step < 16
    assert (trained.steps, trained.after["published_step"], trained.after["last_step"]) == (step, step, 16)
    assert trained.after["heldout_loss"] == losses[step]
    assert trained.after["heldout_loss_last"] == losses[16]
    assert trained.after["heldout_token_accuracy_last"] == measured(ctx, "heldout_token_accuracy")[16]
    assert f"published are the weights of step {step}, of 8 measured steps the best" in notes(ctx)
    assert ctx.checkpoints.steps() == [step, 16]
    shorter = context(tmp_path)
    alone = run(shorter, max_steps=step)
    assert weights(shorter) == weights(ctx)
    assert alone.after["heldout_loss"] == losses[step]
    assert alone.train_loss == trained.train_loss


def test_another_metric_may_choose_another_step(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    """`better` is known of the accuracy: the highest, and of equals the earliest."""
    ctx = context(tmp_path)
    trained = run(ctx, evaluate_every_steps=2, publish_best={"metric": "heldout_token_accuracy"})
    accuracies = measured(ctx, "heldout_token_accuracy")
    assert accuracies == measured(best[0], "heldout_token_accuracy")
    highest = max(accuracies.values())
    assert trained.steps == min(step for step, value in accuracies.items() if value == highest)


def test_where_the_last_step_is_the_best_nothing_is_brought_back(tmp_path: Path) -> None:
    ctx, plain = context(tmp_path / "best"), context(tmp_path / "plain")
    trained = run(ctx, max_steps=3, **BEST)
    alone = run(plain, max_steps=3)
    assert weights(ctx) == weights(plain)
    assert trained.after == {
        **alone.after,
        **{f"{name}_last": value for name, value in alone.after.items()},
        "published_step": 3.0,
        "last_step": 3.0,
    }


class Killed(Exception):
    """In the place of a SIGKILL: nothing that comes after it is done."""


def killed_at(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    """Has the n-th call of a function of the loop die before it does anything."""
    from stages.lib.training import loop

    original, calls = getattr(loop, place), []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(loop, place, dying)


def again(ctx: Context) -> Context:
    """As the worker starts it again: with an empty `out/`, from the newest checkpoint that verifies."""
    for path in ctx.out.iterdir():
        path.unlink()
    newest = ctx.checkpoints.newest()
    ctx.checkpoints.discard_after(newest.step)
    if newest.path is None:
        ctx.journal.rewind(-1)
    return replace(ctx, resume=newest.path)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("require_units", 7),  # in step 7, after the best so far
        ("save_checkpoint", 1),  # the first best is measured, and not yet saved
        ("save_checkpoint", 3),
        ("load_weights_of", 1),  # all is done but what is published
        ("publish_trained", 1),
    ],
)
def test_killed_anywhere_it_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: tuple[Context, Trained], place: str, call: int
) -> None:
    ctx = context(tmp_path, save_every_steps=5, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        killed_at(patch, place, call)
        with pytest.raises(Killed):
            run(ctx, **BEST)
    trained = run(again(ctx), **BEST)
    assert weights(ctx) == weights(best[0])
    assert trained == best[1]
    assert measured(ctx) == measured(best[0])


def test_stopped_while_it_measures_the_best_it_ends_alike(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    """Asked to stop at the measurement that is the best: its checkpoint is written before that is known."""
    step, ctx = best[1].steps, context(tmp_path, save_every_steps=5, keep_checkpoints=1)
    asked = replace(ctx, stop_requested=lambda: any(event["step"] == step for event in ctx.journal.events("step")))
    with pytest.raises(Preempted):
        run(asked, **BEST)
    assert ctx.checkpoints.steps()[-1] == step and step not in measured(ctx)
    trained = run(again(ctx), **BEST)
    assert (weights(ctx), trained) == (weights(best[0]), best[1])


def test_a_checkpoint_whose_best_is_gone_is_passed_over(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    """Without the weights that it would publish it is worth nothing, and the training begins anew."""
    step, ctx = best[1].steps, context(tmp_path, save_every_steps=5, keep_checkpoints=1)
    run(ctx, **BEST)
    state = json.loads((ctx.checkpoints.path(16) / "slipway.json").read_bytes())
    assert state["needs"] == [step]
    (ctx.checkpoints.path(step) / "engine.pt").write_bytes(b"nothing")
    newest = ctx.checkpoints.newest()
    assert newest.path is None
    assert f"it needs checkpoint-{step}: engine.pt has 7 bytes" in newest.passed_over[0]
    trained = run(again(ctx), **BEST)
    assert (weights(ctx), trained) == (weights(best[0]), best[1])


@pytest.mark.parametrize("file", ["engine.pt", "slipway.json"])
def test_a_checkpoint_whose_best_is_not_what_training_writes_is_passed_over(
    tmp_path: Path, best: tuple[Context, Trained], file: str
) -> None:
    step, ctx = best[1].steps, context(tmp_path, save_every_steps=5, keep_checkpoints=1)
    run(ctx, **BEST)
    folder = ctx.checkpoints.path(step)
    if file == "engine.pt":
        torch.save({}, folder / file)
    else:
        (folder / file).write_text("{}", encoding="utf-8")
    (folder / "complete.json").unlink()
    ctx.checkpoints.complete(step)
    assert ctx.checkpoints.newest().step == 16
    trained = run(again(ctx), **BEST)
    notes = [event["text"] for event in ctx.journal.events("note")]
    reason = f"checkpoint-16 is not resumed from: it needs checkpoint-{step}: {file} is not what training writes"
    assert any(note.startswith(reason) for note in notes)
    assert (weights(ctx), trained) == (weights(best[0]), best[1])


def test_a_best_that_is_damaged_while_the_run_goes_on_is_refused(tmp_path: Path) -> None:
    ctx = context(tmp_path, save_every_steps=5)

    def damage() -> bool:
        state = ctx.checkpoints.path(16) / "complete.json"
        if state.exists():
            best = json.loads((state.parent / "slipway.json").read_bytes())["needs"][0]
            (ctx.checkpoints.path(best) / "engine.pt").write_bytes(b"nothing")
        return False

    with pytest.raises(ArtifactError, match=r"holds the best weights, and cannot be used: engine\.pt has 7 bytes"):
        run(replace(ctx, stop_requested=damage), **BEST)


def test_early_stopping_waits_as_long_as_it_is_told(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    """Patience 2 after the best of the losses, which then rise: two measurements later. The last step is published."""
    losses, step = measured(best[0]), best[1].steps
    assert losses[step + 2] > losses[step] and losses[step + 4] > losses[step]
    ctx, shorter = context(tmp_path / "stopped", log_every_steps=100), context(tmp_path / "shorter")
    trained = run(ctx, evaluate_every_steps=2, stop_early={"metric": "heldout_loss", "patience": 2})
    assert trained.steps == step + 4
    assert measured(ctx) == {at: value for at, value in losses.items() if at <= step + 4}
    assert f"stopped early, after step {step + 4} of 16: heldout_loss was no better in 2 measurements" in notes(ctx)
    run(shorter, max_steps=step + 4)
    assert weights(ctx) == weights(shorter)
    assert "published_step" not in trained.after


def test_early_stopping_with_the_best_published(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    ctx = context(tmp_path, save_every_steps=5, keep_checkpoints=1)
    trained = run(ctx, **BEST, stop_early={"metric": "heldout_loss", "patience": 2})
    assert weights(ctx) == weights(best[0])
    assert (trained.steps, trained.after["last_step"]) == (best[1].steps, best[1].steps + 4)
    # Started again from its last checkpoint it ends at once, with the same.
    assert run(again(ctx), **BEST, stop_early={"metric": "heldout_loss", "patience": 2}) == trained
    assert ctx.checkpoints.steps() == [best[1].steps, best[1].steps + 4]


def test_a_small_improvement_is_none(tmp_path: Path, best: tuple[Context, Trained]) -> None:
    """More than the whole of what is gained: the second measurement is the first in vain."""
    losses = measured(best[0])
    least = max(losses.values()) - min(losses.values()) + 0.1
    ctx = context(tmp_path)
    stop = {"metric": "heldout_loss", "patience": 1, "least_improvement": least}
    assert run(ctx, evaluate_every_steps=2, stop_early=stop).steps == 4


def test_another_cadence_of_measuring_changes_nothing_that_is_made(tmp_path: Path) -> None:
    """Stopped with one cadence, ended with another, and never measured in between: the same weights and metrics.

    Dropout would show a measurement that draws from what training draws from.
    """
    ctx, plain = context(tmp_path / "changed", save_every_steps=4), context(tmp_path / "plain")
    asked = replace(ctx, stop_requested=lambda: len(measured(ctx)) == 2)
    with pytest.raises(Preempted):
        run(asked, 0.2, evaluate_every_steps=3)
    trained = run(again(ctx), 0.2, evaluate_every_steps=5)
    assert sorted(measured(ctx)) == [3, 6, 10, 15, 16]
    assert run(plain, 0.2) == trained
    assert weights(plain) == weights(ctx)


def test_a_metric_that_only_the_data_decides_is_refused_before_the_first_step(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    with pytest.raises(
        RecipeError, match="heldout_f1_of_person is not measured on these held-out rows, but heldout_loss"
    ):
        run(ctx, evaluate_every_steps=2, publish_best={"metric": "heldout_f1_of_person"})
    assert list(ctx.journal.events("step")) == []
    assert torch.is_grad_enabled()
