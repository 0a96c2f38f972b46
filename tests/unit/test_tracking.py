"""Trackers: when they are asked for, what they are told, and what they are never told twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch import LAUNCHERS
from pipeline.errors import RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.running.plan import make_plan
from pipeline.running.tracking import asked, wait_for_all
from pipeline.store.job import Job
from pipeline.store.journal import Journal, JournalTail
from pipeline.store.store import Store
from tests.unit.fake_stages import STAGES
from trackers import TRACKERS, following
from trackers.base import HIDDEN, Begun, Run, Tracker, without_secrets
from trackers.following import Follower
from trackers.mlflow import MLflow, MLflowOptions
from trackers.system import SystemFigures
from trackers.wandb import Wandb, WandbOptions

RECIPE = """
name: demo
outputs: [first]
tracking: {TRACKING}
stages:
  first: {kind: write, params: {count: 2}}
"""


def recipe(folder: Path, tracking: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("{TRACKING}", tracking))
    return path


def job(folder: Path, tracking: str = "{tensorboard: {}}") -> Job:
    store = Store(folder / "store")
    plan = make_plan(load_recipe(recipe(folder, tracking), STAGES, LAUNCHERS, (), TRACKERS), store)
    made = plan.step("first").job("demo", store)
    store.begin(made)
    return made


# What is asked for


def test_a_recipe_names_trackers_and_their_options(tmp_path: Path) -> None:
    made = job(tmp_path, "{tensorboard: {}, wandb: {project: mine, tags: [a]}}")
    assert made.resources.tracking == {"tensorboard": {}, "wandb": {"project": "mine", "tags": ["a"]}}


def test_a_steps_own_tracking_counts(tmp_path: Path) -> None:
    path = recipe(tmp_path, "{wandb: {}}")
    path.write_text(path.read_text().replace("count: 2}", "count: 2}, resources: {tracking: {tensorboard: null}}"))
    (step,) = load_recipe(path, STAGES, LAUNCHERS, (), TRACKERS).steps
    assert step.resources.tracking == {"tensorboard": {}}


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        ("{wandbb: {}}", "tracking: there is no tracker 'wandbb'. Did you mean 'wandb'?"),
        ("{wandb: {projekt: x}}", "tracking.wandb.projekt"),
        ("{wandb: {api_key: x}}", "tracking.wandb.api_key"),
        ("[wandb]", "Write `tracking: {tensorboard: {}}`."),
        ("{wandb: 3}", "tracking.wandb"),
    ],
)
def test_what_is_no_tracker_is_refused(tmp_path: Path, tracking: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe(tmp_path, tracking), STAGES, LAUNCHERS, (), TRACKERS)
    assert said in str(refused.value)


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("trackers.base.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe(tmp_path, "{wandb: {}}"), STAGES, LAUNCHERS, (), TRACKERS)
    assert "tracking.wandb: wandb is not installed: pip install -c constraints.txt -e '.[trackers]'" in str(
        refused.value
    )
    assert load_recipe(recipe(tmp_path, "{wandb: {}}"), STAGES, LAUNCHERS, ("tracking={}",), TRACKERS).steps


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({}, {}, []),
        ({"wandb": {}, "tensorboard": {}}, {}, ["tensorboard", "wandb"]),
        ({}, {"WANDB_PROJECT": "mine"}, ["wandb"]),
        ({}, {"WANDB_MODE": "offline"}, ["wandb"]),
        ({}, {"WANDB_API_KEY": "k", "WANDB_ENTITY": "e"}, []),
        ({"wandb": {}}, {"WANDB_MODE": "disabled"}, []),
        ({"wandb": {}}, {"WANDB_DISABLED": "true", "WANDB_PROJECT": "mine"}, []),
        ({"mlflow": {}}, {"MLFLOW_TRACKING_URI": "http://h"}, ["mlflow"]),
    ],
)
def test_who_is_asked(given: dict[str, Any], environment: dict[str, str], expected: list[str]) -> None:
    assert asked(given, TRACKERS, environment) == expected


def test_what_looks_like_a_secret_is_hidden() -> None:
    value = {"hub_token": "a", "nested": [{"API_KEY": "b", "keys": 1}], "password": "c", "learning_rate": 1e-3}
    hidden = {"hub_token": HIDDEN, "nested": [{"API_KEY": HIDDEN, "keys": 1}], "password": HIDDEN}
    assert without_secrets(value) == {**hidden, "learning_rate": 1e-3}


# A journal that is read while it is written


def test_a_tail_reads_what_is_whole_and_sees_that_it_was_rewound(tmp_path: Path) -> None:
    journal, tail = Journal(tmp_path / "journal.jsonl", writes=True), JournalTail(tmp_path / "journal.jsonl")
    assert tail.read() == []
    journal.write("step", step=1)
    with journal.path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in tail.read()] == [1]
    with journal.path.open("a") as file:
        file.write('ep": 2}\n')
    assert [event["step"] for event in tail.read()] == [2] and not tail.was_rewound
    journal.rewind(1)
    journal.write("step", step=2, again=True)
    assert [event["step"] for event in tail.read()] == [1, 2] and tail.was_rewound
    assert tail.read() == [] and not tail.was_rewound


# What a tracker is told


class Listener(Tracker):
    """Notes what it is told."""

    name = "listener"

    def __init__(self, told: list[Any], knows: int = -1, fails: Callable[[], bool] = lambda: False) -> None:
        self.told, self.knows, self.fails = told, knows, fails

    def begin(self, run: Run) -> Begun:
        self.told.append(("begin", run.id, run.told_step))
        return Begun("own-id", self.knows, note="listens")

    def numbers(self, step: int, values: Mapping[str, float], time: float) -> None:
        if self.fails():
            raise ConnectionError("the line is dead")
        self.told.append((step, dict(values)))

    def progress(self, what: str, done: float, total: float, time: float) -> None:
        self.told.append((what, done, total))

    def sentence(self, step: int, text: str, time: float) -> None:
        self.told.append((step, text))

    def table(self, name: str, step: int, rows: Any, time: float) -> None:
        self.told.append((name, step, list(rows)))

    def flush(self) -> None:
        """Nothing is held back."""

    def made(self, manifest: Any, folder: Path) -> None:
        self.told.append(("made", manifest.artifact_id))

    def end(self, exit_code: int | None) -> None:
        self.told.append(("end", exit_code))


class Rank:
    """The rank that is followed: it ends when it is asked for the `polls`-th time."""

    def __init__(self, polls: int, between: Callable[[int], None] = lambda number: None, exit_code: int | None = 75):
        self.polls, self.between, self.exit_code, self.asked = polls, between, exit_code, 0

    def has_ended(self, wait_seconds: float) -> bool:
        self.asked += 1
        self.between(self.asked)
        return self.asked >= self.polls


@pytest.fixture(autouse=True)
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about what is told; the extra `trackers` need not be there."""
    monkeypatch.setattr(Tracker, "missing", classmethod(lambda cls: ""))


