"""Episodes of several turns: where the policy ends one, it reads what the user's function observes, and writes on.

    prompt   turn            observation              turn
    .....    a b c <end>     \\n<tool>4<end>\\n<assistant>   d e <end>
    uniforms 0 1 2 3         (4 ... 9)                10 11 12

The completion of an episode is all of that behind its prompt: the policy's own tokens and the observations between them, which
`observed` marks. A token is drawn with the number of its place in the completion, so that it depends on nothing but the seed,
the position of the episode and the weights; and the first turn is what it would be without episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, RewardError
from pipeline.stage import Context
from stages.lib.generating.sampling import Sampled
from stages.lib.on_policy.contained_calls import Means, Trouble, require_all_scored
from stages.lib.on_policy.episode_params import EpisodeParams
from stages.lib.on_policy.experience import Episode, Unfolded
from stages.lib.on_policy.observations import EndedTurn, Observed, Observer
from stages.lib.processes.collectives import any_process, from_all
from stages.lib.processes.contained import Abandoned
from stages.lib.text.chat_continuing import TurnBetween, turn_between
from stages.lib.text.prompts import PromptRow
from stages.lib.text.tokenizers import decode_ids, stop_token_ids

SampleTurn = Callable[[Sequence[Sequence[int]], Sequence[NDArray[np.float64]], int], list[Sampled]]
"""(what is continued, the numbers of what each may write, number of the turn) -> what was written. All processes together."""


@dataclass
class OpenEpisode:
    """An episode while it is written."""

    row: PromptRow
    uniforms: NDArray[np.float64]
    """As many numbers as it may have tokens."""
    written: list[Sampled] = field(default_factory=list)
    """The policy's turns."""
    between: list[list[int]] = field(default_factory=list)
    """The tokens of the observations that follow them."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """The messages before the last turn."""
    text: str = ""
    """That of the last turn."""
    goes_on: bool = True
    is_cut_short: bool = False
    """Whether what was observed did not fit: nothing of it is read, and the episode ends there."""
    num_cut: int = 0
    """Observations of which the end was cut off."""
    troubles: list[Trouble] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(each.ids) for each in self.written) + sum(map(len, self.between))

    @property
    def ids(self) -> list[int]:
        """All tokens so far, behind the prompt."""
        return [token for part, _ in self.parts() for token in part]

    def parts(self) -> list[tuple[list[int], Sampled | None]]:
        """Turns, with what the generator says of them, and observations, in their order."""
        found: list[tuple[list[int], Sampled | None]] = []
        for number, each in enumerate(self.written):
            found.append((each.ids.tolist(), each))
            if number < len(self.between):
                found.append((self.between[number], None))
        return found

    def closed(self, position: int) -> Episode:
        """The episode as rewards and the loss see it; of its observations nothing is said but which tokens they are."""
        logprobs = np.concatenate(
            [np.zeros(len(ids), np.float32) if by is None else by.logprobs for ids, by in self.parts()]
        )
        observed = np.concatenate([np.full(len(ids), by is None) for ids, by in self.parts()])
        return Episode(
            position=position,
            row_index=self.row.index,
            prompt_ids=np.asarray(self.row.ids, dtype=np.int64),
            ids=np.asarray(self.ids, dtype=np.int64),
            ended=self.written[-1].ended and not self.is_cut_short,
            rewards=np.zeros(0),
            generator_logprobs=logprobs,
            logprobs=logprobs,
            ref_logprobs=logprobs,
            values=np.zeros_like(logprobs),
            observed=observed if self.between else np.zeros(0, dtype=np.bool_),
            unfolded=Unfolded(tuple(self.turns), self.text, tuple(self.troubles), self.num_cut, self.is_cut_short),
        )


@dataclass(frozen=True)
class Unfolding:
    """What makes episodes of turns."""

    observer: Observer
    between: TurnBetween
    text_of: Callable[[Sampled], str]
    """What the policy says in a turn, without the token that ends it."""

    def unfold(self, episodes: Sequence[OpenEpisode], sample: SampleTurn) -> None:
        """Lets all episodes come to their end. All processes call it together, each with its own, of whatever number.

        Raises `RewardError`, in all of them, with what was wrong in any.
        """
        for turn in range(self.observer.params.max_turns):
            going = [each for each in episodes if each.goes_on]
            if not any_process(bool(going)):
                return
            prompts = [[*each.row.ids, *each.ids] for each in going]
            said = sample(prompts, [each.uniforms[each.num_tokens :] for each in going], turn)
            for each, sampled in zip(going, said, strict=True):
                each.written.append(sampled)
                each.text, each.goes_on = self.text_of(sampled), False
            if turn + 1 < self.observer.params.max_turns:
                self.observe([each for each in going if each.written[-1].ended])

    def observe(self, ended: Sequence[OpenEpisode]) -> None:
        """Adds what is observed to the episodes whose turn has ended, or lets them end."""
        turns = [EndedTurn(each.row, tuple(each.turns), each.text) for each in ended]
        wrong: RewardError | Abandoned | None = None
        try:
            observed = self.observer.observe(turns) if turns else []
            for each, turn, found in zip(ended, turns, observed, strict=True):
                self.add(each, turn, found)
        except (RewardError, Abandoned) as error:
            wrong = error
        require_all_scored(from_all(wrong))

    def add(self, episode: OpenEpisode, turn: EndedTurn, found: Observed) -> None:
        """Lets the policy read what was observed, if there is something, and room for it and a token after it."""
        ids: list[int] = []
        if found.text is not None and found.trouble is None:
            text = self.between.cut(found.text, self.observer.params.max_observation_tokens)
            try:
                ids = self.between.encode(text)
            except DataError as error:
                problem = error.problems[0]
                found = self.observer.in_trouble(turn, Trouble("unreadable", f"it gave what {problem}"))
            else:
                episode.num_cut += text != found.text
                found = Observed(text)
        if found.trouble is not None:
            episode.troubles.append(found.trouble)
        if found.text is None:
            return
        ids = ids or self.between.encode(found.text)
        if episode.num_tokens + len(ids) >= len(episode.uniforms):
            episode.is_cut_short = True
            return
        episode.between.append(ids)
        role = self.observer.params.role
        episode.turns += [{"role": "assistant", "content": turn.text}, {"role": role, "content": found.text}]
        episode.goes_on = True


def unfolding_of(
    ctx: Context, params: EpisodeParams | None, tokenizer: PreTrainedTokenizerBase, rows: Iterable[PromptRow]
) -> Unfolding | None:
    """What makes episodes of several turns, once its function, the rows and the chat template are found fit for it."""
    if params is None:
        return None
    stops = set(stop_token_ids(tokenizer))

    def text_of(sampled: Sampled) -> str:
        ids = sampled.ids.tolist()
        return decode_ids(tokenizer, ids[:-1] if ids and ids[-1] in stops else ids)

    between = turn_between(tokenizer, params.role)
    if params.on_error is not None:
        between.encode(params.on_error)
    observer = Observer(params, Means(asked_to_stop=ctx.going_on_alone))
    observer.check(rows)
    return Unfolding(observer, between, text_of)
