"""Who may import whom, read from the sources: nothing is imported but in the last tests, and there in other processes."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipeline.settings.strict import CHECKOUT

HEAVY = frozenset(
    "torch transformers datasets datatrove llmcompressor compressed_tensors numpy deepspeed accelerate trl peft "
    "sentencepiece tokenizers safetensors pandas pyarrow spacy huggingface_hub py3langid icu4py wandb mlflow tensorboardX "
    "tensorboard".split()
)
"""Libraries that take long to load: planning must do without them."""
COMPOSITION_ROOTS = frozenset(
    {"pipeline.command.cli", "pipeline.command.clusters", "pipeline.command.planning", "pipeline.running.worker"}
)
"""The only modules that see the tables `STAGES`, `LAUNCHERS` and `TRACKERS`, and hand them in."""

SETTINGS = "pipeline.errors pipeline.settings"
CORE = f"{SETTINGS} pipeline.figures pipeline.store pipeline.stage"
GIVEN = f"{SETTINGS} pipeline.stage " + " ".join(
    f"pipeline.store.{name}" for name in "artifact checkpoints durable journal numbers resumable".split()
)
"""What a stage sees of the core: what it is given, not what runs it."""
LOW = "stages.lib.formulas stages.lib.processes stages.lib.rows"
MIDDLE = f"{LOW} stages.lib.text stages.lib.models stages.lib.training"

ROOMS: dict[str, str] = {
    # The core.
    "pipeline.figures": "",
    "pipeline.errors": "pipeline.figures",
    "pipeline.processes": "",
    "pipeline.settings": "pipeline.errors",
    "pipeline.store": f"{SETTINGS} pipeline.figures pipeline.processes",
    "pipeline.stage": f"{SETTINGS} pipeline.store",
    "pipeline.recipe": CORE,
    "pipeline.cards": f"{CORE} pipeline.recipe",
    "pipeline.running": f"{CORE} pipeline.processes pipeline.recipe pipeline.cards",
    "pipeline.submitting": f"{CORE} pipeline.running",
    "pipeline.command": f"{CORE} pipeline.recipe pipeline.running pipeline.submitting",
    # How a job becomes processes.
    "launch": f"{SETTINGS} pipeline.processes pipeline.store.job",
    # Where a step is shown.
    "trackers": f"{SETTINGS} pipeline.store",
    # What stages share, floor by floor.
    "stages.lib.processes": f"{GIVEN} pipeline.processes",
    "stages.lib.formulas": GIVEN,
    "stages.lib.rows": GIVEN,
    "stages.lib.sources": f"{GIVEN} stages.lib.rows",
    "stages.lib.curation": f"{GIVEN} stages.lib.rows",
    "stages.lib.text": f"{GIVEN} {LOW}",
    "stages.lib.models": f"{GIVEN} {LOW} stages.lib.text",
    "stages.lib.training": f"{GIVEN} {LOW} stages.lib.text stages.lib.models",
    "stages.lib.generating": f"{GIVEN} {MIDDLE}",
    "stages.lib.preferring": f"{GIVEN} {MIDDLE}",
    "stages.lib.encoding": f"{GIVEN} {MIDDLE}",
    "stages.lib.on_policy": f"{GIVEN} {MIDDLE} stages.lib.generating stages.lib.preferring",
    "stages.lib.measuring": f"{GIVEN} {MIDDLE} stages.lib.generating stages.lib.preferring",
    "stages.lib.inspecting": f"{GIVEN} stages.lib.rows stages.lib.sources stages.lib.curation stages.lib.text",
    # The stages: all rooms, never each other.
    **{
        f"stages.{group}": f"{GIVEN} stages.lib"
        for group in ("data", "language_model", "alignment", "compression", "evaluation", "encoder")
    },
}
"""Room -> what its files may import of this project besides each other (of a stage's group not even those)."""


def module_name(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> list[Path]:
    found = sorted((CHECKOUT / package).rglob("*.py"))
    assert found, f"there is no Python file in {package}/"
    return found


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of everything that is imported below `tree`. `from a import b` counts as `a` and as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + package]
                base = ".".join([*above, *filter(None, [base])])
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def all_imports(path: Path) -> list[tuple[str, int]]:
    return list(imports(parse(path), module_name(path), path.name == "__init__.py"))


def imports_at_load(path: Path) -> list[tuple[str, int]]:
    """What importing the file imports: not what stands in functions, nor below `if TYPE_CHECKING:`."""
    return list(imports(without_late_imports(parse(path)), module_name(path), path.name == "__init__.py"))


def without_late_imports(tree: ast.Module) -> ast.Module:
    return ast.Module(body=[node for node in map(without_late_parts, tree.body) if node], type_ignores=[])


def without_late_parts(node: ast.stmt) -> ast.stmt | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        node.body = [ast.Pass()]
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in list(getattr(node, field, [])):
            if isinstance(child, ast.stmt | ast.excepthandler) and without_late_parts(child) is None:
                getattr(node, field).remove(child)
    return node


def top(name: str) -> str:
    return name.partition(".")[0]


def broken(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(CHECKOUT)}:{line} imports {name}"


def room_of(module: str) -> str | None:
    """The room that the module stands in; None for the composition roots' own tables and for what stands in no room."""
    return next((room for room in ROOMS if within(module, room)), None)


def within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def is_ours(name: str) -> bool:
    return top(name) in ("pipeline", "stages", "launch", "trackers")


def test_every_file_stands_in_a_room() -> None:
    outside = {
        module_name(path)
        for package in ("pipeline", "stages", "launch", "trackers")
        for path in modules(package)
        if room_of(module_name(path)) is None
    }
    assert outside == {"pipeline", "pipeline.__main__", "stages", "stages.lib"}


def test_every_room_says_in_one_line_what_it_is_for() -> None:
    packages = [path for path in modules("stages/lib") + modules("pipeline") if path.name == "__init__.py"]
    for path in packages:
        first, *rest = (ast.get_docstring(parse(path)) or "").splitlines()
        assert first and not rest, path
    assert len(packages) > 15


def test_walls() -> None:
    """Nothing is imported through a wall: `ROOMS` says what each room may see."""
    offenders = []
    for package in ("pipeline", "stages", "launch", "trackers"):
        for path in modules(package):
            module = module_name(path)
            room = room_of(module)
            if room is None or module in COMPOSITION_ROOTS:
                continue
            own = () if path in stage_files() else (room,)
            allowed = [*own, *ROOMS[room].split()]
            names = [(name, line) for name, line in all_imports(path) if is_ours(name)]
            offenders += [broken(path, line, name) for name, line in names if not may_see(name, allowed)]
    assert offenders == []


def may_see(name: str, allowed: Sequence[str]) -> bool:
    """Whether `name` lies within what is allowed, or is a package above it: `from a.b import c` counts as `a.b`, too."""
    return any(within(name, place) or within(place, name) for place in allowed)


def test_the_table_has_no_circle() -> None:
    """Each room sees only rooms that stand above it in the table: below it in the house."""
    seen: list[str] = []
    for room, allowed in ROOMS.items():
        for place in allowed.split():
            if place != "stages.lib":
                assert any(within(place, each) for each in seen), f"{room} sees {place}"
        seen.append(room)


def test_the_core_and_the_launchers_load_nothing_heavy() -> None:
    """Not even late, but for the worker, which brings hub models, and the doctor's probe, which runs on its own; trackers load theirs late."""
    allowed = {("pipeline.running.worker", "huggingface_hub"), ("launch.probe", "torch")}
    offenders = [
        broken(path, line, name)
        for package in ("pipeline", "launch")
        for path in modules(package)
        for name, line in all_imports(path)
        if top(name) in HEAVY and (module_name(path), top(name)) not in allowed
    ]
    offenders += [
        broken(path, line, name)
        for package in ("pipeline", "launch", "trackers")
        for path in modules(package)
        for name, line in imports_at_load(path)
        if top(name) in HEAVY
    ]
    assert offenders == []


def stage_files() -> list[Path]:
    """The files of stages: stages/<group>/<kind>.py."""
    return [
        path
        for path in modules("stages")
        if len(path.relative_to(CHECKOUT).parts) == 3 and path.parent.name != "lib" and path.name != "__init__.py"
    ]


def test_a_stage_file_loads_nothing_heavy_at_its_top() -> None:
    offenders = [
        broken(path, line, name) for path in stage_files() for name, line in imports_at_load(path) if top(name) in HEAVY
    ]
    assert offenders == []


def test_no_module_reaches_into_the_tests() -> None:
    offenders = [
        broken(path, line, name)
        for package in ("pipeline", "stages", "launch", "trackers")
        for path in modules(package)
        for name, line in all_imports(path)
        if top(name) in ("tests", "pytest", "trl")
    ]
    assert offenders == []


def test_the_rules_above_can_be_broken() -> None:
    """The reader of imports sees late, conditional, relative and nested ones, and tells which of them happen on loading."""
    source = """
    import torch.nn as nn
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        import datasets
    try:
        import numpy
    except ImportError:
        import pandas
    class Params:
        import spacy
        def method(self):
            import deepspeed
    def run():
        from stages.data.mix import STAGE
        from ..lib import rows
    """
    tree = ast.parse(textwrap.dedent(source))
    everything = {name for name, _ in imports(tree, "stages.data.clean", package=False)}
    assert {"torch.nn", "datasets", "numpy", "pandas", "spacy", "deepspeed"} <= everything
    assert {"stages.data.mix", "stages.lib", "stages.lib.rows"} <= everything
    assert not may_see("stages.data.mix", ["stages.lib"])
    assert may_see("stages.lib", ["stages.lib.rows"]) and not may_see("stages.lib.text.chats", ["stages.lib.rows"])
    at_load = {name for name, _ in imports(without_late_imports(tree), "stages.data.clean", package=False)}
    assert {"torch.nn", "numpy", "pandas", "spacy"} <= at_load
    assert not at_load & {"datasets", "deepspeed", "stages.data.mix", "stages.lib"}


@pytest.mark.parametrize(
    "module", ["pipeline.command.cli", "pipeline.running.worker", "pipeline.command.doctor", "stages", "launch"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    """In a process of its own: what params models of stages import counts as well."""
    loaded = modules_after(f"import stages, {module}; list(stages.STAGES.values())")
    assert "stages.alignment.dpo" in loaded
    assert HEAVY & {name.partition(".")[0] for name in loaded} == set()


def test_a_worker_loads_the_stage_that_it_runs() -> None:
    """Each rank of each step starts a process: params models of twenty stages are a quarter of a second."""
    loaded = modules_after("import pipeline.running.worker; from stages import STAGES; STAGES['pretrain']")
    groups = ("alignment", "compression", "data", "encoder", "evaluation", "language_model")
    stage_files = {name for name in loaded for group in groups if name.startswith(f"stages.{group}.")}
    assert stage_files == {"stages.language_model.pretrain"}


def modules_after(code: str) -> set[str]:
    """The modules that a process of its own has loaded after running the code."""
    code = f"import sys; {code}; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())
