"""TensorBoard: event files below the store, written anew from the journal whenever the step goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pipeline.store.artifact import Manifest
from pipeline.store.durable import make_folder
from trackers.base import Begun, Options, Run, Tracker, as_text, metrics_of, status_of


class TensorBoardOptions(Options):
    """`tracking: {tensorboard: {}}`. Look at it with `tensorboard --logdir STORE/tracking/tensorboard`."""


class TensorBoard(Tracker):
    """One folder per step, as TensorBoard's list of runs shows them: `<recipe>/<step>-<first 8 of the artifact's id>`."""

    name: ClassVar[str] = "tensorboard"
    library: ClassVar[str] = "tensorboardX"
    options = TensorBoardOptions

    def begin(self, run: Run) -> Begun:
        from tensorboardX import SummaryWriter

        make_folder(run.folder)
        for file in run.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = SummaryWriter(str(run.folder))
        self.step = 0
        self.writer.add_text("run", fenced(run.config()), 0)
        return Begun(run.folder.name)

    def numbers(self, step: int, values: Mapping[str, float], time: float) -> None:
        self.step = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=time)

    def progress(self, what: str, done: float, total: float, time: float) -> None:
        self.writer.add_scalar(f"progress/{what}", done / total if total else 0.0, int(done), walltime=time)

    def sentence(self, step: int, text: str, time: float) -> None:
        self.writer.add_text("notes", text, step, walltime=time)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]], time: float) -> None:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        lines = [heads, ["---"] * len(heads), *([cell(row.get(head, "")) for head in heads] for row in rows)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step, walltime=time)

    def flush(self) -> None:
        self.writer.flush()

    def made(self, manifest: Manifest, folder: Any) -> None:
        for name, value in metrics_of(manifest).items():
            self.writer.add_scalar(name, value, self.step)
        self.writer.add_text("artifact", fenced({"folder": str(folder), "inputs": manifest.input_ids}), self.step)

    def end(self, exit_code: int | None) -> None:
        self.writer.add_text("ended", status_of(exit_code), self.step)
        self.writer.close()


def fenced(value: Mapping[str, Any]) -> str:
    """The value as JSON that TensorBoard shows as it stands."""
    return "".join(f"    {line}\n" for line in as_text(value, indent=2).splitlines())


def cell(value: Any) -> str:
    """A value in one cell of a table in Markdown."""
    return as_text(value).replace("|", "\\|").replace("\n", "<br>")
