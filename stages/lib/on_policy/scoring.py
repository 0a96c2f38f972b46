"""What completions are worth: programmatic rewards, and the score of a reward model that reads them as text.

The reward model may have another tokenizer and another chat template than the policy: it is given the conversation, not
the policy's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import Preempted, RewardError
from pipeline.stage import Context
from stages.lib.models.config import read_config
from stages.lib.models.lengths import require_length
from stages.lib.models.loading import load_model
from stages.lib.on_policy.contained_calls import Means, Trouble
from stages.lib.on_policy.contained_rewards import contained_scorers
from stages.lib.on_policy.reward_params import LEARNED, Reward, learned, programmatic, reward_names
from stages.lib.on_policy.rewards import check_rows, check_scores, combine, score_programmatic
from stages.lib.on_policy.samples import Sample
from stages.lib.preferring.reward_models import encode_scored, load_reward_model, scored_class, scores
from stages.lib.preferring.reward_reading import reading_in, with_penalty
from stages.lib.processes.collectives import from_main
from stages.lib.processes.contained import Abandoned
from stages.lib.text.batches import attention_mask, padded
from stages.lib.text.chat_template import Messages
from stages.lib.text.prompts import PromptRow
from stages.lib.text.tokenizers import load_tokenizer
from stages.lib.training.engine import freeze
from stages.lib.training.layouts import split_while_loading, zero_stage_of


def require_scorable(
    ctx: Context, rewards: Sequence[Reward], rows: Sequence[PromptRow], turns: Messages | None = None
) -> None:
    """`check_rows` of the prompts, once for all processes, in which it raises alike; `Preempted` where it is to stop meanwhile."""
    means = Means(ctx.resources.threads_per_process, ctx.going_on_alone)
    prompts = ((row.index, row.prompt, row.row) for row in rows)
    try:
        from_main(lambda: check_rows(rewards, prompts, turns, means))
    except Abandoned:
        raise Preempted("while the rewards were tried on the rows") from None


class RewardModelScorer:
    """A frozen reward model. Under ZeRO-3 it is split over the processes, which then score together."""

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, Any] | None,
        precision: str,
        device: torch.device,
        batch_size: int,
        uncertainty_penalty: float = 0.0,
    ) -> None:
        self.folder = folder
        self.device = device
        self.batch_size = batch_size
        self.together = zero_stage_of(layout) == 3
        self.reading = with_penalty(
            reading_in(read_config(folder), str(folder)), uncertainty_penalty, f"reward model {folder.name}"
        )
        # Refuses a model whose head was lost: it scores the fixed prompts otherwise than its manifest says.
        if self.together:
            from_main(lambda: load_reward_model(folder) and None)  # the model itself is not to be sent to the others
            with split_while_loading(layout):
                model = load_model(scored_class(self.reading), folder)
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        else:
            model, self.tokenizer = load_reward_model(folder)
        self.model: nn.Module = freeze(model, layout, precision, device)
        self.config = read_config(folder)

    def encode(self, chat: Messages) -> tuple[list[int], list[int]]:
        """The chat in the reward model's own template and tokens, and 1 where its steps end, if it judges steps.

        Raises `DataError` if it reads no chat that long.
        """
        ids, ends = encode_scored(self.tokenizer, chat, self.reading)
        require_length(
            self.config,
            len(ids),
            where=f"reward model {self.folder.name}",
            what="a prompt with its completion has {tokens} of its tokens",
            hint="Lower max_prompt_tokens or max_new_tokens.",
        )
        return ids, ends

    @torch.no_grad()
    def score(self, chats: Sequence[Messages]) -> list[float]:
        """One score a chat. Under ZeRO-3 all processes call it together, with the same number of chats."""
        found: list[float] = []
        for start in range(0, len(chats), self.batch_size):
            ids, ends = zip(*(self.encode(chat) for chat in chats[start : start + self.batch_size]), strict=True)
            batch = {"input_ids": padded(ids, int(self.tokenizer.pad_token_id)), "attention_mask": attention_mask(ids)}
            batch["step_ends"] = padded(ends)
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            found += [float(score) for score in scores(self.model, batch, self.reading)]
        return found


class Scorer:
    """All rewards of a stage."""

    def __init__(self, rewards: Sequence[Reward], model: RewardModelScorer | None, means: Means | None = None) -> None:
        self.rewards = rewards
        self.model = model
        self.names = reward_names(rewards)
        self.weights = [params.weight for params in rewards]
        self.contained = contained_scorers(rewards, means or Means())
        assert (learned(rewards) is None) == (model is None), "the stage's check sees to that"

    def score(
        self, samples: Sequence[Sample], at_boundary: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.float64], list[dict[str, Trouble]]]:
        """Samples x rewards, without weights; and for each sample what went wrong with it, by the reward's name.

        Raises `RewardError` with the row and the reward where one is no number. What all processes do together comes first:
        `at_boundary`, called within it, may raise where the run is to stop.
        """
        columns: dict[str, list[float]] = {}
        troubles: list[dict[str, Trouble]] = [{} for _ in samples]
        if self.model is not None:
            columns[LEARNED] = self.learned_scores(samples, at_boundary)
        own = programmatic(self.rewards)
        columns |= zip(reward_names(own), score_programmatic(own, samples), strict=True)
        for name, scorer in self.contained.items():
            scored = scorer.score(samples)
            columns[name] = [each.value for each in scored]
            for found, each in zip(troubles, scored, strict=True):
                if each.trouble is not None:
                    found[name] = each.trouble
        return np.asarray([columns[name] for name in self.names], dtype=np.float64).T, troubles

    def learned_scores(self, samples: Sequence[Sample], at_boundary: Callable[[], None]) -> list[float]:
        """Raises `RewardError` only after the last chunk: a process that stopped before would leave the others waiting."""
        assert self.model is not None
        found: list[float] = []
        wrong: list[RewardError] = []
        for start in range(0, len(samples), self.model.batch_size):
            at_boundary()
            chunk = samples[start : start + self.model.batch_size]
            assert not any(isinstance(each.prompt, str) for each in chunk), "a reward model scores conversations"
            chats = [
                [*each.prompt, *(each.completion.turns or ()), {"role": "assistant", "content": each.completion.text}]
                for each in chunk
            ]
            values = self.model.score(chats)
            try:
                found += check_scores(LEARNED, values, chunk)
            except RewardError as error:
                wrong.append(error)
        if wrong:
            raise wrong[0]
        return found

    def total(self, values: NDArray[np.float64]) -> list[float]:
        """The weighted sum of each sample's rewards."""
        return combine(self.weights, values.T.tolist())
