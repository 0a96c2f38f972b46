"""Several completions of every prompt of a data set, scored, a chunk of prompts at a time: what was stopped goes on at the next.

Each process holds the whole policy and the whole reward model. What stands in a chunk, and in a batch of it, is a function of
the prompts and of the batch sizes, and every random number is one of seed, prompt and number of the completion. So one process
and several write the same, to the byte; another batch size may change the last bits of probabilities and scores.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import Preempted
from pipeline.stage import Context
from pipeline.store.artifact import canonical_json, digest_bytes
from pipeline.store.durable import make_folder, read_json, write_json
from stages.lib.generating.replies import REPLACEMENT
from stages.lib.generating.sampling import Sampled, sample, uniforms_for
from stages.lib.on_policy.ranking import BROKEN, CUT_OFF, REPEATED, SPECIAL, TOO_SHORT, Candidate
from stages.lib.on_policy.samples import Completion, Sample
from stages.lib.on_policy.scoring import Scorer
from stages.lib.processes.collectives import any_process, barrier, from_main
from stages.lib.processes.contained import Abandoned
from stages.lib.text.chat_fitting import fit_answers
from stages.lib.text.prompts import PromptRow
from stages.lib.text.tokenizers import decode_ids
from stages.lib.training.scheduling import seed_of

DEFAULT_BATCH_SIZE = 16


class Worth(NamedTuple):
    """What a completion is worth: each reward, their weighted sum, and the rewards that had trouble with it."""

    rewards: tuple[float, ...]
    score: float
    troubles: dict[str, str]


@dataclass(frozen=True)
class DrawnCandidates:
    """Completions that are drawn and scored, and lie in files."""

    chunks: Sequence[Sequence[PromptRow]]
    paths: Sequence[Path]

    def read(self) -> dict[int, list[Candidate]]:
        """Number of the prompt's row -> its completions in the order of their numbers."""
        found: dict[int, list[Candidate]] = {}
        for chunk, path in zip(self.chunks, self.paths, strict=True):
            for row, written in zip(chunk, read_json(path), strict=True):
                found[row.index] = [Candidate(**{**each, "rewards": tuple(each["rewards"])}) for each in written]
        return found


