"""What must not stand twice in `stages/`, and how large a file or a function of the program may be."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.settings.strict import CHECKOUT
from stages import STAGES
from stages.data.clean import CleanParams
from stages.lib.formulas.divergences import DIVERGENCES
from stages.lib.formulas.policy_gradient import KL_ESTIMATORS
from stages.lib.formulas.policy_table import AGGREGATIONS, POLICY_LOSSES
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES
from stages.lib.rows.canonical import FORMATS
from stages.lib.sources import python_docs
from stages.lib.sources.files import READERS
from stages.lib.sources.params import FileType

MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_FILE = 350


def sources(folder: str) -> list[Path]:
    found = sorted((CHECKOUT / folder).rglob("*.py"))
    assert found
    return found


def functions_in(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_and_functions_are_short() -> None:
    too_long = set()
    for path in [*sources("stages"), *sources("pipeline"), *sources("launch"), *sources("trackers")]:
        name = str(path.relative_to(CHECKOUT))
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES_OF_A_FILE:
            too_long.add(name)
        too_long |= {f"{name}: {node.name}" for node in functions_in(path) if lines_of(node) > MOST_LINES_OF_A_FUNCTION}
    assert too_long == set()


def test_what_the_library_offers_has_a_name_of_its_own() -> None:
    """Two classes or functions of one name would have to be told apart by where they come from."""
    places = defaultdict(set)
    for path in sources("stages/lib"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                places[node.name].add(str(path.relative_to(CHECKOUT)))
    assert {name for name, found in places.items() if len(found) > 1} == set()


def choices(stage: str, field: str) -> tuple[Any, ...]:
    return get_args(STAGES[stage].params.model_fields[field].annotation)


@pytest.mark.parametrize(
    ("offered", "table"),
    [
        (get_args(choices("dpo", "loss")[0]), PREFERENCE_LOSSES),
        (get_args(choices("dpo", "f_divergence")[0]), DIVERGENCES),
        (choices("ppo", "kl_estimator"), KL_ESTIMATORS),
        (choices("ppo", "policy_loss"), POLICY_LOSSES),
        (get_args(choices("ppo", "loss_aggregation")[0]), AGGREGATIONS),
        (get_args(CleanParams.model_fields["format"].annotation), FORMATS),
        (tuple(python_docs.FORMATS), FORMATS),
        (get_args(FileType), READERS),
    ],
    ids=[
        "losses",
        "divergences",
        "estimators",
        "policy losses",
        "aggregations",
        "formats",
        "formats of python_docs",
        "readers",
    ],
)
def test_what_a_recipe_may_name_is_what_the_table_holds(offered: tuple[Any, ...], table: Any) -> None:
    assert offered == tuple(table)


def test_grpo_leaves_out_the_estimator_whose_gradient_vanishes() -> None:
    assert set(choices("grpo", "kl_estimator")) == set(KL_ESTIMATORS) - {"k1"}
