"""Kills runs of the tiny recipe at random moments, and starts the same command again, until it has ended.

    python -m tests.e2e.chaos --kills 60 --seed 1
    python -m tests.e2e.chaos --kills 20 --only base --reference STORE

prints a line per kill: what was done to whom in which step, how `slipway run` ended, and after how many seconds none of its
processes was left. Fails if that takes more than ten seconds, if a run must be mended by hand, or if an artifact differs
from that of a run without kills. Steps of two processes run under torchrun in every other start, and under the deepspeed
launcher in the rest.
"""

from __future__ import annotations

import argparse
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

from launch import LAUNCHERS
from pipeline.processes import Process, carrying, descendants
from pipeline.recipe.reader import load_recipe
from pipeline.running.marks import read_marks
from pipeline.store.artifact import read_manifest
from stages import STAGES
from tests.e2e.driving import ROOT, TINY, command, store_without

GONE_SECONDS = 10.0
LONGEST_RUN_SECONDS = 1800.0
STOPPED_TIMEOUT_SECONDS = 3
STEPS = tuple(step.name for step in load_recipe(TINY, STAGES, LAUNCHERS).steps)
TWO_PROCESSES = ("base", "chat", "aligned", "ppo")
ACTIONS = ("kill a rank", "kill a launcher", "kill slipway run", "Ctrl-C twice", "stop a rank", "stop a rank, Ctrl-C")
MARK = "SLIPWAY_CHAOS"


class Failed(Exception):
    """Something that must not be."""


@dataclass
class Chaos:
    """A store that is made by runs which are killed, over and over."""

    folder: Path
    reference: Path
    """A store in which the recipe has run undisturbed."""
    only: str | None
    """The step to attack; None: all of the recipe."""
    random: random.Random
    longest_seconds: float
    passes: int = 0
    starts: int = 0
    slowest: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def store(self) -> Path:
        return self.folder / f"store-{self.passes}"

    def prepare(self) -> None:
        """Begins a pass: with an empty store, or with one in which only the attacked step is missing."""
        if self.only and not self.store.exists():
            store_without(self.reference, self.only, self.store)

    def start(self, *more: str) -> subprocess.Popen[str]:
        launcher = ("torchrun", "deepspeed")[self.starts % 2]
        self.starts += 1
        choices = [f"{step}.resources.launcher={launcher}" for step in TWO_PROCESSES]
        choices += [f"{step}.resources.stopped_timeout_seconds={STOPPED_TIMEOUT_SECONDS}" for step in STEPS]
        sets = [word for choice in (*choices, *more) for word in ("--set", choice)]
        self.prepare()
        only = ("--only", self.only) if self.only else ()
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                command("run", TINY, *only, "--store", self.store, *sets),
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, MARK: str(self.store)}, start_new_session=True,
            )  # fmt: skip

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def disturb(self) -> str | None:
        """Runs the command, does something to it at a random moment, and says what; None if it ended before."""
        action = self.random.choice(ACTIONS)
        process = self.start()
        seconds = None
        while seconds is None:
            try:
                process.wait(self.random.uniform(0.2, self.longest_seconds))
            except subprocess.TimeoutExpired:
                pass
            else:
                self.ended_by_itself(process)
                return None
            where = self.step()
            done = self.act(action, process)
            seconds = self.wait_until_gone(process, where, done)
        code = process.wait()
        self.check_code(code, done)
        return f"{where}: {done}; exit code {code}, nothing left after {seconds:.1f} s"

    def act(self, action: str, process: subprocess.Popen[str]) -> str:
        """Does it, and says what was done. Where no such process is there yet, `slipway run` itself is killed."""
        ranks, launchers = self.ranks(), self.launchers(process)
        if "rank" in action and ranks:
            rank, target = self.random.choice(sorted(ranks.items()))
            number = signal.SIGKILL if action == "kill a rank" else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):
                os.kill(target.pid, number)
            if action.endswith("Ctrl-C"):
                process.send_signal(signal.SIGINT)
            return f"{number.name} to rank {rank} of {len(ranks)}{', then Ctrl-C' * action.endswith('Ctrl-C')}"
        if action == "kill a launcher" and launchers:
            target = self.random.choice(launchers)
            what = title(target)
            with contextlib.suppress(ProcessLookupError):
                os.kill(target.pid, signal.SIGKILL)
            return f"SIGKILL to {what}"
        if action == "Ctrl-C twice":
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.random.uniform(0.0, 2.0))
            process.send_signal(signal.SIGINT)
            return action
        process.kill()
        return "SIGKILL to slipway run"

    def ranks(self) -> dict[int, Process]:
        """The ranks that live, by their number."""
        found = {}
        for work in (self.store / "work").glob("*"):
            for rank, mark in read_marks(work, 2).items():
                if mark.ended is None and (process := mark.process.process()):
                    found[rank] = process
        return found

    def launchers(self, process: subprocess.Popen[str]) -> list[Process]:
        """What stands between `slipway run` and the ranks."""
        ranks = {rank.pid for rank in self.ranks().values()}
        ranks |= {
            each.pid for rank in list(ranks) for each in descendants(rank)
        }  # what a rank asks of others, as uname
        below = [each for each in descendants(process.pid) if each.pid not in ranks]
        ours = [each for each in below if str(self.store) in " ".join(each.command_line())]
        # What a launcher forks has its command line until it has one of its own, and may outlive whoever forked it: the
        # launcher is the oldest of its name.
        oldest: dict[str, Process] = {}
        for each in sorted(ours, key=lambda process: (process.started, process.pid)):
            oldest.setdefault(title(each), each)
        return list(oldest.values())

    def step(self) -> str:
        """The step that runs, as the output names it last."""
        heads = [line for line in self.output().splitlines() if line.startswith("[")]
        return heads[-1].split()[1] if heads else "planning"

    def wait_until_gone(self, process: subprocess.Popen[str], where: str, done: str) -> float | None:
        """The seconds until no process of the run was left; None where the step had been made, and the run went on.

        After a Ctrl-C it does not go on, but the head of the step that it does not begin is printed.
        """
        started = time.monotonic()
        while left := self.left(process):
            if self.step() != where and "Ctrl-C" not in done:
                return None
            if time.monotonic() - started > GONE_SECONDS:
                lines = [f"{each.pid} {each.state} {' '.join(each.command_line())[:150]}" for each in left]
                raise Failed(
                    f"left {GONE_SECONDS:.0f} s after {done}:\n" + "\n".join(lines) + f"\n{self.output()[-1500:]}"
                )
            time.sleep(0.05)
        seconds = time.monotonic() - started
        self.slowest = max(self.slowest, seconds)
        return seconds

    def left(self, process: subprocess.Popen[str]) -> list[Process]:
        process.poll()
        return carrying(f"{MARK}={self.store}")

    def check_code(self, code: int, done: str) -> None:
        """75 only on request, 2 never, and no traceback of ours."""
        self.codes[f"{done.split(' of ')[0]} -> {code}"] += 1
        allowed = {0, 1, -signal.SIGKILL} | ({75} if "Ctrl-C" in done else set())
        if "Ctrl-C" in done:
            allowed |= {130, -signal.SIGINT}  # before its first step, when there is nothing to save
        if code not in allowed:
            raise Failed(f"exit code {code} after {done}:\n{self.output()[-3000:]}")

    def ended_by_itself(self, process: subprocess.Popen[str]) -> None:
        """Compares what an undisturbed end has made with the reference, and begins anew."""
        if process.returncode != 0:
            raise Failed(f"exit code {process.returncode} without a kill:\n{self.output()[-4000:]}")
        require_same(self.store, self.reference)
        self.passes += 1

    def finish(self) -> None:
        """Lets the last pass end."""
        process = self.start()
        process.wait(LONGEST_RUN_SECONDS)
        self.ended_by_itself(process)


