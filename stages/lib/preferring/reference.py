"""A reference model's log-probabilities of both answers of all pairs, computed once and kept in a file."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Preempted, Problem
from pipeline.stage import Context
from pipeline.store.artifact import MANIFEST, digest_file, files_below, read_manifest
from pipeline.store.durable import replacing, require_room
from stages.lib.models.adapters.folders import adapter_folder
from stages.lib.models.adapters.opening import attached
from stages.lib.models.drawing import require_quiet
from stages.lib.models.loading import DTYPES, load_model, require_vocabulary
from stages.lib.preferring.answers import answer_logprobs
from stages.lib.preferring.pairs import Pairs, collate_pairs
from stages.lib.processes.collectives import any_process, from_all, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.text.batches import padding_of


@dataclass
class ReferencePass:
    """The log-probabilities of both answers of all pairs under one model, computed once and kept in a file.

    They come from the model's folder, never from weights in training, and before the training engine exists: each
    process holds the whole model while it lasts, also where ZeRO-3 will split the one that is trained.
    """

    ctx: Context
    folder: Path
    """The reference model."""
    pairs: Sequence[Pairs]
    precision: str
    tail_weight: float | None = None
    """What tokens beyond the shorter answer's length count: see `answers.tail_weights`."""
    adapter: Path | None = None
    """The folder of an adapter that is on it; None where there is none."""
    rows: list[tuple[int, int]] = field(init=False)
    """(number of the data set, index in it) of every pair."""
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [(number, index) for number, pairs in enumerate(self.pairs) for index in range(len(pairs))]
        how = self.precision if self.tail_weight is None else f"{self.precision} {self.tail_weight!r}"
        digest = from_main(lambda: digest_pairs(self.identity(), how, self.pairs))
        self.file = self.ctx.work / f"reference_logprobs-{digest[:16]}.npy"

    def identity(self) -> str:
        """Changes with the model, and with the adapter on it."""
        return model_identity(self.folder) + (f" {model_identity(self.adapter)}" if self.adapter else "")

    def row(self, index: int) -> dict[str, Any]:
        number, place = self.rows[index]
        return self.pairs[number][place]

    def run(self, tokenizer: PreTrainedTokenizerBase) -> list[NDArray[np.float64]]:
        """N x 2 log-probabilities, chosen and rejected, for each of the `pairs`.

        Raises `Preempted` if asked to stop, and goes on after a restart.
        """
        logprobs_N2 = from_main(self.start)
        batches = self.batches()
        waiting = [batch for batch in batches if np.isneginf(logprobs_N2[batch]).any()]
        if waiting:
            self.ctx.journal.note(
                f"reference log-probabilities of {len(self.rows):,} pairs under {self.folder.name}, each process with the"
                f" whole model: {len(waiting):,} of {len(batches):,} batches to do"
            )
            self.fill(logprobs_N2, waiting, tokenizer)
        require_no_holes(logprobs_N2, self.file)
        return np.split(logprobs_N2, np.cumsum([len(pairs) for pairs in self.pairs])[:-1])

    def start(self) -> NDArray[np.float64]:
        """What an earlier run has computed, -inf where it has not. Writes the file at its full size, before any work."""
        if self.file.exists():
            found: NDArray[np.float64] = np.load(self.file, allow_pickle=False)
            if found.shape == (len(self.rows), 2):
                return found
        empty = np.full((len(self.rows), 2), -np.inf)
        self.save(empty)
        return empty

    def save(self, logprobs_N2: NDArray[np.float64]) -> None:
        require_room(self.ctx.work, logprobs_N2.nbytes + 2**20, "the reference log-probabilities")
        with replacing(self.file) as file:
            np.save(file, logprobs_N2)

    def batches(self) -> list[NDArray[np.int64]]:
        """The pairs of each forward pass, those of like length together, the longest first.

        The same whatever the number of processes, and whatever an earlier run has done: padding shows in the last bits.
        """
        longest_N = np.concatenate([pairs.sequence_lengths.max(axis=1) for pairs in self.pairs])
        order = np.argsort(-longest_N, kind="stable")
        size = self.ctx.resources.micro_batch_size or 8
        return [order[start : start + size] for start in range(0, len(order), size)]

    def fill(
        self, logprobs_N2: NDArray[np.float64], waiting: list[NDArray[np.int64]], tokenizer: PreTrainedTokenizerBase
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
        collate = collate_pairs(padding_of(tokenizer))
        rounds = math.ceil(len(waiting) / world.size)
        for number in range(rounds):
            stop = any_process(self.ctx.stop_requested())
            if stop or (number and number % max(1, rounds // 20) == 0):
                self.exchange(logprobs_N2)
                from_main(lambda: self.save(logprobs_N2))
                self.ctx.journal.write("progress", what="reference log-probabilities", done=number, total=rounds)
            if stop:
                raise Preempted
            mine = number * world.size + world.rank
            if mine < len(waiting):
                indices = waiting[mine]
                batch = {n: t.to(device) for n, t in collate([self.row(index) for index in indices]).items()}
                with torch.no_grad(), rounding:
                    logp_2N = answer_logprobs(model, batch, self.tail_weight)
                logprobs_N2[indices] = logp_2N.double().cpu().numpy().reshape(2, -1).T
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.exchange(logprobs_N2)
        from_main(lambda: self.save(logprobs_N2))

    def exchange(self, logprobs_N2: NDArray[np.float64]) -> None:
        """Brings together what the processes have filled: where only one is no longer at -inf, that one counts."""
        logprobs_N2[:] = np.maximum.reduce(from_all(logprobs_N2))


def require_no_holes(logprobs_N2: NDArray[np.float64], file: Path) -> None:
    """Raises `ArtifactError` if the log-probability of any answer was not computed, or is not finite."""
    holes = np.flatnonzero(~np.isfinite(logprobs_N2).all(axis=1))
    if len(holes):
        raise ArtifactError(
            Problem(
                str(file),
                f"has no reference log-probability for {len(holes):,} of {len(logprobs_N2):,} pairs,"
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


def digest_pairs(model: str, how: str, data: Sequence[Pairs]) -> str:
    """Changes with the model, with how it is asked, and with every token of every pair."""
    digest = hashlib.sha256(f"{model} {how} {[len(pairs) for pairs in data]}".encode())
    for pairs in data:
        for row in pairs:
            for name in ("chosen_ids", "chosen_answer", "rejected_ids", "rejected_answer"):
                digest.update(len(row[name]).to_bytes(8, "little"))
                digest.update(row[name].tobytes())
    return digest.hexdigest()
