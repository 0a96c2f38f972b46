"""Rows of preferences, or chats, made of a policy's own completions, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.lib.on_policy.candidates import answer_message
from stages.lib.on_policy.ranking import Candidate, Chosen, choose_best, choose_pair
from stages.lib.rows.canonical import Row
from stages.lib.rows.ledger import Ledger
from stages.lib.text.prompts import PromptRow

CARRIED = ("id", "group", "source", "columns")
"""What a row keeps of the one that its prompt is from."""


RETOKENIZED = "answers whose text becomes other tokens, as a message, than the policy drew"


@dataclass
class SampledRows:
    """The rows of one side, the training or the held-out one."""

    split: str
    policy: str
    """What the policy is known by; every row says it."""
    names: Sequence[str]
    """Those of the rewards."""
    rows: list[Row] = field(default_factory=list)
    drawn: list[Row] = field(default_factory=list)
    """For each prompt all its completions, with what they score and what became of them."""
    candidates: list[list[Candidate]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Why prompts give no row, and how many."""

    def add_pair(
        self, row: PromptRow, found: Sequence[Candidate], min_margin: float, min_score: float | None, ledger: Ledger
    ) -> None:
        """Takes the best and the worst answer of a prompt as a pair, or drops it."""
        chosen = choose_pair(found, min_margin, min_score)
        if isinstance(chosen, str):
            return self.drop(row, found, chosen, ledger)
        best, worst = found[chosen.best], found[chosen.worst]
        margin = best.score - worst.score
        answers = {"chosen": [answer_message(best.text)], "rejected": [answer_message(worst.text)]}
        self.rows.append({"prompt": list(row.prompt), **answers, "margin": margin, **self.known_of(row, found, chosen)})
        self.margins.append(margin)
        return self.keep(row, found, {"chosen": chosen.best, "rejected": chosen.worst}, ledger)

    def add_best(self, row: PromptRow, found: Sequence[Candidate], min_score: float | None, ledger: Ledger) -> None:
        """Takes the best answer of a prompt as the end of a chat, of which nothing else is to be learned, or drops it."""
        best = choose_best(found, min_score)
        if isinstance(best, str):
            return self.drop(row, found, best, ledger)
        messages = [unlearned(message) for message in row.prompt if not isinstance(message, str)]
        chat = [*messages, answer_message(found[best].text)]
        self.rows.append({"messages": chat, **self.known_of(row, found, Chosen(best, best))})
        return self.keep(row, found, {"chosen": best}, ledger)

    def known_of(self, row: PromptRow, found: Sequence[Candidate], chosen: Chosen) -> Row:
        """Where the row comes from: what its prompt's row says, and how it was drawn."""
        usable = [each for each in found if not each.unusable]
        scores = {"chosen": found[chosen.best].score}
        if chosen.worst != chosen.best:
            scores["rejected"] = found[chosen.worst].score
        drawn = {
            "policy": self.policy,
            "scores": scores,
            "mean_score": mean([each.score for each in usable]),
            "completions": len(found),
            "usable": len(usable),
        }
        return {**{name: row.row[name] for name in CARRIED if name in row.row}, "sampled": drawn}

    def keep(self, row: PromptRow, found: Sequence[Candidate], places: Mapping[str, int], ledger: Ledger) -> None:
        for place in places.values():
            if found[place].retokenized:
                ledger.notice(RETOKENIZED, found[place].text)
        self.note_drawn(row, found, dict(places))

    def drop(self, row: PromptRow, found: Sequence[Candidate], reason: str, ledger: Ledger) -> None:
        ledger.drop(reason, example_of_prompt(row))
        self.dropped[reason] += 1
        self.note_drawn(row, found, {"dropped": reason})

    def note_drawn(self, row: PromptRow, found: Sequence[Candidate], became: Mapping[str, Any]) -> None:
        self.candidates.append(list(found))
        written = [
            {
                "text": each.text,
                "tokens": each.num_tokens,
                "ended": each.ended,
                "rewards": dict(zip(self.names, each.rewards, strict=True)),
                "score": each.score,
                **({"unusable": each.unusable} if each.unusable else {}),
                **({"troubles": dict(each.troubles)} if each.troubles else {}),
            }
            for each in found
        ]
        self.drawn.append({"split": self.split, "row": row.index, **became, "completions": written})

    def told_faults(self) -> str:
        """Why prompts gave no row and why completions were of no use, in words."""
        faults = Counter(each.unusable for found in self.candidates for each in found if each.unusable)
        return f"{dict(self.dropped)}; completions of no use: {dict(faults)}"

    def metrics(self) -> dict[str, float]:
        """Means over all completions that were drawn, over the best and worst answer of each prompt, and over the pairs."""
        everything = [each for found in self.candidates for each in found]
        usable = [
            scores for found in self.candidates if (scores := [each.score for each in found if not each.unusable])
        ]
        measures = {
            "reward": mean([each.score for each in everything]),
            "ended": mean([float(each.ended) for each in everything]),
            "length_tokens": mean([float(each.num_tokens) for each in everything]),
        }
        if len(self.names) > 1:
            rewards = zip(*(each.rewards for each in everything), strict=True)
            measures |= {f"reward_{name}": mean(list(each)) for name, each in zip(self.names, rewards, strict=True)}
        if usable:
            measures |= {
                "reward_best": mean([max(scores) for scores in usable]),
                "reward_worst": mean([min(scores) for scores in usable]),
            }
        if self.margins:
            measures["margin"] = mean(self.margins)
        return {f"{self.split}_{name}": value for name, value in measures.items()}


def faults_of(sides: Sequence[SampledRows]) -> dict[str, float]:
    """How many completions were drawn, how many of them could not be used, by reason, and with how many rewards had trouble."""
    everything = [each for side in sides for found in side.candidates for each in found]
    counts = Counter(each.unusable for each in everything if each.unusable)
    errors = Counter(name for each in everything for name in each.troubles)
    return {
        "completions": float(len(everything)),
        **{f"completions_{why}": float(n) for why, n in sorted(counts.items())},
        **{f"errors_{name}": float(n) for name, n in sorted(errors.items())},
    }


def unlearned(message: Mapping[str, Any]) -> Row:
    """The message; one of the assistant's, which the policy did not say, marked as not to be learned."""
    return {**message, "train": False} if message["role"] == "assistant" else dict(message)


def example_of_prompt(row: PromptRow) -> str:
    """The end of the prompt, for the ledger."""
    return row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
