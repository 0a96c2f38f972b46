"""A finished training made longer is, byte for byte, one that was so long from the beginning: in this process, on a tiny model."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ArtifactError, Preempted, RecipeError
from pipeline.stage import Context
from stages.lib.training import beginning
from stages.lib.training.loop import Trained
from tests.distributed.test_training_library import context
from tests.distributed.test_training_selection import BEST, again, killed_at, measured, notes, run, weights
from tests.distributed.test_training_selection import Killed as Dead

pytestmark = pytest.mark.slow

FELL = {"schedule": "cosine", "warmup_steps": 2, "min_learning_rate_fraction": 0.1}
RESOURCES = {"log_every_steps": 4, "save_every_steps": 3}


def begin(folder: Path, **changes: Any) -> Context:
    """A context in which a training has ended."""
    ctx = context(folder, **RESOURCES)
    run(ctx, **changes)
    return ctx


def longer(folder: Path, ended: Context) -> Context:
    """A context in which a run makes that training longer."""
    step = ended.checkpoints.steps()[-1]
    return replace(context(folder, **RESOURCES), extends=ended.checkpoints.path(step))


def lines(ctx: Context, event: str, after: int) -> list[dict[str, Any]]:
    dropped = ("time", "seconds", "tokens_per_second")
    found = [line for line in ctx.journal.events(event) if line["step"] > after]
    return [{name: value for name, value in line.items() if name not in dropped} for line in found]


def assert_same(ctx: Context, trained: Trained, folder: Path, after: int, **changes: Any) -> None:
    """As a training that was so long from the beginning: weights, metrics, and what the journal says after step `after`."""
    whole = context(folder, **RESOURCES)
    assert run(whole, **changes) == trained
    assert weights(whole) == weights(ctx)
    for event in ("step", "heldout"):
        assert lines(ctx, event, after) == lines(whole, event, after)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The line of steps 5 to 8 begins in the first training, which wrote one at its end.
        ({"max_steps": 6}, {"max_steps": 10}),
        ({"max_steps": 6, "evaluate_every_steps": 3}, {"max_steps": 10, "evaluate_every_steps": 3}),
        ({"max_steps": None, "epochs": 1.8}, {"max_steps": None, "epochs": 3.5}),
        # A schedule that was made for the longer training.
        ({**FELL, "max_steps": 6, "schedule_steps": 10}, {**FELL, "max_steps": 10, "schedule_steps": 10}),
        # A schedule that has fallen, and stays there.
        ({**FELL, "max_steps": 6}, {**FELL, "max_steps": 10, "schedule_steps": 6}),
    ],
)
def test_made_longer_it_is_one_that_was_so_long_from_the_beginning(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """10 rows in batches of 4: the second step reaches into the second pass. 1.8 passes are 5 steps, 3.5 are 9."""
    ended = begin(tmp_path / "first", **first)
    ctx = longer(tmp_path / "longer", ended)
    trained = run(ctx, **second)
    step = ended.checkpoints.steps()[-1]
    receipt = next(ctx.journal.events("resume"))
    assert (receipt["step"], receipt["checkpoint"]) == (step, str(ctx.extends))
    assert f"extends another training, from step {step} of {trained.steps}" in notes(ctx)
    assert_same(ctx, trained, tmp_path / "whole", step, **second)


def test_a_fallen_schedule_is_stretched_only_where_that_is_asked_for(tmp_path: Path) -> None:
    """Linear over 4 steps ends at 1/4 of the rate; over 8, step 5 is the fifth of 8: half of it. There are two ways out."""
    fell = {"schedule": "linear", "max_steps": 4, "min_learning_rate_fraction": 0.0}
    ended = begin(tmp_path / "first", **fell)
    ctx = longer(tmp_path / "longer", ended)
    with pytest.raises(RecipeError) as caught:
        run(ctx, **{**fell, "max_steps": 8})
    assert str(caught.value) == (
        "params.schedule: is linear: in what it extends the learning rate was to fall over 4 steps, and here it would over 8."
        " Set stretch_schedule to true, so that it jumps to where it would be had it fallen over all steps from the beginning;"
        " or make what is extended with schedule_steps 8."
    )
    assert list(ctx.journal.events("step")) == []
    ctx = replace(
        longer(tmp_path / "stretched", ended), resources=ended.resources.model_copy(update={"log_every_steps": 1})
    )
    trained = run(ctx, **{**fell, "max_steps": 8, "stretch_schedule": True})
    rates = [line["learning_rate"] for line in ctx.journal.events("step")]
    assert rates == pytest.approx([3e-2 * part for part in (4 / 8, 3 / 8, 2 / 8, 1 / 8)])
    assert trained.steps == 8
    with pytest.raises(RecipeError, match="stretch_schedule: has no effect without an input extends"):
        run(context(tmp_path / "alone"), **{**fell, "stretch_schedule": True})


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("require_units", 2),  # in step 8, where there is no checkpoint of its own
        ("require_units", 5),  # in step 11, after that of step 9
        ("publish_trained", 1),
    ],
)
def test_killed_it_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    ended = begin(tmp_path / "first", max_steps=6)
    ctx = longer(tmp_path / "longer", ended)
    with monkeypatch.context() as patch:
        killed_at(patch, place, call)
        with pytest.raises(Dead):
            run(ctx, max_steps=12)
    trained = run(again(ctx), max_steps=12)
    assert_same(ctx, trained, tmp_path / "whole", 9, max_steps=12)


def test_asked_to_stop_it_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    """What it extends may be gone by then."""
    ended = begin(tmp_path / "first", max_steps=6)
    ctx = longer(tmp_path / "longer", ended)
    asked = replace(ctx, stop_requested=lambda: any(event["step"] == 8 for event in ctx.journal.events("step")))
    with pytest.raises(Preempted):
        run(asked, max_steps=12)
    shutil.rmtree(ended.checkpoints.folder)
    inputs = {"extends": ended.out}
    trained = run(replace(again(ctx), extends=None, inputs=inputs), max_steps=12)
    assert_same(ctx, trained, tmp_path / "whole", 8, max_steps=12)
    shutil.rmtree(ctx.checkpoints.folder)
    with pytest.raises(
        ArtifactError, match=r"inputs\.extends: has left no checkpoint, and none of this step can be read"
    ):
        run(replace(again(ctx), extends=None, inputs=inputs), max_steps=12)


@pytest.mark.parametrize("place", [None, "copy", "after"])
def test_the_best_may_lie_in_what_is_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    """The best of 16 steps is made in the first 10; it is copied at once, for these may be removed. Killed there, it begins anew."""
    ended = begin(tmp_path / "first", **BEST, max_steps=10)
    ctx = longer(tmp_path / "longer", ended)
    copytree = shutil.copytree

    def dying(source: Any, target: Any, **options: Any) -> None:
        copytree(source, target, **options)
        if place == "copy":
            (Path(target) / "engine.pt").write_bytes(b"half")
        raise Dead

    if place is not None:
        with monkeypatch.context() as patch:
            patch.setattr(beginning.shutil, "copytree", dying)
            with pytest.raises(Dead):
                run(ctx, **BEST)
        resumed = again(ctx)
        assert (resumed.resume is None) == (place == "copy")
        ctx = resumed
    asked = replace(ctx, stop_requested=lambda: any(event["step"] >= 12 for event in ctx.journal.events("step")))
    with pytest.raises(Preempted):
        run(asked, **BEST)
    shutil.rmtree(ended.checkpoints.folder)
    trained = run(again(ctx), **BEST)
    best = trained.steps
    assert best < 10 and best in ctx.checkpoints.steps()
    whole = context(tmp_path / "whole", **RESOURCES)
    assert run(whole, **BEST) == trained
    assert weights(whole) == weights(ctx)
    assert measured(ctx) == {step: value for step, value in measured(whole).items() if step >= 10}


def test_made_longer_twice(tmp_path: Path) -> None:
    """The best of all lies in the first, which is gone before the third begins."""
    ended = begin(tmp_path / "first", **BEST, max_steps=10)
    second = longer(tmp_path / "second", ended)
    run(second, **BEST, max_steps=12)
    shutil.rmtree(ended.checkpoints.folder)
    ctx = longer(tmp_path / "third", second)
    trained = run(ctx, **BEST, max_steps=15)
    assert trained.steps < 10
    assert_same(ctx, trained, tmp_path / "whole", 12, **BEST, max_steps=15)


def test_only_what_was_watched_can_be_the_best(tmp_path: Path) -> None:
    """The first training watched nothing: its steps are no candidates, and that is said."""
    ended = begin(tmp_path / "first", max_steps=10)
    ctx = longer(tmp_path / "longer", ended)
    trained = run(ctx, **BEST)
    assert trained.steps == min(measured(ctx), key=lambda step: measured(ctx)[step]) >= 10
    assert "what is extended did not watch heldout_loss: only steps after 10 are compared by it" in notes(ctx)


def test_a_best_that_is_gone_from_what_is_extended_is_refused_at_the_start(tmp_path: Path) -> None:
    ended = begin(tmp_path / "first", **BEST, max_steps=10)
    best = min(measured(ended), key=lambda step: measured(ended)[step])
    shutil.rmtree(ended.checkpoints.path(best))
    with pytest.raises(ArtifactError, match="is gone, and holds the best weights by heldout_loss of what is extended"):
        run(longer(tmp_path / "longer", ended), **BEST)


def test_a_training_that_stopped_early_goes_on_without_the_rule_that_ended_it(tmp_path: Path) -> None:
    """To the length that it was to have, on its own schedule: nothing has to be said of that."""
    stop = {"stop_early": {"metric": "heldout_loss", "patience": 1}, "evaluate_every_steps": 2}
    params = {**FELL, "max_steps": 16}
    ended = begin(tmp_path / "first", **params, **stop)
    step = ended.checkpoints.steps()[-1]
    assert step < 16
    with pytest.raises(RecipeError, match="would end the training at once: what it extends had stopped early"):
        run(longer(tmp_path / "again", ended), **params, **stop)
    ctx = longer(tmp_path / "longer", ended)
    run(ctx, **params)
    whole = begin(tmp_path / "whole", **params)
    assert weights(ctx) == weights(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 6}, "params.max_steps: makes 6 steps, and what it extends has made 6. Raise it."),
        ({"global_batch_size": 2}, "belongs to another run: its global_batch_size is 4, the recipe's is 2."),
    ],
)
def test_another_training_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    ended = begin(tmp_path / "first", max_steps=6)
    ctx = longer(tmp_path / "longer", ended)
    with pytest.raises((RecipeError, ArtifactError)) as caught:
        run(ctx, **{"max_steps": 12, **changes})
    assert message in str(caught.value)
    assert ended.checkpoints.steps()[-1] == 6, "what is extended is left as it is"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("engine.pt", b"nothing", "cannot be extended: engine.pt cannot be read"),
        ("slipway.json", b"{}", "cannot be extended: slipway.json is not what training writes"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    ended = begin(tmp_path / "first", max_steps=6)
    (ended.checkpoints.path(6) / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        run(longer(tmp_path / "longer", ended), max_steps=12)
    assert ended.checkpoints.steps()[-1] == 6, "what is extended is left as it is"
