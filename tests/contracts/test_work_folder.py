"""What the files of a work folder are called stands in one module: the protocol between processes is nobody else's business."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pipeline.settings.strict import CHECKOUT

OWNER = CHECKOUT / "pipeline" / "store" / "work_folder.py"
DISTINCT = frozenset(
    "stop-requested outcome.json journal.jsonl log.txt running.json start.json spent.json job.json batch.sh".split()
)
"""Not even within a longer text, such as `f"{work}/job.json"`."""
NAMES = DISTINCT | {"lock", "out", "checkpoints", "rendezvous"}


def texts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(text, line) of every string that is no docstring, nor one under a field."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno


def named(path: Path) -> set[str]:
    found = set()
    for text, _ in texts(ast.parse(path.read_text(encoding="utf-8"))):
        found |= {name for name in NAMES if text.strip("/") == name}
        found |= {name for name in DISTINCT if name in text}
    return found


def test_only_one_module_names_the_files_of_a_work_folder() -> None:
    paths = [
        path for package in ("pipeline", "stages", "launch", "trackers") for path in (CHECKOUT / package).rglob("*.py")
    ]
    assert len(paths) > 100
    offenders = {str(path.relative_to(CHECKOUT)): named(path) for path in paths if path != OWNER and named(path)}
    assert offenders == {}


def test_that_module_names_them_all() -> None:
    """Or the rule above would hold for want of anything to find."""
    assert named(OWNER) == NAMES
