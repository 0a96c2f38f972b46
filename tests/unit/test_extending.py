"""A step that makes a finished training longer: what `plan` says of it, what its run begins with, and what is kept for it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.store.artifact import read_manifest
from pipeline.store.collect import collect
from pipeline.store.store import Store
from pipeline.store.works import last_checkpoint_of
from tests.unit import test_plan

RECIPE = """
name: demo
outputs: [longer]
stages:
  data: {kind: write}
  short: {kind: count, inputs: {data: data}, params: {steps: 4}, resources: {keep_last_checkpoint: true}}
  longer: {kind: count, inputs: {data: data, extends: short}, params: {steps: 7}}
"""
planned, run = partial(test_plan.planned, text=RECIPE), partial(test_plan.run, text=RECIPE)
PLAIN = RECIPE.replace(", resources: {keep_last_checkpoint: true}", "")


def no_zero(folder: Path) -> Path:
    """A memory layout whose checkpoints are of use in it alone."""
    path = folder / "no_zero.json"
    path.write_text('{"zero_optimization": {"stage": 0}}')
    return path


def refused(folder: Path, text: str = RECIPE, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(folder, *overrides, text=text)
    return str(caught.value)


def artifact(folder: Path, name: str, text: str = RECIPE) -> Path:
    plan, store = planned(folder, text=text)
    return store.artifact_folder(plan.step(name).artifact_id)


def kept(store: Store, folder: Path) -> list[str]:
    return sorted(path.name for path in (store.work.glob(f"*-{folder.name[:8]}/checkpoints/*")))


@pytest.mark.slow
def test_a_training_is_made_longer_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Only the last checkpoint stays, through a collection too; the manifest names what was extended."""
    code, said = run(tmp_path)
    assert code == 0, said
    short, longer = artifact(tmp_path, "short"), artifact(tmp_path, "longer")
    store = Store(tmp_path / "runs")
    assert kept(store, short) == ["checkpoint-4"] and kept(store, longer) == []
    assert f"began after step 4 of {last_checkpoint_of(short, hashes=True).path}" in said
    assert (longer / "text.txt").read_text() == "7"
    assert read_manifest(longer).input_ids["extends"] == short.name
    lines = collect(store, lambda path, overrides: set())
    assert any(line.startswith("the last checkpoint of short is kept, so that it can be extended") for line in lines)
    assert kept(store, short) == ["checkpoint-4"]
    collect(store, lambda path, overrides: set(), only_current=True)
    assert kept(store, short) == ["checkpoint-4"]
    # Longer once more, from there on: the recipe as it was edited, and what ran before it is not run again.
    code, said = run(tmp_path, "longer.steps=9")
    assert code == 0, said
    assert (artifact(tmp_path, "longer", RECIPE.replace("7", "9")) / "text.txt").read_text() == "9"


@pytest.mark.slow
def test_what_left_no_checkpoint_is_refused_with_ways_out_that_work(tmp_path: Path) -> None:
    alone = PLAIN.replace("longer: {", "other: {").replace(", extends: short", "").replace("[longer]", "[short, other]")
    assert run(tmp_path, text=alone)[0] == 0
    short = artifact(tmp_path, "short", PLAIN)
    step = planned(tmp_path, text=RECIPE)[0].step("longer")
    assert step.action == "blocked"
    assert str(step.reason) == (
        "input 'extends' has left no checkpoint to go on from: set resources.keep_last_checkpoint of the step that made it to"
        f" true and remove {short}, so that it is made anew, the same, and keeps it; or leave out the input extends: then all"
        " steps are trained from the beginning"
    )
    assert run(tmp_path, text=PLAIN)[0] == 2
    shutil.rmtree(short)
    code, said = run(tmp_path)
    assert code == 0, said
    assert (artifact(tmp_path, "longer") / "text.txt").read_text() == "7"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    run(tmp_path, until="short")
    newest = last_checkpoint_of(artifact(tmp_path, "short"), hashes=True)
    assert newest.path is not None
    (newest.path / "slipway.json").write_text("{}")
    reason = str(planned(tmp_path)[0].step("longer").reason)
    assert "has left no checkpoint to go on from (checkpoint-4 is not resumed from: slipway.json has 2 bytes" in reason