@pytest.fixture(autouse=True)
def no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline ends the process: here that is the test's."""
    monkeypatch.setattr(following, "end_soon", lambda seconds: None)


def test_numbers_sentences_progress_and_samples_are_told(tmp_path: Path) -> None:
    made, told = job(tmp_path), []
    journal = Journal(made.files.journal, writes=True)
    journal.write("progress", what="rows", done=3, total=4)
    journal.note("a sentence")
    journal.write("step", step=1, total_steps=9, loss=2.0, rewards={"length": 0.5}, step_skipped=True)
    journal.write("rollout", rollout=1, step=1, kl=0.1, samples=[{"prompt": "p", "completion": "c"}])
    journal.write("heldout", step=1, heldout_loss=3.0, loss=float("nan"))
    Follower(made, "listener", lambda: Listener(told), Rank(1)).run()
    assert told == [
        ("begin", None, -1),
        ("rows", 3, 4),
        (0, "a sentence"),
        (1, {"train/loss": 2.0, "train/rewards/length": 0.5, "train/step_skipped": 1.0}),
        (1, {"rollout/kl": 0.1}),
        ("rollout/samples", 1, [{"prompt": "p", "completion": "c"}]),
        (1, {"heldout/loss": 3.0}),
        ("end", 75),
    ]
    assert [event["text"] for event in journal.events("note")] == ["a sentence", "tracker listener listens"]


def test_what_a_tracker_has_is_not_told_again(tmp_path: Path) -> None:
    """It has step 2 from an earlier run of the step; what it calls that run comes back to it."""
    made, told = job(tmp_path), []
    journal = Journal(made.files.journal, writes=True)
    for step in (1, 2, 3):
        journal.write("step", step=step, loss=float(step))
    Follower(made, "listener", lambda: Listener([]), Rank(1)).run()
    Follower(made, "listener", lambda: Listener(told, knows=2), Rank(1)).run()
    assert told == [("begin", "own-id", 3), (3, {"train/loss": 3.0}), ("end", 75)]


def test_a_rewound_journal_is_told_from_its_beginning(tmp_path: Path) -> None:
    made, told = job(tmp_path), []
    journal = Journal(made.files.journal, writes=True)
    journal.write("step", step=1, loss=1.0)
    journal.write("step", step=2, loss=2.0)

    def rewind(number: int) -> None:
        if number == 2:
            journal.rewind(1)
            journal.write("step", step=2, loss=9.0)

    Follower(made, "listener", lambda: Listener(told), Rank(3, rewind)).run()
    losses = [each[1]["train/loss"] for each in told if isinstance(each[1], dict)]
    assert losses == [1.0, 2.0, 1.0, 9.0]
    assert [first for first, *_ in told if first in ("begin", "end")] == ["begin", "end", "begin", "end"]


