"""Weights & Biases, online and offline.

Offline, the files are written anew from the journal whenever the step goes on: wandb writes them from memory, so a process
that was killed leaves files that lack what was said last. Online, the server says what it has, and is told the rest.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.store.artifact import Manifest
from pipeline.store.durable import make_folder
from trackers.base import Begun, Options, Run, StartAgain, Tracker, metrics_of, status_of, unreachable

ONLINE: Literal["online"] = "online"
OFFLINE: Literal["offline"] = "offline"
INIT_SECONDS = 60.0
FLUSH_SECONDS = 2.0
SENT = ("*.synced", "*.syncstate")
"""What `wandb sync` leaves in a folder that it has sent, or sends."""
MODE = "WANDB_MODE"
REASON = "SLIPWAY_WANDB_OFFLINE"
"""The variable in which a process that could not begin online tells the next one why."""


class WandbOptions(Options):
    """`tracking: {wandb: {project: mine}}`. The key comes from `wandb login` or WANDB_API_KEY, never from a recipe."""

    project: str | None = Field(default=None, min_length=1, max_length=128)
    """The project; WANDB_PROJECT where it is not given, `slipway` where neither is."""
    entity: str | None = None
    """The team or user that the project belongs to; WANDB_ENTITY where it is not given."""
    mode: Literal["online", "offline"] | None = None
    """online: sent while the step runs. offline: kept in files, which `wandb sync` sends. WANDB_MODE where it is not given; online where neither is. WANDB_MODE=disabled switches it off whatever stands here."""
    tags: list[str] = []
    """Of each run."""


class Wandb(Tracker):
    """One run per step, in the group that the recipe is; its job type is the stage's kind."""

    name: ClassVar[str] = "wandb"
    library: ClassVar[str] = "wandb"
    options = WandbOptions
    given: WandbOptions

    @classmethod
    def asked_by(cls, environment: Mapping[str, str]) -> bool | None:
        mode = environment.get(MODE, "").lower()
        if mode == "disabled" or environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
            return False
        return True if mode in (ONLINE, OFFLINE) or environment.get("WANDB_PROJECT") else None

    def begin(self, run: Run) -> Begun:
        import wandb

        make_folder(run.folder)
        own_id = run.id or secrets.token_hex(4)
        reason = self.why_offline(wandb)
        was_sent = bool(run.kept_in) and is_sent(run.folder / "wandb" / run.kept_in)
        drop_unsent(run.folder)
        try:
            self.run = wandb.init(
                project=self.given.project or os.environ.get("WANDB_PROJECT") or "slipway",
                entity=self.given.entity,
                tags=self.given.tags or None,
                group=run.group,
                job_type=run.job.kind,
                name=run.name,
                id=own_id,
                resume="allow",
                dir=str(run.folder),
                mode=ONLINE if reason is None else OFFLINE,
                config=run.config(),
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, disable_code=True, x_save_requirements=False,
                    init_timeout=INIT_SECONDS, x_transaction_log_flush_interval=FLUSH_SECONDS,
                ),
            )  # fmt: skip
        except Exception as error:
            if reason is not None:
                raise
            # After a failure wandb cannot begin offline in the same process (its issue 9865).
            why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise StartAgain({MODE: OFFLINE, REASON: why}) from error
        self.sentences: list[str] = []
        if reason is None:
            return Begun(own_id, self.run.starting_step - 1, sends=True)
        note = f"stays offline{reason and f' ({reason})'}; `wandb sync {run.folder}/wandb/offline-run-*` sends it"
        # What a server was told before can be neither asked for nor taken back offline.
        after = run.told_step if was_sent else run.sent_step
        return Begun(own_id, after, kept_in=Path(self.run.dir).parent.name, note=note)

    def why_offline(self, wandb: Any) -> str | None:
        """Why the run is kept in files: empty where that was asked for, None where it is sent."""
        mode = os.environ.get(MODE, "").lower()
        if OFFLINE in (mode, self.given.mode or mode):
            return os.environ.get(REASON, "")
        return unreachable(wandb.setup().settings.base_url) or None

    def numbers(self, step: int, values: Mapping[str, float], time: float) -> None:
        # The time of the event: what is told again after a restart keeps it.
        self.run.log({**values, "_timestamp": time}, step=step)

    def progress(self, what: str, done: float, total: float, time: float) -> None:
        self.run.summary[f"progress/{what}"] = done / total if total else 0.0

    def sentence(self, step: int, text: str, time: float) -> None:
        self.sentences.append(text)
        self.run.notes = "\n".join(self.sentences)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]], time: float) -> None:
        import wandb

        heads = list(dict.fromkeys(key for row in rows for key in row))
        values = [[row.get(head) for head in heads] for row in rows]
        self.run.log({name: wandb.Table(columns=heads, data=values, allow_mixed_types=True)}, step=step)

    def flush(self) -> None:
        """It is done by wandb's own process, every `FLUSH_SECONDS`."""

    def made(self, manifest: Manifest, folder: Path) -> None:
        import wandb

        self.run.summary.update(metrics_of(manifest))
        lineage = {"artifact_id": manifest.artifact_id, "inputs": manifest.input_ids, "metrics": manifest.metrics}
        artifact = wandb.Artifact(f"{manifest.recipe}-{manifest.step}", str(manifest.artifact_kind), metadata=lineage)
        artifact.add_reference(folder.absolute().as_uri(), checksum=False)
        self.run.log_artifact(artifact, aliases=["latest", manifest.artifact_id[:12]])

    def end(self, exit_code: int | None) -> None:
        self.run.summary["ended"] = status_of(exit_code)
        self.run.finish(exit_code=1 if exit_code is None else exit_code)


def is_sent(folder: Path) -> bool:
    """Whether the files of an offline run have been sent, or are being sent."""
    return any(path for pattern in SENT for path in folder.glob(pattern))


def drop_unsent(folder: Path) -> None:
    """Removes the files of earlier offline runs of the step that nobody has sent: they are written anew."""
    for each in folder.glob("wandb/offline-run-*"):
        if not is_sent(each):
            shutil.rmtree(each)
