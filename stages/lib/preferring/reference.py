"""A reference model's log-probabilities of all answers, computed once and kept in a file."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Preempted, Problem
from pipeline.stage import Context
from pipeline.store.artifact import MANIFEST, digest_file, files_below, read_manifest
from pipeline.store.durable import replacing, require_room
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.adapters.folders import adapter_folder
from stages.lib.models.adapters.opening import attached
from stages.lib.models.drawing import require_quiet
from stages.lib.models.loading import DTYPES, load_model, require_vocabulary
from stages.lib.preferring.answers import AnsweredSequence, answer_logprobs, batch_of_answers
from stages.lib.processes.collectives import any_process, from_all, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.text.batches import padding_of
from stages.lib.text.tokenizers import require_same_tokenizer

PUBLISHED_LOGPROBS_BYTES = 64_000_000
"""The reference's log-probabilities are published with the model if they are no larger."""


class AnsweredRows(Protocol):
    """N rows of S sequences each, a prompt and its answer: S is 2 of pairs, and 1 of single answers."""

    def __len__(self) -> int: ...

    def sequences(self, index: int) -> Sequence[AnsweredSequence]:
        """Those of a row."""

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """N x S: tokens of each sequence."""


@dataclass
class ReferencePass:
    """The log-probabilities of all answers under one model, computed once and kept in a file.

    They come from the model's folder, never from weights in training, and before the training engine exists: each
    process holds the whole model while it lasts, also where ZeRO-3 will split the one that is trained.
    """

    ctx: Context
    folder: Path
    """The reference model."""
    data: Sequence[AnsweredRows]
    """All of them with as many sequences a row."""
    precision: str
    tail_weight: float | None = None
    """What tokens beyond the shorter answer's length count: see `answers.tail_weights`."""
    what: str = "pairs"
    """What a row is called in messages."""
    adapter: Path | None = None
    """The folder of an adapter that is on it; None where there is none."""
    rows: list[tuple[int, int]] = field(init=False)
    """(number of the data set, index in it) of every row."""
    width: int = field(init=False)
    """S, the sequences of a row."""
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [(number, index) for number, rows in enumerate(self.data) for index in range(len(rows))]
        self.width = self.data[0].sequence_lengths.shape[1]
        how = self.precision if self.tail_weight is None else f"{self.precision} {self.tail_weight!r}"
        digest = from_main(lambda: digest_rows(self.identity(), how, self.data))
        self.file = self.ctx.work / f"reference_logprobs-{digest[:16]}.npy"

    def identity(self) -> str:
        """Changes with the model, and with the adapter on it."""
        return identity_of(self.folder, self.adapter)

    def collate(self, indices: Sequence[int], padding_id: int) -> Tensors:
        """The batch of these rows: S x their number of sequences, the first ones of all rows first."""
        rows = [self.data[number].sequences(place) for number, place in (self.rows[index] for index in indices)]
        return batch_of_answers([row[side] for side in range(self.width) for row in rows], padding_id)

    def run(self, tokenizer: PreTrainedTokenizerBase) -> list[NDArray[np.float64]]:
        """N x S log-probabilities, of pairs chosen and rejected, for each of the `data`.

        Raises `Preempted` if asked to stop, and goes on after a restart.
        """
        logprobs_NS = from_main(self.start)
        batches = self.batches()
        waiting = [batch for batch in batches if np.isneginf(logprobs_NS[batch]).any()]
        if waiting:
            self.ctx.journal.note(
                f"reference log-probabilities of {len(self.rows):,} {self.what} under {self.folder.name}, each process with the"
                f" whole model: {len(waiting):,} of {len(batches):,} batches to do"
            )
            self.fill(logprobs_NS, waiting, tokenizer)
        require_no_holes(logprobs_NS, self.file, self.what)
        return np.split(logprobs_NS, np.cumsum([len(rows) for rows in self.data])[:-1])

    def start(self) -> NDArray[np.float64]:
        """What an earlier run has computed, -inf where it has not. Writes the file at its full size, before any work."""
        if self.file.exists():
            found: NDArray[np.float64] = np.load(self.file, allow_pickle=False)
            if found.shape == (len(self.rows), self.width):
                return found
        empty = np.full((len(self.rows), self.width), -np.inf)
        self.save(empty)
        return empty

    def save(self, logprobs_NS: NDArray[np.float64]) -> None:
        require_room(self.ctx.work, logprobs_NS.nbytes + 2**20, "the reference log-probabilities")
        with replacing(self.file) as file:
            np.save(file, logprobs_NS)

    def batches(self) -> list[NDArray[np.int64]]:
        """The rows of each forward pass, those of like length together, the longest first.

        The same whatever the number of processes, and whatever an earlier run has done: padding shows in the last bits.
        """
        longest_N = np.concatenate([rows.sequence_lengths.max(axis=1) for rows in self.data])
        order = np.argsort(-longest_N, kind="stable")
        size = self.ctx.resources.micro_batch_size or 8
        return [order[start : start + size] for start in range(0, len(order), size)]

    def fill(
        self, logprobs_NS: NDArray[np.float64], waiting: list[NDArray[np.int64]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Computes the waiting batches, each process its share, in place; saves at every twentieth part of the way."""
        world = self.ctx.world
        device = join_processes(self.ctx)
        model: Any = load_model(AutoModelForCausalLM, self.folder)
        require_vocabulary(model, tokenizer)
        if self.adapter is not None:
            model = attached(model, adapter_folder(self.adapter))
        # As the training engine will hold the policy: DeepSpeed rounds the weights, else only the arithmetic is rounded.
        rounded = self.ctx.resources.deepspeed is not None
        model.to(device, DTYPES[self.precision] if rounded else torch.float32).eval()
        require_quiet(model, str(self.folder))
        rounding = torch.autocast(device.type, DTYPES[self.precision], enabled=not rounded and self.precision != "fp32")
        padding_id = padding_of(tokenizer)
        rounds = math.ceil(len(waiting) / world.size)
        for number in range(rounds):
            stop = any_process(self.ctx.stop_requested())
            if stop or (number and number % max(1, rounds // 20) == 0):
                self.exchange(logprobs_NS)
                from_main(lambda: self.save(logprobs_NS))
                self.ctx.journal.write("progress", what="reference log-probabilities", done=number, total=rounds)
            if stop:
                raise Preempted
            mine = number * world.size + world.rank
            if mine < len(waiting):
                indices = waiting[mine]
                batch = {n: t.to(device) for n, t in self.collate(indices.tolist(), padding_id).items()}
                with torch.no_grad(), rounding:
                    logp_SN = answer_logprobs(model, batch, self.tail_weight)
                logprobs_NS[indices] = logp_SN.double().cpu().numpy().reshape(self.width, -1).T
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.exchange(logprobs_NS)
        from_main(lambda: self.save(logprobs_NS))

    def exchange(self, logprobs_NS: NDArray[np.float64]) -> None:
        """Brings together what the processes have filled: where only one is no longer at -inf, that one counts."""
        logprobs_NS[:] = np.maximum.reduce(from_all(logprobs_NS))


def require_no_holes(logprobs_NS: NDArray[np.float64], file: Path, what: str) -> None:
    """Raises `ArtifactError` if the log-probability of any answer was not computed, or is not finite."""
    holes = np.flatnonzero(~np.isfinite(logprobs_NS).all(axis=1))
    if len(holes):
        raise ArtifactError(
            Problem(
                str(file),
                f"has no reference log-probability for {len(holes):,} of {len(logprobs_NS):,} {what},"
                f" the first of them {holes[:5].tolist()}",
                "The reference model gives an answer the probability 0, or values that are not finite: check its weights.",
            )
        )


def model_identity(folder: Path) -> str:
    """The artifact's id; of a model from elsewhere a digest of its files."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder).artifact_id
    digest = hashlib.sha256()
    for path in files_below(folder):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.relative_to(folder)} {digest_file(path)}\n".encode())
    return digest.hexdigest()


def identity_of(folder: Path, adapter: Path | None) -> str:
    """That of a model, and of the adapter on it where there is one."""
    return model_identity(folder) + (f" {model_identity(adapter)}" if adapter else "")


def digest_rows(model: str, how: str, data: Sequence[AnsweredRows]) -> str:
    """Changes with the model, with how it is asked, and with every token of every row."""
    digest = hashlib.sha256(f"{model} {how} {[len(rows) for rows in data]}".encode())
    for rows in data:
        for index in range(len(rows)):
            for sequence in rows.sequences(index):
                for part in sequence:
                    digest.update(len(part).to_bytes(8, "little"))
                    digest.update(part.tobytes())
    return digest.hexdigest()


class ReferencePlace(NamedTuple):
    """What a policy is compared with."""

    folder: Path
    """Of the model."""
    adapter: Path | None
    """The folder of an adapter that is on it; None where there is none."""


def open_reference(ctx: Context, home: Path) -> ReferencePlace:
    """The reference: what training starts from, with the adapter that is trained further as it was, unless an input names
    another model. `home`: the folder of the policy's tokenizer.

    Raises `ArtifactError` if the reference has another tokenizer.
    """
    start = ctx.inputs["model"]
    folder, adapter = ctx.inputs.get("reference", start), ctx.inputs.get("adapter")
    if folder != start:
        require_same_tokenizer(home, folder, "inputs.reference")
    if adapter is None:
        return ReferencePlace(folder, None)
    as_it_was = "reference" not in ctx.inputs
    which = "the model with the adapter as it was" if as_it_was else "the input reference, without the adapter"
    ctx.journal.note(f"the reference is {which}")
    return ReferencePlace(folder, adapter if as_it_was else None)


def publish_logprobs(ctx: Context, **logprobs: NDArray[np.float64]) -> None:
    """Puts the reference's log-probabilities beside the model, under these names, unless they are large."""
    if sum(each.nbytes for each in logprobs.values()) <= PUBLISHED_LOGPROBS_BYTES:
        from_main(lambda: np.savez(ctx.out / "reference_logprobs.npz", **logprobs))
