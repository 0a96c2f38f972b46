"""Replies of several models to the same held-out prompts, and what reward models give them.

A prompt counts only if every model has room for a whole reply to it and every reward model reads it with each of the
replies and with the one that was held out. So all means are over the same prompts. N: these prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import DataError
from stages.lib.formulas.calibration import wins
from stages.lib.generating.replies import Reply
from stages.lib.measuring.compared_models import Subject, reading_of_judge, require_rows
from stages.lib.measuring.perplexity import ScoredRow, reward_rows
from stages.lib.preferring.reward_models import encode_scored
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_fitting import split_last_answer
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.chat_template import Messages, UnfitChat

NO_ROOM = "no_room_for_reply"
"""The prompt and the longest reply together are longer than one of the models reads."""


UNREAD = "unread_by_reward_model"
"""With one of the replies the prompt is longer than one of the reward models reads, or cannot be encoded for it."""


NO_TEXT = "no_text_held_out"
"""The turn that was held out says nothing in words: it calls a tool."""


MEASURES = ("heldout_reward", "heldout_reward_deviation", "heldout_reward_win_rate")
"""What is measured of each model under each reward model."""


@dataclass(frozen=True)
class HeldoutPrompt:
    """A held-out chat up to the assistant's last turn."""

    row: int
    """Which row of the file it is, from 0. The random numbers of replies depend on it."""
    prompt: Messages
    reference: str
    """The turn that was held out."""

    def with_reply(self, text: str) -> Messages:
        return [*self.prompt, {"role": "assistant", "content": text}]


def reply_record(reply: Reply) -> dict[str, Any]:
    """The reply as reports have it."""
    return {"text": reply.text, "tokens": reply.num_tokens, "truncated": reply.truncated}


