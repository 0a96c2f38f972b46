"""The record of what each stage's file, and all that it stands on, said when its version was last thought about.

`python -m tests.contracts.stage_versions` (or `make stage-versions`) writes it anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.settings.strict import CHECKOUT
from pipeline.stage import Stage
from tests.contracts.test_layers import all_imports, within

RECORD = Path(__file__).with_name("stage_versions.json")
LIBRARY = "stages.lib"

Record = dict[str, Any]
"""`stages`: kind -> version, digest of its file, and the modules it stands on; `modules`: module -> digest."""


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


def file_of_module(module: str) -> Path | None:
    """The file of a module of the shared library; None for anything else."""
    path = CHECKOUT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((each for each in candidates if each.is_file()), None) if within(module, LIBRARY) else None


@functools.cache
def names_imported(path: Path) -> list[str]:
    return [name for name, _ in all_imports(path)]


@functools.cache
def digest_of_file(path: Path) -> str:
    return digest(path.read_text(encoding="utf-8"))


def closure(start: Path) -> dict[str, Path]:
    """Module -> file of all that a file imports of the shared library, directly or through others, late or not."""
    found: dict[str, Path] = {}
    ahead = [start]
    while ahead:
        for name in names_imported(ahead.pop()):
            path = file_of_module(name)
            if path is not None and name not in found:
                found[name] = path
                ahead.append(path)
    return found


def present(stages: Mapping[str, Stage]) -> Record:
    """What a record of the stages as they are says."""
    modules: dict[str, str] = {}
    entries = {}
    for kind, stage in sorted(stages.items()):
        used = closure(file_of(stage))
        modules |= {name: digest_of_file(path) for name, path in used.items()}
        entries[kind] = {"version": stage.version, "digest": digest_of_file(file_of(stage)), "uses": sorted(used)}
    return {"stages": entries, "modules": dict(sorted(modules.items()))}


def complaints(recorded: Record, now: Record) -> list[str]:
    """What does not fit together, each with what to do."""
    found = []
    for kind, entry in now["stages"].items():
        old = recorded["stages"].get(kind)
        changed = changed_parts(kind, recorded, now)
        if old is None:
            found.append(f"{kind}: is not recorded yet. Run `make stage-versions`.")
        elif entry["version"] < old["version"]:
            found.append(f"{kind}: its version fell from {old['version']} to {entry['version']}. Versions only rise.")
        elif entry["version"] > old["version"]:
            found.append(f"{kind}: version {entry['version']} is not recorded yet. Run `make stage-versions`.")
        elif changed:
            found.append(
                f"{kind}: {', '.join(changed)} changed and its version is still {entry['version']}. If the same params and"
                " inputs now give another result, raise `version` in its STAGE, so that old artifacts are made anew. Then,"
                " or if the meaning is unchanged, run `make stage-versions`."
            )
    found += [
        f"{kind}: is recorded and no longer a stage. Run `make stage-versions`."
        for kind in recorded["stages"]
        if kind not in now["stages"]
    ]
    return found


def changed_parts(kind: str, recorded: Record, now: Record) -> list[str]:
    """The stage's own file and the modules it stands on, as far as they are other programs than recorded."""
    old, new = recorded["stages"].get(kind), now["stages"][kind]
    if old is None:
        return []
    own = ["its file"] if old["digest"] != new["digest"] else []
    names = sorted({*old["uses"], *new["uses"]})
    before = {name: recorded["modules"].get(name) for name in old["uses"]}
    after = {name: now["modules"].get(name) for name in new["uses"]}
    return own + [name.removeprefix(f"{LIBRARY}.") for name in names if before.get(name) != after.get(name)]


def read_record() -> Record:
    record: Record = json.loads(RECORD.read_bytes())
    return record


def main() -> None:
    """Writes the record anew, and says which stages stand on something that changed, so that one may raise their versions."""
    from stages import STAGES

    now = present(STAGES)
    recorded = read_record() if RECORD.exists() else {"stages": {}, "modules": {}}
    for complaint in complaints(recorded, now):
        if complaint.endswith("only rise."):
            raise SystemExit(complaint)
        kind, what = complaint.split(": ", 1)
        print(f"{kind}: {'recorded' if kind in now['stages'] else 'removed'} ({what.split('. ')[0].rstrip('.')})")
    RECORD.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
