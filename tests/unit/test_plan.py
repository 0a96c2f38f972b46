"""Identity, actions and reasons; running, resuming and failing, with stages of three lines in real processes."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.base import LocalProcess, Watch
from pipeline.errors import RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.running.execute import execute
from pipeline.running.plan import Plan, make_plan
from pipeline.running.progress import Progress
from pipeline.running.reasons import flatten
from pipeline.store.artifact import read_manifest
from pipeline.store.job import Job
from pipeline.store.store import Store
from tests.unit.fake_stages import LAUNCHERS, STAGES

RECIPE = """
name: demo
outputs: [joined]
stages:
  first: {kind: write, params: {count: 3}}
  second: {kind: write}
  joined: {kind: join, inputs: {data: first, more: {second: second}}}
"""
ROOT = Path(__file__).resolve().parents[2]
DRIVER = "import sys; from pipeline.running.worker import main; from tests.unit.fake_stages import STAGES; sys.exit(main(sys.argv[1:], STAGES))"


class FakeStageProcess(LocalProcess):
    """The real worker in a process of its own, with the table of fake stages."""

    def command(self, job: Job) -> list[str]:
        return [sys.executable, "-c", DRIVER, job.work]


def planned(folder: Path, *overrides: str, text: str = RECIPE, **choice: str) -> tuple[Plan, Store]:
    (folder / "recipe.yaml").write_text(text)
    store = Store(folder / "runs")
    return make_plan(load_recipe(folder / "recipe.yaml", STAGES, LAUNCHERS, overrides), store, **choice), store


def run(folder: Path, *overrides: str, text: str = RECIPE, **choice: str) -> tuple[int, str]:
    plan, store = planned(folder, *overrides, text=text, **choice)
    stream = io.StringIO()
    return execute(plan, store, {"local": FakeStageProcess()}, Progress(stream)), stream.getvalue()


def actions(plan: Plan) -> dict[str, str]:
    return {step.name: f"{step.action} {step.reason}" for step in plan.steps}


@pytest.mark.slow
def test_of_two_steps_that_make_the_same_the_second_is_skipped(tmp_path: Path) -> None:
    """Also where it could not resume what the first has begun, being planned for another number of processes."""
    text = """
name: demo
outputs: [first, joined]
stages:
  first: {kind: write, params: {count: 3}}
  twin: {kind: write, params: {count: 3}}
  joined: {kind: join, inputs: {data: twin}}
"""
    plan, _ = planned(tmp_path, text=text)
    assert actions(plan)["twin"] == "skip is the artifact that first makes"
    plan, _ = planned(tmp_path, text=text, only="twin")
    assert actions(plan)["twin"] == "run not made yet"
    code, output = run(tmp_path, text=text)
    assert code == 0
    assert output.count("  made ") == 2
    plan, store = planned(tmp_path, text=text)
    assert {step.action for step in plan.steps} == {"skip"}
    assert store.resolve("twin")[0] == store.resolve("first")[0]


@pytest.mark.slow
def test_an_artifact_s_files_can_be_read_by_all_whom_the_umask_allows(tmp_path: Path) -> None:
    """`write` leaves a file for its owner alone, as safetensors does."""
    assert run(tmp_path, "first.private=true")[0] == 0
    _, store = planned(tmp_path)
    folder = store.resolve("first")[1]
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", *folder.iterdir())}
    assert len(modes) == 1


def test_planning_creates_nothing_and_says_what_is_not_made(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    assert actions(plan) == dict.fromkeys(["first", "second", "joined"], "run not made yet")
    assert plan.step("joined").estimate.optimizer_steps == 10
    assert plan.step("joined").estimate.train_rows is None
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_second_run_skips_everything_and_the_artifact_says_what_it_is(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 0, output
    assert "wrote a text" in output
    plan, store = planned(tmp_path)
    assert {text.split()[0] for text in actions(plan).values()} == {"skip"}
    manifest = read_manifest(store.artifact_folder(plan.step("joined").artifact_id))
    assert manifest.input_ids == {
        "data": plan.step("first").artifact_id,
        "more.second": plan.step("second").artifact_id,
    }
    assert manifest.metrics == {"heldout_loss": 0.1, "parts": 2}
    assert plan.step("first").estimate.train_rows == 3
    assert "checkpoints" not in [path.name for path in plan.step("joined").work.iterdir()]


@pytest.mark.slow
def test_one_changed_param_reruns_its_stage_and_what_depends_on_it_and_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    assert actions(planned(tmp_path, "joined.beta=0.2")[0])["joined"] == "run beta 0.1 -> 0.2"
    after = actions(planned(tmp_path, "first.count=4")[0])
    assert after["first"] == "run count 3 -> 4"
    assert after["joined"] == "run input 'data' changed"
    assert after["second"].startswith("skip")
    assert actions(planned(tmp_path, "second.block.words=[b]")[0])["second"] == 'run block.words ["a"] -> ["b"]'
    assert actions(planned(tmp_path, "second.seed=3")[0])["second"] == "run seed 42 -> 3"


def test_lists_of_blocks_are_compared_block_by_block() -> None:
    """Or a weight that changed would be somewhere within two long texts; a list of plain values is one value."""
    params = {"rewards": [{"kind": "a", "weight": 1.0}, {"kind": "b"}], "paths": ["x", "y"], "none": []}
    assert dict(flatten(params)) == {
        "rewards.0.kind": "a",
        "rewards.0.weight": 1.0,
        "rewards.1.kind": "b",
        "paths": ["x", "y"],
        "none": [],
    }


@pytest.mark.slow
def test_comments_resources_and_places_retrain_nothing(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hello")
    text = RECIPE.replace("count: 3", "count: 3, file: words.txt")
    run(tmp_path, text=text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "words.txt").rename(tmp_path / "elsewhere" / "words.txt")
    moved = (
        text.replace("words.txt", "elsewhere/words.txt")
        + "# a comment\nresources: {processes: 1, save_every_steps: 7}\n"
    )
    assert {line.split()[0] for line in actions(planned(tmp_path, text=moved)[0]).values()} == {"skip"}
    (tmp_path / "elsewhere" / "words.txt").write_text("other")
    assert actions(planned(tmp_path, text=moved)[0])["first"].startswith("run file sha256:")


class Interrupting(FakeStageProcess):
    """Ctrl-C reaches `slipway run` when the step's processes have ended."""

    def run(self, job: Job, environment: Mapping[str, str], watch: Watch) -> int:
        code = super().run(job, environment, watch)
        os.kill(os.getpid(), signal.SIGINT)
        return code


