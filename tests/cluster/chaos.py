"""Disturbs the tiny recipe on a SLURM of two nodes at random moments, and submits it again, until it is made.

    python -m tests.cluster.chaos --kills 50 --seed 1
    python -m tests.cluster.chaos --kills 6 --only base --reference STORE

prints a line per disturbance: what was done to which step's job. A rank, a torchrun or a slurmd is killed, a job cancelled,
preempted, warned that its time is up or given less of it, a node set down. Nothing else is done afterwards but what people do:
nodes are brought back, and the recipe is submitted again. Fails if it is not made in the end, if an artifact differs from that
of a run without disturbance on one machine, or if a process is left. Wants root, and Debian's `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.processes import Process, all_processes
from pipeline.running.marks import read_marks
from tests.cluster.slurm import NODES, Slurm, missing
from tests.e2e.chaos import Failed, digests, require_same, told, undisturbed
from tests.e2e.driving import ROOT, TINY, command, store_without

ON_TWO_NODES = ("base", "chat", "aligned", "kto", "ppo")
SETTINGS = [
    f"--set=stages.{step}.resources.{setting}"
    for step in ON_TWO_NODES
    for setting in ("nodes=2", "processes=1", "launcher=torchrun")
]
PROFILE = 'time: "30"\nwarn_before_end_seconds: 40\ncrash_requeues: 2\nunsaved_requeues: 5\n'
ACTIONS = (
    "kill a rank", "kill torchrun", "kill slurmd", "cancel", "preempt", "warn", "little time", "node down",
)  # fmt: skip
LONGEST_STILL_SECONDS = 300.0
GONE_SECONDS = 60.0
HELD_BACK_SECONDS = 8.0
"""How long a requeued job waits, where SLURM would have it wait two minutes: what is left of it on its nodes has ended by then.
Much sooner SLURM takes the new one for a duplicate, and holds it."""


@dataclass
class Chaos:
    """A store that is made by jobs which are disturbed, over and over."""

    slurm: Slurm
    folder: Path
    reference: Path
    """A store in which the recipe has run undisturbed, on one machine."""
    only: str | None
    random: random.Random
    longest_seconds: float
    passes: int = 0
    submissions: int = 0
    done: Counter[str] = field(default_factory=Counter)
    held_back: dict[str, float] = field(default_factory=dict)
    """Job that SLURM holds back -> when that was seen first."""
    news: str = ""
    still_since: float = field(default_factory=time.monotonic)

    @property
    def store(self) -> Path:
        return self.folder / f"store-{self.passes}"

    def submit(self) -> None:
        """What a person does when something is missing, and what changes nothing when nothing is."""
        if self.only and not self.store.exists():
            store_without(self.reference, self.only, self.store)
        chosen = ("--only", self.only) if self.only else ()
        profile = self.folder / "profile.yaml"
        profile.write_text(PROFILE)
        arguments = ("submit", TINY, "--cluster", profile, "--store", self.store, *chosen, *SETTINGS)
        ended = self.slipway(*arguments)
        self.submissions += 1
        # A job that was taken away a moment ago may still be saving: its step is run by what is no job any more.
        if ended.returncode != 0 and "is being run by" not in ended.stderr + ended.stdout:
            raise Failed(f"cannot be submitted:\n{ended.stdout}{ended.stderr}")

    def slipway(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), cwd=ROOT, env=self.slurm.environment, capture_output=True, text=True, timeout=600
        )

    def jobs(self, *states: str) -> dict[str, str]:
        """Id -> step of the jobs in these states; in any that is not the end without."""
        listed = self.slurm.ask("squeue", "--noheader", "--format=%i %T %j").splitlines()
        found = [line.split() for line in listed if len(line.split()) == 3]
        return {job: step for job, state, step in found if state in (states or (state,))}

    def disturb(self) -> str | None:
        """Lets jobs run for a random time, then does something to one; None if all was made before."""
        action = self.random.choice(ACTIONS)
        until = time.monotonic() + self.random.uniform(0.5, self.longest_seconds)
        while time.monotonic() < until or not self.jobs("RUNNING"):
            if self.go_on():
                return None
            time.sleep(0.2)
        job, step = self.random.choice(sorted(self.jobs("RUNNING").items()))
        said = self.act(action, job, step)
        self.done[action] += 1
        return said

    def act(self, action: str, job: str, step: str) -> str:
        """Does it, and says what was done. Where no such process is there yet, the job is preempted."""
        ask = self.slurm.ask
        if action in ("kill a rank", "kill torchrun"):
            found = self.ranks(step) if action == "kill a rank" else self.torchruns(step)
            if found:
                target = self.random.choice(found)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target.pid, signal.SIGKILL)
                return f"{step}: {action}, process {target.pid} of {len(found)}"
            action = "preempt"
        if action == "kill slurmd":
            node = self.random.choice(NODES)
            self.slurm.end(node, signal.SIGKILL)
            time.sleep(self.random.uniform(0.0, 20.0))
            self.slurm.start_node(node)
            return f"{step}: SIGKILL to the slurmd of {node}, and another one"
        if action == "node down":
            node = self.random.choice(NODES)
            ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=chaos")
            time.sleep(self.random.uniform(0.0, 10.0))
            ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
            return f"{step}: {node} was set down, and resumed"
        if action == "cancel":
            ask("scancel", job)
            return f"{step}: job {job} was cancelled"
        if action == "warn":
            ask("scancel", "--signal=USR1", "--batch", job)
            return f"{step}: job {job} was told that its time is up"
        if action == "little time":
            ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
            return f"{step}: job {job} was given a minute in all"
        ask("scancel", "--signal=TERM", "--full", job)
        return f"{step}: job {job} was preempted"

    def ranks(self, step: str) -> list[Process]:
        """The ranks of the step that live."""
        marks = [mark for work in (self.store / "work").glob(f"{step}-*") for mark in read_marks(work, 2).values()]
        found = [mark.process.process() for mark in marks if mark.ended is None]
        return [process for process in found if process is not None]

    def torchruns(self, step: str) -> list[Process]:
        def is_one(process: Process) -> bool:
            words = process.command_line()
            return any(word.endswith("/torchrun") for word in words[:3]) and f"/{step}-" in words[-1]

        return [each for each in self.processes() if is_one(each)]

    def processes(self) -> list[Process]:
        """What works in the store of this pass."""
        return [each for each in all_processes() if any(str(self.store) in word for word in each.command_line())]

    def go_on(self) -> bool:
        """Whether all is made. If not, jobs that SLURM holds back for two minutes are let go sooner, nodes are brought back, and
        what is not queued, or was held, is submitted.
        """
        self.require_news()
        self.let_go()
        for node, state in self.slurm.states().items():
            if state.startswith(("down", "drain")):
                self.slurm.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
        if not self.jobs():
            if self.is_made():
                self.compare()
                return True
            self.submit()
        return False

    def let_go(self) -> None:
        listed = self.slurm.ask("squeue", "--noheader", "--states=PENDING", "--format=%i %r").splitlines()
        reasons = dict(line.split(maxsplit=1) for line in listed if " " in line)
        held_back = {job for job, reason in reasons.items() if "BeginTime" in reason}
        self.held_back = {job: self.held_back.get(job, time.monotonic()) for job in held_back}
        for job, since in self.held_back.items():
            if time.monotonic() - since > HELD_BACK_SECONDS:
                self.slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        if any("held" in reason for reason in reasons.values()):
            self.submit()

    def is_made(self) -> bool:
        wanted = set(digests(self.reference))
        return self.store.exists() and wanted <= set(digests(self.store))

    def compare(self) -> None:
        """Compares what was made with the reference, sees that no process is left, and begins anew."""
        require_same(self.store, self.reference)
        deadline = time.monotonic() + GONE_SECONDS
        while left := self.processes():
            if time.monotonic() > deadline:
                raise Failed("left: " + "; ".join(f"{each.pid} {' '.join(each.command_line())[:150]}" for each in left))
            time.sleep(0.2)
        self.passes += 1

    def finish(self) -> None:
        """Lets the last pass end."""
        while not self.go_on():
            time.sleep(0.5)

    def require_news(self) -> None:
        """Fails where nothing has happened for long."""
        made = sorted(path.name for path in self.store.glob("artifacts/*"))
        lengths = [path.stat().st_size for path in self.store.glob("work/*/*.jsonl")]
        news = f"{self.slurm.ask('squeue', '--noheader', '--format=%i %T %r')}{made}{lengths}"
        if news != self.news:
            self.news, self.still_since = news, time.monotonic()
        elif time.monotonic() - self.still_since > LONGEST_STILL_SECONDS:
            printed = [f"{path}:\n{path.read_text()[-1500:]}" for path in self.store.glob("work/*/console-*.log")]
            asked = [self.slurm.ask("squeue"), self.slurm.ask("sinfo", "--Node", "--long"), self.slurm.log()]
            raise Failed("\n".join(["nothing happens any more", *asked, *printed[-4:]]))


def rounds(chaos: Chaos, kills: int) -> Iterator[str]:
    """A line per disturbance; the last pass is let end."""
    done = 0
    while done < kills:
        if line := chaos.disturb():
            done += 1
            yield f"{done:3}. {line}"
    chaos.finish()


def main() -> int:
    arguments = told(__doc__, 50)
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    print(f"{arguments.kills} disturbances, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="slipway-cluster-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            reference = (arguments.reference or undisturbed(folder / "reference")).absolute()
            with Slurm(folder / "slurm") as slurm:
                randomly = random.Random(arguments.seed)
                chaos = Chaos(slurm, folder, reference, arguments.only, randomly, arguments.longest)
                for line in rounds(chaos, arguments.kills):
                    print(line, flush=True)
        except Failed as failure:
            print(f"FAILED (seed {arguments.seed}): {failure}")
            return 1
    for what, count in sorted(chaos.done.items()):
        print(f"{count:4} {what}")
    print(f"{arguments.kills} disturbances, {chaos.submissions} submissions, {chaos.passes} passes over the recipe,")
    print("the same digests as on one machine without any")
    return 0


if __name__ == "__main__":
    sys.exit(main())
