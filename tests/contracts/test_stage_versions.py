"""A stage that means something else must say so with its version, or old artifacts would be taken for new ones."""

from __future__ import annotations

from stages import STAGES
from tests.contracts.stage_versions import complaints, digest, present, read_record

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


def entry(version: int, digest: str) -> dict[str, object]:
    return {"version": version, "digest": digest}


def test_each_complaint_says_what_to_do() -> None:
    recorded = {
        "same": entry(1, "a"),
        "changed": entry(1, "a"),
        "raised": entry(1, "a"),
        "fell": entry(2, "a"),
        "gone": entry(1, "a"),
    }
    now = {
        "same": entry(1, "a"),
        "changed": entry(1, "b"),
        "raised": entry(2, "b"),
        "fell": entry(1, "a"),
        "new": entry(1, "a"),
    }
    found = {line.partition(":")[0]: line for line in complaints(recorded, now)}
    assert set(found) == {"changed", "raised", "fell", "new", "gone"}
    assert "raise `version`" in found["changed"]
    assert "Versions only rise" in found["fell"]
    assert all("make stage-versions" in found[kind] for kind in ("changed", "raised", "new", "gone"))
