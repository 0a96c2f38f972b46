"""The record of what each stage's file said when its version was last thought about.

`python -m tests.contracts.stage_versions` (or `make stage-versions`) writes it anew.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.stage import Stage

RECORD = Path(__file__).with_name("stage_versions.json")
Entry = dict[str, Any]


def digest(source: str) -> str:
    """A digest of the program in `source` that comments, layout and documentation do not change.

    It is made of node types and values, empty ones left out, and so is the same for all versions of Python.
    """
    return hashlib.sha256("\n".join(outline(ast.parse(source))).encode()).hexdigest()[:16]


def outline(node: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"{depth} {type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if value is None or value == []:
                continue
            yield f"{depth} .{name}"
            yield from outline(value, depth + 1)
    elif isinstance(node, list):
        for item in node:
            if not is_documentation(item):
                yield from outline(item, depth + 1)
    else:
        yield f"{depth} {type(node).__name__} {node!r}"


def is_documentation(node: Any) -> bool:
    """Whether it is a string that stands alone: a docstring, or the documentation under a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def file_of(stage: Stage) -> Path:
    return Path(importlib.import_module(stage.run.__module__).__file__ or "")


def present(stages: Mapping[str, Stage]) -> dict[str, Entry]:
    return {
        kind: {"version": stage.version, "digest": digest(file_of(stage).read_text(encoding="utf-8"))}
        for kind, stage in sorted(stages.items())
    }


def complaints(recorded: Mapping[str, Entry], now: Mapping[str, Entry]) -> list[str]:
    """What does not fit together, each with what to do."""
    found = []
    for kind, entry in now.items():
        old = recorded.get(kind)
        if old is None:
            found.append(f"{kind}: is not recorded yet. Run `make stage-versions`.")
        elif entry["version"] < old["version"]:
            found.append(f"{kind}: its version fell from {old['version']} to {entry['version']}. Versions only rise.")
        elif entry["version"] > old["version"]:
            found.append(f"{kind}: version {entry['version']} is not recorded yet. Run `make stage-versions`.")
        elif entry["digest"] != old["digest"]:
            found.append(
                f"{kind}: the file changed and its version is still {entry['version']}. If the same params and inputs now give"
                " another result, raise `version` in its STAGE, so that old artifacts are made anew. Then, or if the"
                " meaning is unchanged, run `make stage-versions`."
            )
    found += [
        f"{kind}: is recorded and no longer a stage. Run `make stage-versions`." for kind in recorded if kind not in now
    ]
    return found


def read_record() -> dict[str, Entry]:
    record: dict[str, Entry] = json.loads(RECORD.read_bytes())
    return record


def main() -> None:
    from stages import STAGES

    recorded, now = (read_record() if RECORD.exists() else {}), present(STAGES)
    for complaint in complaints(recorded, now):
        if complaint.endswith("only rise."):
            raise SystemExit(complaint)
        kind, what = complaint.split(": ", 1)
        print(f"{kind}: {'recorded' if kind in now else 'removed'} ({what.split('.')[0]})")
    RECORD.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
