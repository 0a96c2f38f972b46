"""What a store remembers of the plans that ran: by recipe and variant, and for as long as a run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.command import states
from pipeline.errors import ArtifactError
from pipeline.settings.strict import CHECKOUT
from pipeline.store.records import newest_plan, sets_resources
from pipeline.store.store import Store

A, B, C, D = (letter * 64 for letter in "abcd")


def entry(path: str, *overrides: str, **ids: str) -> dict[str, Any]:
    steps = {name: {"artifact_id": artifact_id, "identity": {}, "kind": "write"} for name, artifact_id in ids.items()}
    return {"path": path, "overrides": list(overrides), "steps": steps}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def kept(store: Store) -> set[str]:
    return set().union(*(plan.ids for plan in store.records().plans))


def test_what_was_set_is_kept_beside_what_was_not(store: Store) -> None:
    store.record("demo", entry("/r.yaml", tok=A))
    store.record("demo", entry("/r.yaml", "tok.beta=2", tok=B))
    assert kept(store) == {A, B}
    store.record("demo", entry("/r.yaml", tok=C))
    assert kept(store) == {B, C}
    assert [plan.ids for plan in store.records().newest()] == [{C}]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("resources.processes=2", True),
        ("tok.resources.processes=2", True),
        ("stages.tok.resources={threads: 1}", True),
        ("tok.beta=2", False),
        ("stages.tok.params.resources=2", False),
        ("seed=3", False),
    ],
)
def test_resources_make_no_variant(store: Store, override: str, expected: bool) -> None:
    assert sets_resources(override) == expected
    store.record("demo", entry("/r.yaml", tok=A))
    store.record("demo", entry("/r.yaml", override, tok=B))
    assert kept(store) == ({B} if expected else {A, B})


def test_two_recipes_of_one_name_are_two_and_the_second_is_said(store: Store, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.touch()
    assert store.record("demo", entry(str(first), tok=A)) == []
    assert store.record("demo", entry(str(first), "tok.beta=2", tok=B)) == []
    (said,) = store.record("demo", entry(str(second), tok=C))
    assert said.startswith(f"another recipe named 'demo' ran in this store: {first}. ")
    assert kept(store) == {A, B, C}
    (said,) = store.record("demo", entry(str(first), tok=A))
    assert f"{second} (which is gone)" in said
    labels = [entry["label"] for entry in states.store_status(store)]
    assert labels == [f"demo ({first})", f"demo ({second})", f"demo --set tok.beta=2 ({first})"]


def test_a_name_means_what_its_recipe_ran_last_and_two_meanings_are_told_apart(store: Store) -> None:
    for artifact_id in (A, B, C):
        store.artifact_folder(artifact_id).mkdir(parents=True)
        (store.artifact_folder(artifact_id) / "manifest.json").touch()
    store.record("demo", entry("/r.yaml", tok=A, old=D))
    store.record("demo", entry("/r.yaml", "tok.beta=2", tok=B))
    assert store.resolve("tok")[0] == store.resolve("demo/tok")[0] == B
    with pytest.raises(ArtifactError, match="has not been made yet"):
        store.resolve("old")
    store.record("demo", entry("/elsewhere/r.yaml", tok=C))
    expected = r"demo/tok: means several artifacts: b{12} \(tok of /r.yaml\), c{12} \(tok of /elsewhere/r.yaml\)"
    with pytest.raises(ArtifactError, match=expected):
        store.resolve("demo/tok")


def test_an_old_record_is_read_and_gives_way_to_a_new_one(store: Store) -> None:
    store.recipes.mkdir(parents=True)
    (store.recipes / "demo.json").write_text(json.dumps(entry("/r.yaml", tok=A)))
    os.utime(store.recipes / "demo.json", (1, 1))
    plan = newest_plan(store.recipes, "demo", "/r.yaml")
    assert plan is not None
    assert (plan.name, plan.ids) == ("demo", {A})
    store.record("demo", entry("/r.yaml", "tok.beta=2", tok=B))
    assert kept(store) == {A, B}
    store.record("demo", entry("/r.yaml", tok=C))
    assert kept(store) == {B, C}
    assert not (store.recipes / "demo.json").exists()


def test_a_recipe_that_was_moved_is_compared_with_what_its_name_ran(store: Store) -> None:
    store.record("demo", entry("/r.yaml", tok=A))
    store.record("demo-2", entry("/other.yaml", tok=B))
    moved = newest_plan(store.recipes, "demo", "/elsewhere/r.yaml")
    assert moved is not None
    assert moved.ids == {A}
    assert newest_plan(store.recipes, "dem", "/r.yaml") is None


def test_a_replaced_plan_is_kept_until_its_run_has_ended(store: Store) -> None:
    """The first plan is recorded by a process that goes on; this one replaces it."""
    script = (
        "import sys; from pathlib import Path; from pipeline.store.store import Store\n"
        f"store, entry = Store(Path({str(store.folder)!r})), {entry('/r.yaml', tok=A)!r}\n"
        "store.record('demo', entry, running=True); print('recorded', flush=True); sys.stdin.readline()\n"
        "store.end('demo', entry); print('ended', flush=True); sys.stdin.readline()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    )
    with other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "recorded\n"
        store.record("demo", entry("/r.yaml", tok=B), running=True)
        store.record("demo", entry("/r.yaml", tok=C), running=True)
        assert [plan.ids for plan in store.records().replaced] == [{A}]
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "ended\n"
        assert store.records().replaced == []
        assert kept(store) == {C}
        assert store.records().plans[0].goes_on
        other.stdin.close()
    store.end("demo", entry("/r.yaml", tok=C))
    assert not store.records().plans[0].goes_on


@pytest.mark.slow
def test_no_plan_is_lost_where_several_are_recorded_at_once(store: Store) -> None:
    """Each process records other plans of one variant in turn, and goes on: all of the last ones count."""
    script = (
        "import sys; from pathlib import Path; from pipeline.store.store import Store\n"
        f"store, name = Store(Path({str(store.folder)!r})), sys.argv[1]\n"
        "for number in range(20):\n"
        "    step = {'artifact_id': name * 62 + f'{number:02}', 'identity': {}, 'kind': 'write'}\n"
        "    store.record('demo', {'path': '/r.yaml', 'overrides': [], 'steps': {'tok': step}}, running=True)\n"
        "print('recorded', flush=True); sys.stdin.readline()"
    )
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script, name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=CHECKOUT,
                )
            )
            for name in "abcd"
        ]
        assert [other.stdout.readline() for other in others if other.stdout] == ["recorded\n"] * 4
        records = store.records()
        assert set().union(*(plan.ids for plan in records.plans + records.replaced)) == {
            name * 62 + "19" for name in "abcd"
        }