@pytest.mark.slow
def test_a_checkpoint_of_another_memory_layout_is_converted_and_that_is_said(tmp_path: Path) -> None:
    run(tmp_path, until="short")
    step = planned(tmp_path, "stages.longer.resources.deepspeed=zero2")[0].step("longer")
    assert step.action == "run"
    assert str(step.reason) == (
        "the checkpoint of input 'extends', written by 1 process without DeepSpeed, goes on in 1 process under ZeRO-2: the"
        " same within rounding, not bit for bit"
    )
    assert str(planned(tmp_path)[0].step("longer").reason) == "not made yet"


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_converted_is_refused_when_it_is_there(tmp_path: Path) -> None:
    """With the option that helps: nobody is told to remove the checkpoint of what is extended."""
    run(tmp_path, until="short")
    chosen = f"stages.longer.resources.deepspeed={no_zero(tmp_path)}"
    step = planned(tmp_path, chosen)[0].step("longer")
    assert step.action == "blocked"
    assert str(step.reason) == (
        "the checkpoint of input 'extends' was written by 1 process without DeepSpeed, and this run is 1 process under"
        " DeepSpeed without ZeRO: that cannot be converted: add --set stages.longer.resources.deepspeed=null; or leave out the"
        " input extends: then all steps are trained from the beginning"
    )
    helped = (chosen, "stages.longer.resources.deepspeed=null")
    assert planned(tmp_path, *helped)[0].step("longer").action == "run"


@pytest.mark.slow
def test_a_damaged_checkpoint_of_the_same_size_is_found_when_the_step_starts(tmp_path: Path) -> None:
    run(tmp_path, until="short")
    newest = last_checkpoint_of(artifact(tmp_path, "short"), hashes=True)
    assert newest.path is not None
    state = (newest.path / "slipway.json").read_text()
    (newest.path / "slipway.json").write_text(state.replace('"count": 4', '"count": 5'))
    assert planned(tmp_path)[0].step("longer").action == "run"
    code, said = run(tmp_path)
    assert code == 2
    assert "slipway.json has other content than when it was written" in said
    assert "set resources.keep_last_checkpoint of the step that made it to true" in said


@pytest.mark.slow
def test_an_artifact_of_the_store_may_be_named_by_its_folder(tmp_path: Path) -> None:
    """By its folder the same artifact, so that what was made longer is the same too. A copy has no checkpoints."""
    run(tmp_path, until="short")
    short = artifact(tmp_path, "short")
    by_path = RECIPE.replace("extends: short", f"extends: {short}").replace("[longer]", "[short, longer]")
    assert artifact(tmp_path, "longer", by_path) == artifact(tmp_path, "longer")
    code, said = run(tmp_path, text=by_path)
    assert code == 0, said
    copy = shutil.copytree(short, tmp_path / "copy")
    assert "comes without the checkpoints of its training. Name a step" in refused(
        tmp_path, by_path.replace(f"extends: {short}", f"extends: {copy}").replace("steps: 7", "steps: 8")
    )
    assert "params.by: is 2, and 1 in what is extended" in refused(tmp_path, by_path, "longer.by=2")


def test_a_training_that_will_leave_no_checkpoint_is_refused_before_it_runs(tmp_path: Path) -> None:
    assert refused(tmp_path, PLAIN) == (
        "recipe.yaml: stages.longer.inputs.extends: names short, which would leave no checkpoint to go on from. Set"
        " stages.short.resources.keep_last_checkpoint to true; or leave out the input extends: then all steps are trained from"
        " the beginning."
    )
    planned(tmp_path, "stages.short.resources.keep_last_checkpoint=true", text=PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params: {steps: 7}": "params: {steps: 7, by: 2}"}, "params.by: is 2, and 1 in what is extended"),
        ({"params: {steps: 7}": "params: {steps: 7}, seed: 3"}, "longer.seed: is 3, and 42 in what is extended"),
        ({"{data: data, extends: short}": "{extends: short}"}, "inputs.data: is not that of what is extended"),
        (
            {"params: {steps: 7}": "params: {steps: 7}, resources: {deepspeed: NO_ZERO}"},
            (
                "resources: the checkpoint of short was written by 1 process without DeepSpeed, and this run is 1 process under"
                " DeepSpeed without ZeRO: that cannot be converted"
            ),
        ),
    ],
)
def test_another_training_is_no_longer_one(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    text = RECIPE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new.replace("NO_ZERO", str(no_zero(tmp_path))))
    assert message in refused(tmp_path, text)


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    text = RECIPE.replace("steps: 4", "steps: 4, file: a.txt")
    planned(tmp_path, text=text.replace("steps: 7", "steps: 7, file: b.txt"))
    assert "params.file: is sha256:" in refused(tmp_path, text.replace("steps: 7", "steps: 7, file: c.txt"))


def test_what_another_stage_made_is_no_training_of_its_own(tmp_path: Path) -> None:
    text = RECIPE.replace("extends: short", "extends: data")
    assert "extends" in refused(tmp_path, text)