@dataclass
class ScoredReplies:
    """The prompts, and the replies of each model to them; none where nobody asked for them."""

    prompts: list[HeldoutPrompt] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of prompts."""
    replies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Model -> its reply to each of the prompts."""

    @classmethod
    def choose(
        cls,
        chats: Path,
        num_prompts: int,
        max_new_tokens: int,
        models: Sequence[Subject],
        reward_models: Sequence[Subject],
    ) -> ScoredReplies:
        """The prompts of the first held-out chats to which every model can reply. Raises `DataError` if none is left."""
        chosen = cls()
        read = list(islice(read_rows(chats / "heldout.jsonl"), num_prompts))
        for index, row in enumerate(read):
            prompt = HeldoutPrompt(index, *split_last_answer(row["messages"]))
            try:
                lengths = [len(encode_prompt(model.tokenizer, prompt.prompt)) for model in models]
            except UnfitChat as error:
                chosen.left_out[error.reason] += 1
                continue
            if not prompt.reference.strip():
                chosen.left_out[NO_TEXT] += 1
            elif any(length + max_new_tokens > model.length() for model, length in zip(models, lengths, strict=True)):
                chosen.left_out[NO_ROOM] += 1
            elif not all(readable(judge, prompt.with_reply(prompt.reference)) for judge in reward_models):
                chosen.left_out[UNREAD] += 1
            else:
                chosen.prompts.append(prompt)
        require_rows("inputs.chats", len(read), len(chosen.prompts))
        return chosen

    def add(self, replies: Mapping[str, Sequence[dict[str, Any]]], reward_models: Sequence[Subject]) -> None:
        """Adds the models' replies to all prompts, and leaves out the prompts that a reward model cannot read with them."""
        kept = [
            index
            for index, prompt in enumerate(self.prompts)
            if all(
                readable(judge, prompt.with_reply(of_model[index]["text"]))
                for judge in reward_models
                for of_model in replies.values()
            )
        ]
        require_rows("inputs.chats", len(self.prompts) + self.left_out.total(), len(kept))
        if unread := len(self.prompts) - len(kept):
            self.left_out[UNREAD] += unread
        self.prompts = [self.prompts[index] for index in kept]
        self.replies = {name: [of_model[index] for index in kept] for name, of_model in replies.items()}

    def score(
        self, model: PreTrainedModel, judge: Subject, batch_size: int
    ) -> dict[str, list[float] | dict[str, list[float]]]:
        """What a reward model gives the replies: `reference`, N scores, and `models`, N scores of each."""
        texts = [[prompt.reference for prompt in self.prompts]]
        texts += [[reply["text"] for reply in of_model] for of_model in self.replies.values()]
        ids = [
            tuple(map(tuple, scored_ids(judge, prompt.with_reply(text))))
            for of_one in texts
            for prompt, text in zip(self.prompts, of_one, strict=True)
        ]
        # Each chat once: of equal replies none may win by the last bits, which depend on the batch.
        different = list(dict.fromkeys(ids))
        rows = [ScoredRow(*each) for each in different]
        padding_id, reading = judge.tokenizer.pad_token_id, reading_of_judge(judge)
        found = dict(zip(different, reward_rows(model, rows, batch_size, padding_id, reading), strict=True))
        size = len(self.prompts)
        columns = [[found[each] for each in ids[start : start + size]] for start in range(0, len(ids), size)]
        return {"reference": columns[0], "models": dict(zip(self.replies, columns[1:], strict=True))}

    def summary(self, scores: Mapping[str, Mapping[str, Any]], win_rate_against: str | None) -> dict[str, Any]:
        """What is measured, from what `score` gave for each reward model: `replies` and `reward_models`, by name.

        Win rates are against the replies of the model `win_rate_against`; None: against those that were held out.
        """
        return {
            "replies": {name: reply_measures(of_model) for name, of_model in self.replies.items()},
            "reward_models": {judge: measures_under(found, win_rate_against) for judge, found in scores.items()},
        }

    def rows(self, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One row per prompt: the replies to it, each with what every reward model gives it."""
        return [
            {
                "prompt": prompt.prompt,
                "reference": {
                    "text": prompt.reference,
                    "scores": {judge: found["reference"][index] for judge, found in scores.items()},
                },
                "replies": {
                    name: {
                        **of_model[index],
                        "scores": {judge: found["models"][name][index] for judge, found in scores.items()},
                    }
                    for name, of_model in self.replies.items()
                },
            }
            for index, prompt in enumerate(self.prompts)
        ]


def scored_ids(judge: Subject, chat: Messages) -> tuple[list[int], list[int]]:
    """The ids of the chat as the reward model was trained on them, the prompt and the answer to it, and where it is read."""
    return encode_scored(judge.tokenizer, chat, reading_of_judge(judge))


def fits(judge: Subject, chat: Messages) -> bool:
    """Whether the chat is no longer than the reward model reads."""
    return len(scored_ids(judge, chat)[0]) <= judge.length()


def readable(judge: Subject, chat: Messages) -> bool:
    """Whether it fits and can be encoded at all: a reply may spell what the reward model's tokenizer cannot take as text."""
    try:
        return fits(judge, chat)
    except DataError:
        return False


def measures_under(found: Mapping[str, Any], win_rate_against: str | None) -> dict[str, Any]:
    """What one reward model's scores come to, in their shape. Nobody has a win rate against himself."""
    opponent = found["reference"] if win_rate_against is None else found["models"][win_rate_against]
    return {
        "reference": reward_measures(found["reference"], None if win_rate_against is None else opponent),
        "models": {
            name: reward_measures(scores, None if name == win_rate_against else opponent)
            for name, scores in found["models"].items()
        },
    }


def reward_measures(scores: Sequence[float], opponent: Sequence[float] | None) -> dict[str, float]:
    """`MEASURES` over the prompts: mean, deviation (divided by N), and how often the opponent's score is lower, ties half."""
    scores_N = torch.tensor(scores, dtype=torch.float64)
    measures = [float(scores_N.mean()), float(scores_N.std(correction=0))]
    if opponent is not None:
        measures.append(float(wins(scores_N, torch.tensor(opponent, dtype=torch.float64)).mean()))
    return dict(zip(MEASURES, measures, strict=False))


def reply_measures(replies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean number of tokens, without the one that ends the reply, and the share of replies that were cut off."""
    return {
        "heldout_reply_tokens": sum(each["tokens"] for each in replies) / len(replies),
        "heldout_truncated_replies": sum(each["truncated"] for each in replies) / len(replies),
    }


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The summary as metrics: `heldout_reward.<model>`; with several reward models `heldout_reward.<reward model>.<model>`."""
    judges: Mapping[str, Any] = summary["reward_models"]
    metrics = {}
    for measure in MEASURES:
        for judge, found in judges.items():
            of = f"{judge}." if len(judges) > 1 else ""
            for name, measures in found["models"].items():
                if measure in measures:
                    metrics[f"{measure}.{of}{name}"] = measures[measure]
        if measure == "heldout_reward":
            for judge, found in judges.items():
                metrics[f"heldout_reward_reference.{judge}"] = found["reference"][measure]
    for measure in ("heldout_reply_tokens", "heldout_truncated_replies"):
        for name, measures in summary["replies"].items():
            metrics[f"{measure}.{name}"] = measures[measure]
    return metrics
