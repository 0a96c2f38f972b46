"""Who may import whom, read from the sources: nothing is imported but in the last tests, and there in other processes."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.strict import CHECKOUT

HEAVY = frozenset(
    "torch transformers datasets datatrove llmcompressor compressed_tensors numpy deepspeed accelerate trl peft "
    "sentencepiece tokenizers safetensors pandas pyarrow spacy huggingface_hub".split()
)
"""Libraries that take long to load: planning must do without them."""
COMPOSITION_ROOTS = frozenset({"pipeline.cli", "pipeline.worker"})
LIGHT_CORE = frozenset("artifact checkpoints errors journal recipe resources stage strict yaml_loader".split())
"""The modules of `pipeline` that stages may use: what they are given, not what runs them."""
LAUNCH_CORE = frozenset({"errors", "job", "strict"})


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


def test_the_core_sees_no_stage_and_no_launcher() -> None:
    """Tables are passed in; only the command line and the worker see them."""
    offenders = [
        broken(path, line, name)
        for path in modules("pipeline")
        if module_name(path) not in COMPOSITION_ROOTS
        for name, line in all_imports(path)
        if top(name) in ("stages", "launch")
    ]
    assert offenders == []


def test_the_core_and_the_launchers_load_nothing_heavy() -> None:
    """Not even late, but for the worker, which brings hub models, and the doctor's probe, which runs on its own."""
    allowed = {("pipeline.worker", "huggingface_hub"), ("launch.probe", "torch")}
    offenders = [
        broken(path, line, name)
        for package in ("pipeline", "launch")
        for path in modules(package)
        for name, line in all_imports(path)
        if top(name) in HEAVY and (module_name(path), top(name)) not in allowed
    ]
    offenders += [
        broken(path, line, name)
        for package in ("pipeline", "launch")
        for path in modules(package)
        for name, line in imports_at_load(path)
        if top(name) in HEAVY
    ]
    assert offenders == []


def test_launchers_know_jobs_and_errors_only() -> None:
    offenders = [
        broken(path, line, name)
        for path in modules("launch")
        for name, line in all_imports(path)
        if top(name) == "stages" or (top(name) == "pipeline" and not names_one_of(name, LAUNCH_CORE))
    ]
    assert offenders == []


def names_one_of(name: str, parts: frozenset[str]) -> bool:
    """Whether `pipeline.x...` is about one of the given modules (or is the bare `pipeline` of `from pipeline import x`)."""
    _, _, rest = name.partition(".")
    return not rest or top(rest) in parts


def stage_files() -> list[Path]:
    """The files of stages: stages/<group>/<kind>.py."""
    return [
        path
        for path in modules("stages")
        if len(path.relative_to(CHECKOUT).parts) == 3 and path.parent.name != "lib" and path.name != "__init__.py"
    ]


def library_files() -> list[Path]:
    return modules("stages/lib")


def test_a_stage_imports_no_other_stage() -> None:
    offenders = [
        broken(path, line, name)
        for path in stage_files()
        for name, line in all_imports(path)
        if top(name) == "stages" and name not in ("stages", "stages.lib") and not name.startswith("stages.lib.")
    ]
    assert offenders == []


def test_the_shared_library_imports_no_stage() -> None:
    offenders = [
        broken(path, line, name)
        for path in library_files()
        for name, line in all_imports(path)
        if top(name) == "stages" and name not in ("stages", "stages.lib") and not name.startswith("stages.lib.")
    ]
    assert offenders == []


def test_stages_see_of_the_core_what_they_are_given() -> None:
    offenders = [
        broken(path, line, name)
        for path in [*stage_files(), *library_files()]
        for name, line in all_imports(path)
        if top(name) == "launch" or (top(name) == "pipeline" and not names_one_of(name, LIGHT_CORE))
    ]
    assert offenders == []


def test_a_stage_file_loads_nothing_heavy_at_its_top() -> None:
    offenders = [
        broken(path, line, name) for path in stage_files() for name, line in imports_at_load(path) if top(name) in HEAVY
    ]
    assert offenders == []


def test_no_module_reaches_into_the_tests() -> None:
    offenders = [
        broken(path, line, name)
        for package in ("pipeline", "stages", "launch")
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
    at_load = {name for name, _ in imports(without_late_imports(tree), "stages.data.clean", package=False)}
    assert {"torch.nn", "numpy", "pandas", "spacy"} <= at_load
    assert not at_load & {"datasets", "deepspeed", "stages.data.mix", "stages.lib"}


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.worker", "pipeline.doctor", "stages", "launch"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    """In a process of its own: what params models of stages import counts as well."""
    code = f"import sys, {module}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    process = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert HEAVY & set(process.stdout.split()) == set()
