"""The arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    Path, typer.Argument(help="A recipe: a YAML file, such as pipeline/recipes/quickstart.yaml.")
]


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides a field: align.beta=0.2, or stages.align.resources.processes=2. Repeatable."),
]


StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Where artifacts live. Default: $SLIPWAY_STORE, or runs/ in the working folder."),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


NameArgument = Annotated[
    str, typer.Argument(help="An artifact's id (or its first digits), its folder, or a step's name.")
]
