"""The arguments and options that several commands take, and the class of all commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand


class StrictCommand(TyperCommand):
    """A command that takes each of its options once, except those that are repeatable: else the last one would stand, and
    nothing would say that the others do not."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in dict.fromkeys(given):
            is_value = option.param_type_name == "option" and not getattr(option, "is_flag", False)
            if is_value and given.count(option) > 1 and not option.multiple:
                ctx.fail(f"Option '{option.opts[0]}' takes one value, and was given {given.count(option)} times.")
        return super().parse_args(ctx, args)


RecipeArgument = Annotated[
    Path, typer.Argument(help="A recipe: a YAML file, such as pipeline/recipes/quickstart.yaml.")
]


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides a field: align.beta=0.2, or stages.align.resources.processes=2. Repeatable."),
]


def folder_of_a_store(given: str | Path) -> Path:
    """The path. An empty one, as a variable that is not set leaves it, would be the working folder."""
    if not str(given):
        raise typer.BadParameter("it is empty; name a folder, or . for the working folder")
    return Path(given)


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        parser=folder_of_a_store,
        metavar="PATH",
        help="Where artifacts live. Default: $SLIPWAY_STORE, or runs/ in the working folder.",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


NameArgument = Annotated[
    str, typer.Argument(help="An artifact's id (or its first digits), its folder, or a step's name.")
]


AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        help="An adapter of the model: an artifact's id, a step's name or a folder; NAME=PLACE gives it a name of its own in the chat. The first one is on. Repeatable."
    ),
]


PlacesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="PLACE",
        help="A data file, a folder of such or a pattern (several are read as one source); or an artifact's id, a step's name, a model's folder.",
    ),
]


LayoutOption = Annotated[str | None, typer.Option("--layout", help="Look at the data as this layout only.")]


FormatOption = Annotated[
    str | None, typer.Option("--format", help="Propose only layouts that give this format: chats, labels, ...")
]


SourceSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Decides a field of the source: records=test, columns.text=body, encoding=gb18030. Repeatable."
    ),
]


InspectedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="A model's or tokenizer's folder or step: rows are shown as its template renders them."
    ),
]


InspectedRowsOption = Annotated[
    int, typer.Option("--rows", min=0, help="How many rows are counted and measured, from the first on. 0: all.")
]


ShownRowsOption = Annotated[int, typer.Option("--show", min=0, help="How many rows are shown in full.")]


LengthOption = Annotated[
    int | None,
    typer.Option("--max-length-tokens", min=1, help="Count the rows that are longer; takes --model."),
]