def test_figures_from_before_a_restart_stand_at_their_step(tmp_path: Path) -> None:
    """The figure of step 3 was written before the journal was rewound to step 1, and steps 2 and 3 came again."""
    made, told = job(tmp_path), []
    journal, system = (Journal(path, writes=True) for path in (made.files.journal, made.files.system_journal))
    journal.write("step", step=1, loss=1.0)
    system.write("system", step=3, memory_gib=0.5)
    time.sleep(0.01)
    for step in (2, 3):
        journal.write("step", step=step, loss=float(step))
    Follower(made, "listener", lambda: Listener(told), Rank(1)).run()
    assert [each[0] for each in told[1:-1]] == [1, 2, 3, 3]


def test_a_tracker_that_fails_is_tried_again_and_told_what_it_missed(tmp_path: Path) -> None:
    made, told, failures = job(tmp_path), [], iter([True, False, False])
    journal = Journal(made.files.journal, writes=True)
    journal.write("step", step=1, loss=1.0)
    Follower(made, "listener", lambda: Listener(told, fails=lambda: next(failures)), Rank(4)).run()
    assert told == [("begin", None, -1), ("begin", "own-id", -1), (1, {"train/loss": 1.0}), ("end", 75)]
    notes = [event["text"] for event in journal.events("note")]
    assert notes[-1].startswith("tracker listener: the line is dead. It is tried again every minute")


def test_figures_of_the_system_stand_at_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(tmp_path)
    monkeypatch.setattr("trackers.system.MEASURE_SECONDS", 0.0)
    figures = SystemFigures(made)
    for step in (0, 3, 3, 4):
        figures.write_if_due(step)
    lines = list(Journal(made.files.system_journal, writes=False).events("system"))
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[0]["memory_gib"] > 0 and "cores_busy" in lines[1]


# Real trackers


def test_wandb_keeps_offline_what_no_server_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent is not kept again; what was kept and not sent is written anew, also behind what was sent before."""
    pytest.importorskip("wandb")
    from tests.e2e.tracked import wandb_curves

    monkeypatch.setenv("WANDB_SILENT", "true")
    made, options = job(tmp_path), WandbOptions(mode="offline")
    folder = Store(Path(made.store)).tracking_folder("wandb", made)
    journal = Journal(made.files.journal, writes=True)

    def follow(*steps: int) -> dict[str, Any]:
        for step in steps:
            journal.write("step", step=step, loss=float(step))
        Follower(made, "wandb", lambda: Wandb(options), Rank(1)).run()
        known: dict[str, Any] = json.loads(made.files.tracking_file("wandb").read_text())
        time.sleep(1.1)  # wandb names its folders by the second
        return known

    first = follow(1, 2)
    assert (first["sent_step"], first["told_step"]) == (-1, 2)
    assert wandb_curves(folder) == {"train/loss": [(1, 1.0), (2, 2.0)]}
    again = follow(3)
    assert again["id"] == first["id"] and not (folder / "wandb" / first["kept_in"]).exists()
    assert wandb_curves(folder) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}

    (run_file,) = (folder / "wandb" / again["kept_in"]).glob("*.wandb")
    run_file.with_suffix(".wandb.synced").touch()
    behind = follow(4)
    assert (behind["sent_step"], behind["told_step"]) == (3, 4)
    last = follow(5)
    assert (last["sent_step"], last["told_step"]) == (3, 5)
    assert wandb_curves(folder) == {"train/loss": [(step, float(step)) for step in range(1, 6)]}


def test_mlflow_is_told_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    made = job(tmp_path)
    options = MLflowOptions(uri=(tmp_path / "mlruns").as_uri(), experiment="demo")
    journal = Journal(made.files.journal, writes=True)
    for step in (1, 2):
        journal.write("step", step=step, loss=float(step))
    Follower(made, "mlflow", lambda: MLflow(options), Rank(1)).run()
    journal.rewind(1)
    journal.write("step", step=2, loss=2.0)
    journal.write("step", step=3, loss=3.0)
    Follower(made, "mlflow", lambda: MLflow(options), Rank(1, exit_code=1)).run()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=options.uri)
    experiment = client.get_experiment_by_name("demo")
    (run,) = client.search_runs([experiment.experiment_id])
    curve = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert curve == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert (run.info.run_name, run.info.status, run.data.params["params/count"]) == ("first", "FAILED", "2")


def test_a_tracker_that_does_not_end_is_killed() -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.kill(sleeping.pid, signal.SIGSTOP)
    started = time.monotonic()
    wait_for_all([sleeping], 0.2)
    assert sleeping.wait(5) == -signal.SIGKILL and time.monotonic() - started < 5


def test_job_files_hold_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    made = job(tmp_path, "{wandb: {}}")
    assert "0123456789" not in json.dumps(made.model_dump(mode="json"))