def test_an_interrupt_between_two_steps_is_no_clean_save(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    stream = io.StringIO()
    assert execute(plan, store, {"local": Interrupting()}, Progress(stream)) == 130
    assert "  stopped before it began; the same command goes on from here\n" in stream.getvalue()
    assert [text.split()[0] for text in actions(planned(tmp_path)[0]).values()] == ["skip", "run", "run"]
    assert not plan.step("second").work.exists()


def test_only_and_until_choose_steps_and_missing_inputs_block(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path, only="joined")
    assert str(plan.step("joined").reason) == "needs first, second, which this command does not run"
    code, output = run(tmp_path, only="joined")
    assert code == 2
    assert "blocked" in output
    assert run(tmp_path, until="first")[0] == 0
    assert actions(planned(tmp_path)[0])["second"] == "run not made yet"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("user", 2, "error: rows.jsonl:3: has no field 'text'. Add it."),
        ("crash", 1, "ZeroDivisionError: a bug"),
        ("preempt", 75, "stopped after a clean save: saved checkpoint 5"),
    ],
)
def test_exit_codes_tell_how_a_step_ended(tmp_path: Path, how: str, code: int, words: str) -> None:
    ended, output = run(tmp_path, f"joined.fail={how}")
    assert ended == code
    assert words in output
    assert ("Traceback" in output) == (how == "crash")


def test_a_check_that_fails_is_reported_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.joined.params.beta: must be at most 1, not 2.0. Lower it."):
        planned(tmp_path, "joined.beta=2.0")


@pytest.mark.slow
def test_a_file_that_was_cut_short_makes_the_step_run_again(tmp_path: Path) -> None:
    run(tmp_path)
    plan, store = planned(tmp_path)
    (store.artifact_folder(plan.step("second").artifact_id) / "text.txt").write_text("")
    after = actions(planned(tmp_path)[0])
    assert after["second"].startswith("run its artifact is damaged: text.txt has 0 bytes instead of")
    assert run(tmp_path)[0] == 0
    assert actions(planned(tmp_path)[0])["second"].startswith("skip")


def test_a_checkpoint_makes_the_step_resume_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    step = plan.step("joined")
    checkpoints = store.checkpoints("joined", step.artifact_id)
    for number in (5, 8):
        checkpoints.path(number).mkdir(parents=True)
        (checkpoints.path(number) / "state").write_text("x" * number)
        checkpoints.complete(number)
    again = planned(tmp_path)[0].step("joined")
    assert (again.action, str(again.reason)) == ("resume", "checkpoint 8 of 10, verified")
    (checkpoints.path(8) / "state").write_text("y" * 8)
    again = planned(tmp_path)[0].step("joined")
    assert str(again.reason) == (
        "checkpoint 5 of 10, verified; checkpoint-8 is not resumed from: state has other content than when it was written"
    )


def test_a_step_that_another_process_runs_is_left_alone(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    job = plan.step("first").job("demo", store)
    store.begin(job)
    script = (
        "import time; from pathlib import Path; from pipeline.store.work_folder import WorkFolder\n"
        f"with WorkFolder(Path('{job.work}')).locked(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        step = planned(tmp_path)[0].step("first")
        assert step.action == "blocked"
        assert f"process {holder.pid}" in str(step.reason)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert planned(tmp_path)[0].step("first").action == "run"


@pytest.mark.slow
def test_resources_that_differ_from_the_world_are_refused_before_loading(tmp_path: Path) -> None:
    plan, store = planned(tmp_path, "joined.resources={launcher: torchrun, processes: 2}")
    run(tmp_path, until="first")
    run(tmp_path, until="second")
    job: Any = plan.step("joined").job("demo", store)
    store.begin(job)
    ended = subprocess.run([sys.executable, "-c", DRIVER, job.work], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "is a job for 2 processes, and 1 were started" in ended.stderr
    assert "Traceback" not in ended.stderr
