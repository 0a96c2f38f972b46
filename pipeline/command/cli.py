"""The command line: reads arguments, calls the core, prints. Heavy parts are imported by the commands that need them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launch import LAUNCHERS
from pipeline.command import reports
from pipeline.errors import EXIT_CRASH, EXIT_USER_ERROR, Problem, RecipeError, SlipwayError, did_you_mean
from pipeline.recipe.reader import load_recipe
from pipeline.running import progress as console
from pipeline.running.plan import Action, Plan, make_plan
from pipeline.store.numbers import json_text
from pipeline.store.store import Store
from stages import STAGES

app = typer.Typer(
    name="slipway",
    help="Trains language models in stages: data, pretraining, tuning, alignment, compression, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def open_store(path: Path | None) -> Store:
    return Store(path or Path(os.environ.get("SLIPWAY_STORE") or "runs"))


def planned(
    recipe: Path, overrides: list[str] | None, store: Store, *, only: str | None = None, until: str | None = None
) -> Plan:
    return make_plan(load_recipe(recipe, STAGES, LAUNCHERS, overrides or ()), store, only=only, until=until)


def print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)


@app.command()
def plan(recipe: RecipeArgument, set_: SetOption = None, store: StoreOption = None, json_: JsonOption = False) -> None:
    """Say what `run` would do, and why; runs nothing."""
    the_store = open_store(store)
    the_plan = planned(recipe, set_, the_store)
    if json_:
        print(json_text(reports.plan_data(the_plan), "plan", indent=2))
    else:
        print_lines(reports.plan_lines(the_plan, the_store))


@app.command()
def run(
    recipe: RecipeArgument,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage alone; its inputs must exist.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Run this stage and what it stands on.")] = None,
    set_: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Run what the plan says, resuming what was interrupted and skipping what is done."""
    if only and until:
        raise RecipeError(Problem("--only and --until", "exclude each other", "Use one of them."))
    from pipeline.running.execute import execute

    the_store = open_store(store)
    the_plan = planned(recipe, set_, the_store, only=only, until=until)
    raise typer.Exit(execute(the_plan, the_store, LAUNCHERS, console.Progress()))


@app.command()
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
        raise RecipeError(Problem(f"stages.{stage}", str(step.reason), "Run the stages before it first."))
    the_job = step.job(the_plan.recipe.name, the_store)
    the_store.begin(the_job)
    the_store.record(the_plan.recipe.name, the_plan.record())
    print(f"{the_job.work}/job.json")
    print("run one of these in the checkout:")
    names = ("torchrun", "deepspeed") if step.recipe_step.stage.distributed else ("local",)
    for name in names:
        print(f"  {shlex.join(LAUNCHERS[name].command(the_job))}")


@app.command()
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
        entries = reports.plan_status(planned(recipe, set_, the_store), the_store)
    else:
        entries = reports.store_status(the_store)
    print(json_text(entries, "status", indent=2)) if json_ else print_lines(reports.status_lines(entries, the_store))


@app.command()
def lineage(artifact: NameArgument, store: StoreOption = None) -> None:
    """Print what an artifact was made from, down to the digests of the sources."""
    the_store = open_store(store)
    print_lines(reports.lineage_lines(the_store, artifact))


@app.command()
def show(artifact: NameArgument, store: StoreOption = None) -> None:
    """Print an artifact's manifest, readable."""
    print_lines(reports.show_lines(open_store(store), artifact))


@app.command()
def verify(artifact: NameArgument, store: StoreOption = None) -> None:
    """Hash an artifact's files again and name those that differ."""
    lines, sound = reports.verify_lines(open_store(store), artifact)
    print_lines(lines)
    raise typer.Exit(0 if sound else EXIT_USER_ERROR)


@app.command()
def stages(kind: Annotated[str | None, typer.Argument(help="One stage: print its inputs and params.")] = None) -> None:
    """List the stages, or the params of one with defaults and documentation."""
    if kind is None:
        print_lines(reports.stage_table(STAGES))
    elif kind in STAGES:
        print_lines(reports.stage_lines(STAGES[kind]))
    else:
        raise RecipeError(Problem(kind, "is no stage", did_you_mean(kind, STAGES)))


@app.command()
def doctor(store: StoreOption = None) -> None:
    """Check this machine: Python, libraries, devices, ranks that talk, disk; say what to install."""
    from pipeline.command.doctor import examine

    raise typer.Exit(examine(open_store(store), sys.stdout))


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove artifacts and work that no recipe's current plan, nor any kept artifact's lineage, needs."""
    from pipeline.store.collect import collect, needed_artifacts

    the_store = open_store(store)

    def current(path: str, overrides: list[str]) -> set[str]:
        return {step.artifact_id for step in planned(Path(path), overrides, the_store).steps}

    needed, notes = needed_artifacts(the_store, current)
    print_lines([*notes, *collect(the_store, needed, dry_run=dry_run)])


@app.command()
def chat(
    model: NameArgument,
    store: StoreOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a causal model with its own chat template and stop ids. /reset starts anew, /exit ends."""
    path = Path(model)
    if not (path / "config.json").exists():
        _, path = open_store(store).resolve(model)
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1"})
    from stages.lib.generating.chat import chat as talk

    def read_line() -> str | None:
        try:
            return input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    talk(path, read_line, write, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def main() -> Any:
    """The console script: user errors end with exit code 2 and no traceback."""
    try:
        app()
    except SlipwayError as error:
        problems = [str(problem) for problem in error.problems]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if len(problems) > 1:
            print(f"{len(problems)} problems; nothing was run.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(128 + 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_CRASH)


if __name__ == "__main__":
    main()
