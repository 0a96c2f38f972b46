"""The command line: reads arguments, calls the core, prints. Heavy parts are imported by the commands that need them."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch import LAUNCHERS
from pipeline.command import clusters, reports, states
from pipeline.command.ending import drop_output, refuse
from pipeline.command.inspection import report_lines, source_fields
from pipeline.command.naming import adapters_to_talk_to, model_to_talk_to, open_store, place_of
from pipeline.command.options import (
    AdapterOption,
    FormatOption,
    InspectedModelOption,
    InspectedRowsOption,
    JsonOption,
    LayoutOption,
    LengthOption,
    NameArgument,
    PlacesArgument,
    RecipeArgument,
    SetOption,
    ShownRowsOption,
    SourceSetOption,
    StoreOption,
    StrictCommand,
)
from pipeline.command.planning import planned, print_lines, print_notes
from pipeline.command.talking import read_line, show_text
from pipeline.errors import (
    EXIT_CRASH,
    EXIT_USER_ERROR,
    LaunchError,
    Problem,
    RecipeError,
    SlipwayError,
    did_you_mean,
)
from pipeline.running import progress as console
from pipeline.running.plan import Action
from pipeline.running.unfinished import take_over
from pipeline.settings.paths import unusable
from pipeline.store.disk import NO_ROOM, refusal
from pipeline.store.numbers import json_text
from stages import STAGES

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1"}
"""What keeps the libraries that open models from asking the network."""


app = typer.Typer(
    name="slipway",
    help="Trains language models in stages: data, pretraining, tuning, alignment, compression, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=StrictCommand)
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    store: StoreOption = None,
    json_: JsonOption = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash all artifacts and outside files again; what is damaged is run anew.")
    ] = False,
) -> None:
    """Say what `run` would do, and why; runs nothing."""
    the_store = open_store(store)
    the_plan = planned(recipe, set_, the_store, verify=verify)
    print_notes(the_store.odd_records())
    if json_:
        print(json_text(reports.plan_data(the_plan), "plan", indent=2))
    else:
        print_lines(reports.plan_lines(the_plan, the_store))


@app.command(cls=StrictCommand)
def run(
    recipe: RecipeArgument,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage alone; its inputs must exist.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Run this stage and what it stands on.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="How many steps run at a time, where they do not read each other; GPUs are shared out."
        ),
    ] = 1,
    set_: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Run what the plan says, resuming what was interrupted and skipping what is done."""
    from pipeline.running.execute import execute

    the_store = open_store(store)
    the_plan = planned(recipe, set_, the_store, only=only, until=until)
    try:
        raise typer.Exit(execute(the_plan, the_store, LAUNCHERS, console.Progress(), jobs=jobs))
    finally:
        the_store.end(the_plan.recipe.name, the_plan.record(the_store))


@app.command(cls=StrictCommand)
def job(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(help="The stage's name in the recipe.")],
    set_: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Write a step's job.json and print the commands that run it, for launch scripts of your own."""
    the_store = open_store(store)
    the_plan = planned(recipe, set_, the_store, only=stage)
    step = the_plan.step(stage)
    if step.action is Action.BLOCKED:
        hint = "Run the stages before it first." if step.reason.waits_for else ""
        raise RecipeError(Problem(f"stages.{stage}", str(step.reason), hint))
    the_job = step.job(the_plan.recipe.name, the_store)
    notes = the_store.record(the_plan.recipe.name, the_plan.record(the_store))
    take_over(step.adopts, step.work, the_store)
    the_store.begin(the_job)
    print_lines([f"note: {sentence}" for sentence in notes])
    print(the_job.files.job_file)
    print("run one of these in the checkout:")
    own = the_job.resources.launcher_name
    if own != "local" or not step.recipe_step.stage.distributed:
        print(f"  {shlex.join(LAUNCHERS[own].command(the_job))}")
    others = set(LAUNCHERS) - {"local", own} if step.recipe_step.stage.distributed else set()
    for name in (name for name in LAUNCHERS if name in others):
        with contextlib.suppress(LaunchError):  # the recipe tells its own launcher what it needs, and no other
            print(f"  {shlex.join(LAUNCHERS[name].command(the_job))}")


