"""The commands of clusters: submit, cancel, logs, `step`, which is what a job of theirs runs, and `doctor`, which tries them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from launch import LAUNCHERS
from launch.clusters.profile import load_profile
from launch.clusters.slurm import Queued, Slurm
from pipeline.command.naming import open_store
from pipeline.command.options import RecipeArgument, SetOption, StoreOption, StrictCommand
from pipeline.command.planning import planned, print_lines
from pipeline.errors import ArtifactError, Problem, RecipeError
from pipeline.settings.strict import Reading
from pipeline.store.disk import writing
from pipeline.store.durable import make_folder
from pipeline.store.job import read_job
from pipeline.store.store import Store
from pipeline.store.work_folder import WorkFolder
from pipeline.store.works import read_work, work_folders, works_on
from stages import STAGES

FOLLOW_SECONDS = 0.5

ClusterOption = Annotated[
    str,
    typer.Option("--cluster", help="The cluster: a profile of launch/clusters/, or the path of one of your own."),
]


def submit(
    recipe: RecipeArgument,
    cluster: ClusterOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the scripts.")] = False,
    only: Annotated[str | None, typer.Option("--only", help="Submit this stage alone; its inputs must exist.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Submit this stage and what it stands on.")] = None,
    set_: SetOption = None,
    store: StoreOption = None,
) -> None:
    """Submit a job per step that has to run, chained by what they read. What waits or runs already is kept."""
    from pipeline.submitting.submit import submit as submit_plan

    the_store = open_store(store)
    profile = load_profile(cluster, STAGES)
    the_plan = planned(recipe, set_, the_store, only=only, until=until)
    count = submit_plan(the_plan, the_store, Slurm(profile), print, dry_run=dry_run)
    if not dry_run:
        print(f"{count} submitted; `slipway status` shows them, `slipway cancel {recipe}` cancels them")


def cancel(
    recipe: Annotated[str, typer.Argument(help="A recipe that was submitted: its path, or its name.")],
    store: StoreOption = None,
) -> None:
    """Cancel the jobs of a recipe, with whatever it was submitted; steps that run save first."""
    from pipeline.submitting.submit import cancel as cancel_works

    the_store = open_store(store)
    found = Reading([Path.cwd()]).find(recipe)
    plans = [plan for plan in the_store.records().plans if plan.path == str(found) or plan.name == recipe]
    if not plans:
        what = f"no recipe of this name or path has run in {the_store.folder}"
        raise RecipeError(Problem(recipe, what, "`slipway status` lists those that have; --store names another store."))
    ids = {step.artifact_id for plan in plans for step in plan.steps.values()}
    works = [folder for folder in work_folders(the_store.work) if read_work(folder).artifact_id in ids]
    print_lines(cancel_works(works, Slurm()) or ["no job of this recipe waits or runs"])


def logs(
    step: Annotated[str, typer.Argument(help="A step's name, RECIPE/STEP, or the first digits of its artifact's id.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is printed, until Ctrl-C.")] = False,
    store: StoreOption = None,
) -> None:
    """Print what a step printed: of a submitted one the console of its newest job, and the log of its processes."""
    files = [WorkFolder(folder) for folder in works_of(open_store(store), step)]
    paths = [path for each in files for path in (*each.consoles()[-1:], each.log) if path.exists() or follow]
    if not paths:
        raise ArtifactError(
            Problem(step, "has printed nothing yet", "`slipway status` tells whether it waits or runs.")
        )
    shown = dict.fromkeys(paths, 0)
    last: Path | None = None
    while True:
        for path in paths:
            data = read_from(path, shown[path])
            if data and last != path:
                print(f"==> {path} <==")
                last = path
            shown[path] += len(data)
            print(data.decode("utf-8", errors="replace"), end="", flush=True)
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


def read_from(path: Path, position: int) -> bytes:
    """What the file holds behind the position; nothing of a file that is not there yet."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return b""


def works_of(store: Store, name: str) -> list[Path]:
    """The work folders of the step that `name` means. Raises `ArtifactError` if it means none or several."""
    meanings = store.meanings(name)
    if len(meanings) > 1:
        listed = ", ".join(f"{each[:12]} ({what})" for each, what in sorted(meanings.items()))
        hint = "Write RECIPE/STEP, or the first digits of the one that you mean."
        raise ArtifactError(Problem(name, f"means several steps: {listed}", hint))
    folders = [work.folder for each in meanings for work in works_on(work_folders(store.work), each)]
    if not folders:
        raise ArtifactError(
            Problem(name, f"no step of this name has begun in {store.folder}", "`slipway status` lists them.")
        )
    return folders


def step(
    work: Annotated[Path, typer.Argument(help="A step's work folder, with its job.")],
) -> None:
    """Run the job of a work folder as `slipway run` would, on the node where this is called: what a batch script calls."""
    from pipeline.running.prepared import execute_job
    from pipeline.running.progress import Progress

    job = read_job(work.absolute())
    if job.kind not in STAGES:
        hint = "Submit the recipe again with the version of Slipway that runs here."
        raise ArtifactError(Problem(str(job.files.job_file), f"there is no stage '{job.kind}' here", hint))
    raise typer.Exit(execute_job(job, STAGES, LAUNCHERS, Progress()))


def doctor(
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Try this profile on its cluster instead, by jobs of a minute."),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="With --cluster: how many nodes are to work together.")
    ] = 2,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="With --cluster: how many seconds to wait for free nodes.")
    ] = 120.0,
    store: StoreOption = None,
) -> None:
    """Check this machine, or with --cluster a cluster: what there is, what is missing, what to change."""
    from pipeline.command.doctor import Finding, examine, findings, findings_where_jobs_are_submitted

    folder = open_store(store).folder
    if cluster is None:
        raise typer.Exit(examine(findings(folder), sys.stdout))
    from launch.clusters.trial import trials

    with writing(folder):
        make_folder(folder)
    kinds = {kind: stage.distributed for kind, stage in STAGES.items()}
    verdicts = trials(Slurm(load_profile(cluster, STAGES)), folder, kinds, nodes, patience)
    tried = (Finding(each.state, each.subject, each.what, each.hint) for each in verdicts)
    raise typer.Exit(examine(chain(findings_where_jobs_are_submitted(folder), tried), sys.stdout))


def queued() -> Mapping[str, Queued]:
    """What the scheduler of this machine knows of submitted steps: see `Slurm.queued`."""
    return Slurm().queued()


def add_to(app: typer.Typer) -> None:
    for command in (submit, cancel, logs, step, doctor):
        app.command(cls=StrictCommand)(command)
