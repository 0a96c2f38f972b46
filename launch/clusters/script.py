"""The batch script of a job: a pure function of the job and the profile, to be read, and submitted by hand as well."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from launch.clusters.profile import Profile, Request
from pipeline.errors import Problem, RecipeError
from pipeline.settings.strict import CHECKOUT
from pipeline.store.job import Job

BODY = """\

# SLURM says so before the time is up, and when it takes the nodes away: the step saves then.
step=
asked=no
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
{python} -m pipeline step {work} &
step=$!
[ "$asked" = no ] || kill -USR1 "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?

# 75: all is saved, and the step goes on where it stands. 0: it is done. 2: a mistake that only its user can mend.
again=no
requeues={requeues}
if [ "$code" -eq 75 ]; then
    again=yes
elif [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    if [ "$asked" = yes ]; then why=unsaved most={unsaved}; else why=crash most={crashes}; fi
    touch "$requeues"
    if [ "$(grep -c "^$why" "$requeues")" -lt "$most" ]; then
        echo "$why: exit code $code in job $SLURM_JOB_ID" >> "$requeues"
        again=yes
    fi
fi
# A job that was cancelled, or that SLURM queues again by itself, is not RUNNING any more.
if [ "$again" = yes ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def batch_script(job: Job, profile: Profile, *, on_gpu: bool) -> str:
    """The script that runs the job. Raises `RecipeError` where a path is none that a script can hold."""
    require_printable({"the store's path": job.work})
    request = profile.request(job.kind, on_gpu=on_gpu)
    options = [
        f"--job-name={job.step}",
        f"--chdir={quoted(job.work)}",
        f"--output={job.files.console('%j').name}",
        "--open-mode=append",
        *what_is_asked(request, job.resources.nodes, job.resources.processes, on_gpu=on_gpu),
        f"--signal=B:USR1@{profile.warn_before_end_seconds}",
        "--requeue",
        *request.sbatch,
    ]
    lines = [
        "#!/bin/bash",
        f"# Step {job.step} of {one_line(job.recipe)}, artifact {job.artifact_id[:12]}. `sbatch {shlex.quote(str(job.files.batch_script))}` submits it by hand.",
        *(f"#SBATCH {option}" for option in options),
        "",
        *preparation(profile),
    ]
    body = BODY.format(
        python=shlex.quote(sys.executable),
        work=shlex.quote(job.work),
        requeues=shlex.quote(str(job.files.requeues)),
        unsaved=profile.unsaved_requeues,
        crashes=profile.crash_requeues,
    )
    return "\n".join(lines) + "\n" + body


def preparation(profile: Profile) -> list[str]:
    """The lines of shell before a command: what the profile sets up, its variables, and where the project is found."""
    variables = dict(profile.environment)
    if profile.interface:
        variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), profile.interface)
    return [
        *profile.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f'export PYTHONPATH={shlex.quote(str(CHECKOUT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
    ]


def what_is_asked(request: Request, nodes: int, processes: int, *, on_gpu: bool) -> list[str]:
    """The options of sbatch for nodes, their processes (one GPU each), cores and the rest of the request, but its extra lines."""
    options = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    if request.cpus_per_node:
        options.append(f"--cpus-per-task={request.cpus_per_node}")
    if on_gpu and request.gpus:
        how, _, kind = request.gpus.partition(":")
        count = f"{kind}:{processes}" if kind else str(processes)
        options.append(f"--gres=gpu:{count}" if how == "gres" else f"--gpus-per-node={count}")
    names = {"memory": "mem"}
    for field in ("time", "partition", "account", "qos", "constraint", "reservation", "memory"):
        if value := getattr(request, field):
            options.append(f"--{names.get(field, field)}={value}")
    return options


def require_printable(paths: Mapping[str, str]) -> None:
    """Raises `RecipeError` for the first of these paths, and of our own, that no script can hold."""
    for what, value in {**paths, "the checkout's path": str(CHECKOUT), "Python's path": sys.executable}.items():
        if not value.isprintable():
            hint = "Use a path of printable characters on one line."
            raise RecipeError(Problem(what, f"{value!r} cannot stand in a batch script", hint))


def one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def quoted(text: str) -> str:
    """A value for a line `#SBATCH`, which no shell reads: SLURM knows double quotes, and a backslash before what it would read."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
