"""A stage that means something else must say so with its version, or old artifacts would be taken for new ones."""

from __future__ import annotations

from stages import STAGES
from tests.contracts.stage_versions import Record, closure, complaints, digest, file_of, present, read_record

SOURCE = '''
"""What it does."""
class Params:
    steps: int = 10
    """Optimizer steps."""

def run(ctx, params):
    # Why.
    return params.steps * 2
'''


def test_no_stage_changed_behind_its_version() -> None:
    found = complaints(read_record(), present(STAGES))
    assert not found, "\n" + "\n".join(found)


def test_comments_layout_and_documentation_do_not_count() -> None:
    other = (
        SOURCE.replace("What it does", "What it makes")
        .replace("Optimizer steps", "Steps")
        .replace("# Why.", "# Because.")
    )
    other = other.replace("params.steps * 2", "(params.steps  *  2)")
    assert other != SOURCE
    assert digest(other) == digest(SOURCE)


def test_what_is_computed_counts() -> None:
    changes = [("10", "11"), ("* 2", "* 3"), ("* 2", "+ 2"), ("steps: int", "steps: float"), ("run(ctx", "run(context")]
    digests = {digest(SOURCE), *(digest(SOURCE.replace(old, new)) for old, new in changes)}
    assert len(digests) == len(changes) + 1


def record(**stages: tuple[int, str, dict[str, str]]) -> Record:
    """A record of stages (version, digest, module -> digest)."""
    return {
        "stages": {kind: {"version": v, "digest": d, "uses": sorted(m)} for kind, (v, d, m) in stages.items()},
        "modules": {name: digest for _, _, modules in stages.values() for name, digest in modules.items()},
    }


def test_each_complaint_says_what_to_do() -> None:
    recorded = record(
        same=(1, "a", {}), changed=(1, "a", {}), raised=(1, "a", {}), fell=(2, "a", {}), gone=(1, "a", {})
    )
    now = record(same=(1, "a", {}), changed=(1, "b", {}), raised=(2, "b", {}), fell=(1, "a", {}), new=(1, "a", {}))
    found = {line.partition(":")[0]: line for line in complaints(recorded, now)}
    assert set(found) == {"changed", "raised", "fell", "new", "gone"}
    assert "raise `version`" in found["changed"]
    assert "Versions only rise" in found["fell"]
    assert all("make stage-versions" in found[kind] for kind in ("changed", "raised", "new", "gone"))


def test_what_a_stage_stands_on_counts() -> None:
    """A loss that two stages use changes, and a module is no longer used by the third."""
    loss, rows = "stages.lib.formulas.loss", "stages.lib.rows.canonical"
    recorded = record(
        dpo=(1, "a", {loss: "x", rows: "y"}),
        reward=(3, "a", {loss: "x"}),
        mix=(1, "a", {rows: "y"}),
        pack=(1, "a", {rows: "y"}),
    )
    now = record(
        dpo=(1, "a", {loss: "z", rows: "y"}), reward=(4, "a", {loss: "z"}), mix=(1, "a", {}), pack=(1, "a", {rows: "y"})
    )
    found = {line.partition(":")[0]: line for line in complaints(recorded, now)}
    assert set(found) == {"dpo", "reward", "mix"}
    assert "formulas.loss changed and its version is still 1" in found["dpo"]
    assert "version 4 is not recorded yet" in found["reward"]
    assert "rows.canonical changed" in found["mix"]


def test_the_closure_reaches_what_is_imported_late_and_through_others() -> None:
    """dpo's file imports the loop inside `run`; the loop imports the engine, and that the optimizer."""
    used = closure(file_of(STAGES["dpo"]))
    wanted = ("training.loop", "training.engine", "training.optimizer", "formulas.preference_losses", "text.chat_spans")
    assert {f"stages.lib.{name}" for name in wanted} <= set(used)
    assert "stages.lib.encoding.extraction" not in used