def title(process: Process) -> str:
    words = process.command_line()
    for word, name in (
        ("keeper.py", "the keeper"),
        ("deepspeed.launcher.launch", "the inner deepspeed launcher"),
        ("deepspeed", "the deepspeed launcher"),
        ("torchrun", "torchrun"),
    ):
        if any(argument.endswith(word) for argument in words[:6]):
            return name
    return "a process that starts"


def digests(store: Path) -> dict[str, dict[str, str]]:
    """Artifact -> file -> digest."""
    manifests = [read_manifest(folder) for folder in (store / "artifacts").iterdir()]
    return {each.artifact_id: {name: entry.sha256 for name, entry in each.files.items()} for each in manifests}


def require_same(store: Path, reference: Path) -> None:
    """Raises `Failed` where an artifact of the store is not, byte for byte, that of the reference."""
    expected = digests(reference)
    for artifact_id, files in digests(store).items():
        known = expected.get(artifact_id, {})
        if differing := sorted(name for name in files.keys() | known.keys() if known.get(name) != files.get(name)):
            raise Failed(f"artifact {artifact_id[:12]} differs from that of the undisturbed run in {differing}")


def undisturbed(store: Path) -> Path:
    """The store, after the recipe has run in it without kills."""
    ended = subprocess.run(command("run", TINY, "--store", store), cwd=ROOT, capture_output=True, text=True)
    if ended.returncode != 0:
        raise Failed(f"the run without kills failed:\n{ended.stdout[-4000:]}{ended.stderr[-2000:]}")
    return store


def rounds(chaos: Chaos, kills: int) -> Iterator[str]:
    """A line per kill; the last pass is let end."""
    done = 0
    while done < kills:
        if line := chaos.disturb():
            done += 1
            yield f"{done:3}. {line}"
    chaos.finish()


def told(description: str | None, kills: int) -> argparse.Namespace:
    """The arguments, of which `kills` is how many there are unless it is said."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", help="attack this step alone, such as base")
    parser.add_argument("--longest", type=float, default=25.0, help="seconds from a start to its kill, at most")
    parser.add_argument("--reference", type=Path, help="a store in which the recipe has run undisturbed")
    return parser.parse_args()


def main() -> int:
    arguments = told(__doc__, 60)
    print(f"{arguments.kills} kills, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="slipway-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            reference = (arguments.reference or undisturbed(folder / "reference")).absolute()
            chaos = Chaos(folder, reference, arguments.only, random.Random(arguments.seed), arguments.longest)
            for line in rounds(chaos, arguments.kills):
                print(line, flush=True)
        except Failed as failure:
            print(f"FAILED (seed {arguments.seed}): {failure}")
            return 1
    for what, count in sorted(chaos.codes.items()):
        print(f"{count:4} {what}")
    print(f"{arguments.kills} kills, {chaos.passes} passes over the recipe, the same digests as without kills;")
    print(f"nothing was left after {chaos.slowest:.1f} s at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