@app.command(cls=StrictCommand)
def status(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe. Default: every recipe that ran in the store.")
    ] = None,
    set_: SetOption = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Show state, artifact and metrics of every step, and what is running since when."""
    the_store = open_store(store)
    if recipe:
        entries = states.plan_status(planned(recipe, set_, the_store), the_store)
    else:
        entries = states.store_status(the_store)
    entries, notes = states.with_queue(entries, clusters.queued)
    print_notes([*the_store.oddities(), *notes])
    print(json_text(entries, "status", indent=2)) if json_ else print_lines(states.status_lines(entries, the_store))


clusters.add_to(app)


@app.command(cls=StrictCommand)
def lineage(artifact: NameArgument, store: StoreOption = None) -> None:
    """Print what an artifact was made from, down to the digests of the sources."""
    the_store = open_store(store)
    print_lines(reports.lineage_lines(the_store, artifact))


@app.command(cls=StrictCommand)
def show(artifact: NameArgument, store: StoreOption = None) -> None:
    """Print an artifact's manifest, readable."""
    print_lines(reports.show_lines(open_store(store), artifact))


@app.command(cls=StrictCommand)
def verify(artifact: NameArgument, store: StoreOption = None) -> None:
    """Hash an artifact's files again and name those that differ."""
    lines, sound = reports.verify_lines(open_store(store), artifact)
    print_lines(lines)
    raise typer.Exit(0 if sound else EXIT_USER_ERROR)


@app.command(cls=StrictCommand)
def stages(kind: Annotated[str | None, typer.Argument(help="One stage: print its inputs and params.")] = None) -> None:
    """List the stages, or the params of one with defaults and documentation."""
    if kind is None:
        print_lines(reports.stage_table(STAGES))
    elif kind in STAGES:
        print_lines(reports.stage_lines(STAGES[kind]))
    else:
        raise RecipeError(Problem(kind, "is no stage", did_you_mean(kind, STAGES)))


@app.command(cls=StrictCommand)
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    only_current: Annotated[
        bool,
        typer.Option(
            "--only-current", help="Keep of each recipe only what it ran last: lets go what --set made before."
        ),
    ] = False,
    store: StoreOption = None,
) -> None:
    """Remove artifacts and work that no recorded plan, no running or interrupted step and no lineage of these needs."""
    from pipeline.store.collect import collect

    the_store = open_store(store)

    def current(path: str, overrides: list[str]) -> set[str]:
        return planned(Path(path), overrides, the_store).ids(the_store)

    print_notes(the_store.odd_folders())
    print_lines(collect(the_store, current, dry_run=dry_run, only_current=only_current))


@app.command(cls=StrictCommand)
def forget(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe that ran here, or its path.")],
    store: StoreOption = None,
) -> None:
    """Forget what a recipe ran, with all that was set: `slipway gc` then removes what only it needs."""
    from pipeline.store.collect import forget_recipe

    print_lines(forget_recipe(open_store(store), recipe))


@app.command(cls=StrictCommand)
def chat(
    model: NameArgument,
    adapter: AdapterOption = None,
    store: StoreOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a causal model with its own chat template and stop ids. /reset starts anew, /adapter NAME changes adapters, /exit ends."""
    path, notes = model_to_talk_to(model, store)
    adapters, more = adapters_to_talk_to(adapter or [], store)
    print_notes([*notes, *more])
    os.environ.update(OFFLINE)
    from stages.lib.generating.chat import chat as talk

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    talk(path, read_line, show_text, adapters=adapters, **options)


@app.command(cls=StrictCommand)
def inspect(
    places: PlacesArgument,
    layout: LayoutOption = None,
    format_: FormatOption = None,
    set_: SourceSetOption = None,
    model: InspectedModelOption = None,
    rows: InspectedRowsOption = 1000,
    show_: ShownRowsOption = 3,
    max_length_tokens: LengthOption = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Propose how a source must be written to read data, and show rows as a model sees them; or look at an artifact."""
    from stages.lib.inspecting.inspection import inspect_places

    the_store = open_store(store)
    os.environ.update(OFFLINE)
    report = inspect_places(
        [place_of(place, the_store) for place in places],
        layout=layout,
        format=format_,
        given=source_fields(set_ or ()),
        model=None if model is None else Path(place_of(model, the_store)),
        num_rows=rows,
        num_shown=show_,
        max_length_tokens=max_length_tokens,
    )
    print(json_text(report, "inspect", indent=2)) if json_ else print_lines(report_lines(report, sys.stdout))


def main() -> None:
    """The console script: user errors, and disks that refuse, end with exit code 2 and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SlipwayError as error:
        refuse([str(problem) for problem in error.problems])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        drop_output()
        sys.exit(EXIT_CRASH)
    except OSError as error:
        # What could not be written must not be tried once more at the end.
        if error.filename is None and error.errno in NO_ROOM:
            drop_output()
            refuse([str(problem) for problem in unusable("the output", error).problems])
        if refused := refusal(error, Path.cwd()):
            drop_output()
            refuse([str(refused)])
        if error.filename is None:
            raise
        refuse([str(problem) for problem in unusable(error.filename, error).problems])


if __name__ == "__main__":
    main()
