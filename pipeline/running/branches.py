"""Walks a plan with several steps at a time: each begins as soon as what it reads is made, and there are GPUs for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR
from pipeline.running.interrupts import Interrupts
from pipeline.running.plan import Action, Plan, Step
from pipeline.running.progress import Progress

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2
NOT_BEGUN = "stopped before {} began; the same command goes on from here"
Start = Callable[[Step, Progress, Mapping[str, str]], int]
"""Runs a step to its end, shown by a progress and with more variables in its environment; returns its exit code."""


class Labelled(Progress):
    """Says what one of several steps says, each line with the step's name before it."""

    def __init__(self, progress: Progress, name: str, lock: threading.Lock) -> None:
        super().__init__(progress.stream)
        self.live = False
        self.name = name
        self.lock = lock

    def line(self, text: str) -> None:
        with self.lock:
            super().line(f"{self.name} | {text.removeprefix('  ')}")


@dataclass
class Devices:
    """The GPUs of this machine, and who has them."""

    free: list[str] = field(default_factory=lambda: gpus_here())

    def __post_init__(self) -> None:
        self.all = list(self.free)

    def take(self, step: Step) -> list[str] | None:
        """The GPUs that the step gets, none for one that needs none; None while there are too few.

        A launcher that finds its GPUs by itself, such as that of deepspeed or of several nodes, gets all of them.
        """
        resources = step.recipe_step.resources
        if resources.uses_cpu or not step.recipe_step.stage.distributed or not self.all:
            return []
        alone = resources.launcher_name not in ("local", "torchrun") or resources.nodes > 1
        count = len(self.all) if alone else min(resources.processes, len(self.all))
        if len(self.free) < count:
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        self.free = [each for each in self.all if each in self.free or each in taken]


def can_begin(step: Step, is_made: Callable[[str], bool]) -> bool:
    """Whether a step can be started now, `is_made` telling of others by name: what another run was making may be there."""
    if step.action is not Action.BLOCKED:
        return True
    waits = step.reason.waits_for
    return step.reason.running_here or (bool(waits) and all(is_made(name) for name in waits))


def what_it_does(step: Step, begins: bool) -> str:
    """What the step does now, and why, as a line says it; `begins`: whether it can."""
    if step.action is not Action.BLOCKED or not begins:
        return f"{step.action}  {step.reason}"
    return f"waits  {step.reason}" if step.reason.running_here else f"{Action.RUN}  another run has made what it reads"


def gpus_here(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The names of the GPUs that may be used: those that CUDA_VISIBLE_DEVICES lists, else the numbers of all."""
    said = os.environ.get(VISIBLE)
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(number) for number, _ in enumerate(folder.glob("*"))]


@dataclass
class Branches:
    """The steps of a plan that have to run, and those that run."""

    plan: Plan
    start: Start
    is_made: Callable[[str], bool]
    """Whether the artifact of the step of this name is there."""
    progress: Progress
    interrupts: Interrupts
    jobs: int
    devices: Devices = field(default_factory=Devices)
    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[Step] = field(default_factory=list)
    running: dict[Future[int], tuple[Step, list[str]]] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    """Of steps that did not end well."""

    def run(self) -> int:
        """Runs all; returns the exit code. After a failure nothing begins any more, and what runs goes on to its end."""
        self.say_actions()
        with ThreadPoolExecutor(self.jobs) as pool:
            while self.goes_on():
                for step, taken in self.ready():
                    shown = Labelled(self.progress, step.name, self.lock)
                    shown.line(what_it_does(step, True))
                    more = {VISIBLE: ",".join(taken)} if taken else {}
                    self.running[pool.submit(self.start, step, shown, more)] = (step, taken)
                self.collect()
        return self.code()

    def say_actions(self) -> None:
        for step in self.plan.chosen:
            if step.action is Action.SKIP:
                self.progress.line(f"{step.name} | skip  {step.reason}")
            else:
                self.waiting.append(step)

    def goes_on(self) -> bool:
        if self.running:
            return True
        return bool(self.waiting) and not self.codes and not self.interrupts.asked

    def ready(self) -> list[tuple[Step, list[str]]]:
        """The steps that can begin now, in order, with the GPUs that each has got; one that never can ends the rest."""
        found: list[tuple[Step, list[str]]] = []
        if self.codes or self.interrupts.asked:
            return found
        unmade = {step.artifact_id for step in self.waiting} | {step.artifact_id for step, _ in self.running.values()}
        for step in list(self.waiting):
            if len(self.running) + len(found) >= self.jobs:
                break
            if unmade & set(step.input_ids.values()):
                continue
            if not can_begin(step, self.is_made):
                self.progress.line(f"{step.name} | {step.action}  {step.reason}")
                self.codes.append(EXIT_USER_ERROR)
                break
            taken = self.devices.take(step)
            if taken is not None:
                self.waiting.remove(step)
                found.append((step, taken))
        return found

    def collect(self) -> None:
        """Waits a moment for a step to end."""
        ended, _ = wait(self.running, POLL_SECONDS, FIRST_COMPLETED)
        for future in ended:
            _, taken = self.running.pop(future)
            self.devices.give_back(taken)
            if error := future.exception():
                self.stop_others()
                raise error
            if (code := future.result()) != EXIT_DONE:
                self.codes.append(code)

    def stop_others(self) -> None:
        """Asks what runs to save and stop, and waits for it: the command is about to end with an error."""
        self.interrupts.asked = True
        wait(self.running)

    def code(self) -> int:
        """That of the first failure; where steps only saved and stopped, 75."""
        failures = [code for code in self.codes if code != EXIT_PREEMPTED]
        if failures or self.codes:
            return (failures or self.codes)[0]
        if self.waiting:
            self.progress.line(NOT_BEGUN.format(self.waiting[0].name))
            return self.interrupts.exit_code
        return EXIT_DONE