@dataclass(frozen=True)
class CandidateWriter:
    """Draws completions of prompts and scores them."""

    ctx: Context
    model: Any
    """The policy, ready for inference."""
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    scorer: Scorer
    completions_per_prompt: int
    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float

    @property
    def batch_size(self) -> int:
        resources = self.ctx.resources
        return resources.generation_batch_size or resources.micro_batch_size or DEFAULT_BATCH_SIZE

    def chunks(self, prompts: Sequence[PromptRow]) -> list[list[PromptRow]]:
        """The prompts in chunks of about a batch of completions: those of like length together, the longest first."""
        order = sorted(prompts, key=lambda row: -len(row.ids))
        size = max(1, self.batch_size // self.completions_per_prompt)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def draw(self, split: str, prompts: Sequence[PromptRow], seed: int) -> DrawnCandidates:
        """Draws and scores the completions of all prompts: where they lie.

        Raises `Preempted` if asked to stop: the chunks that are done lie in the work folder.
        """
        folder = self.ctx.work / "candidates"
        chunks = self.chunks(prompts)
        paths = [folder / f"{split}-{chunk_digest(chunk, seed)}.json" for chunk in chunks]
        from_main(lambda: make_folder(folder))
        waiting = from_main(lambda: [number for number, path in enumerate(paths) if not path.exists()])
        world = self.ctx.world
        rounds = math.ceil(len(waiting) / world.size)
        for done in range(rounds):
            if any_process(self.ctx.stop_requested()):
                written = len(chunks) - len(waiting) + min(done * world.size, len(waiting))
                raise Preempted(f"after {written:,} of {len(chunks):,} chunks of {split} prompts")
            mine = done * world.size + world.rank
            if mine < len(waiting):
                number = waiting[mine]
                # Where it is abandoned, the next round, or what is left in the end, tells that the step is to stop.
                with contextlib.suppress(Abandoned):
                    found = self.complete(chunks[number], seed)
                    write_json(paths[number], [[asdict(each) for each in of_prompt] for of_prompt in found])
            self.ctx.journal.write("progress", what=f"chunks of {split} completions", done=done + 1, total=rounds)
        barrier()
        if left := from_main(lambda: sum(not path.exists() for path in paths)):
            raise Preempted(f"after {len(chunks) - left:,} of {len(chunks):,} chunks of {split} prompts")
        return DrawnCandidates(chunks, paths)

    def complete(self, rows: Sequence[PromptRow], seed: int) -> list[list[Candidate]]:
        """The completions of each prompt, scored."""
        count = self.completions_per_prompt
        asked = [(row, number) for row in rows for number in range(count)]
        sampled: list[Sampled] = []
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            numbers = [uniforms_for(seed_of(seed, row.index), place, self.max_new_tokens) for row, place in batch]
            sampled += sample(
                self.model,
                [row.ids for row, _ in batch],
                np.stack(numbers),
                stop_ids=self.stop_ids,
                temperature=self.temperature,
                top_p=self.top_p,
            )
        texts = [self.text_of(each) for each in sampled]
        scored = self.score([row for row, _ in asked], sampled, texts)
        found = []
        for place, row in enumerate(rows):
            mine = slice(place * count, (place + 1) * count)
            found.append(self.judged(row, sampled[mine], texts[mine], scored[mine]))
        return found

    def text_of(self, sampled: Sampled) -> str:
        """What the policy wrote, without the token that ends it; other special tokens as they are spelled, as rewards see them."""
        return decode_ids(self.tokenizer, said_ids(sampled))

    def score(self, rows: Sequence[PromptRow], sampled: Sequence[Sampled], texts: Sequence[str]) -> list[Worth]:
        """What each completion is worth. What a prompt has twice is scored once, so that it scores the same."""
        keys = [
            (row.index, text, each.ended, len(each.ids)) for row, text, each in zip(rows, texts, sampled, strict=True)
        ]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        samples = [
            Sample(
                row.index, row.prompt, Completion(texts[place], len(sampled[place].ids), sampled[place].ended), row.row
            )
            for place, row in ((place, rows[place]) for place in places)
        ]
        values, troubles = self.scorer.score(samples)
        totals = self.scorer.total(values)
        by_place = {
            place: Worth(tuple(map(float, rewards)), float(total), {name: each.word for name, each in wrong.items()})
            for place, rewards, total, wrong in zip(places, values, totals, troubles, strict=True)
        }
        return [by_place[first[key]] for key in keys]

    def judged(
        self,
        row: PromptRow,
        sampled: Sequence[Sampled],
        texts: Sequence[str],
        scored: Sequence[Worth],
    ) -> list[Candidate]:
        """The completions of one prompt, with what keeps each from becoming training data."""
        found: list[Candidate] = []
        seen: set[tuple[int, ...]] = set()
        for each, text, worth in zip(sampled, texts, scored, strict=True):
            unusable, retokenized = self.fault_of(each, text), False
            if not unusable:
                unusable, ids = self.as_message(row, text)
                if not unusable and ids in seen:
                    unusable = REPEATED
                elif not unusable:
                    drawn = (*row.ids, *each.ids.tolist())
                    retokenized = ids[: len(drawn)] != drawn
                    seen.add(ids)
            found.append(Candidate(text, len(each.ids), each.ended, *worth[:2], unusable, retokenized, worth.troubles))
        return found

    def fault_of(self, sampled: Sampled, text: str) -> str:
        """Why the completion is of no use, whatever the others say; empty if it is."""
        if not sampled.ended:
            return CUT_OFF
        if len(sampled.ids) < self.min_new_tokens or not text.strip():
            return TOO_SHORT
        if REPLACEMENT in text:
            return BROKEN
        return SPECIAL if set(said_ids(sampled)) & set(self.tokenizer.all_special_ids) else ""

    def as_message(self, row: PromptRow, text: str) -> tuple[str, tuple[int, ...]]:
        """Why the chat template cannot write the answer, if so; and the tokens of the chat that ends with it.

        Many a template drops whitespace around an answer: two that differ in nothing else are the same tokens.
        """
        assert not isinstance(row.prompt, str), "the stage asks conversations"
        fitted = fit_answers(self.tokenizer, row.prompt, [[answer_message(text)]], 2**31)
        if not fitted.answers:
            return fitted.reason, ()
        return "", tuple(fitted.answers[0].input_ids)


def answer_message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def said_ids(sampled: Sampled) -> list[int]:
    """Its ids without the one that ends it."""
    return [int(token) for token in (sampled.ids[:-1] if sampled.ended else sampled.ids)]


def chunk_digest(chunk: Sequence[PromptRow], seed: int) -> str:
    """Changes with which prompts are in the chunk, in their order, and with the seed."""
    return digest_bytes(canonical_json([seed, [[row.index, row.ids] for row in chunk]]))[:16]
