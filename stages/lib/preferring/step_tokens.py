"""The steps of an answer as tokens, and what a process reward model says at their ends.

B: sequences, T: tokens of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.chat_template import Messages
from stages.lib.text.tokenizers import encode_texts


def steps_of(answer: str, separator: str) -> list[str]:
    """The steps of an answer: what stands between separators, blank ones left out; an answer of nothing is one empty step."""
    return [step for step in answer.split(separator) if step.strip()] or [answer]


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, steps: Sequence[str], separator: str
) -> tuple[list[int], list[int]]:
    """The ids of the prompt up to where the assistant speaks and of each step with the separator behind it, and 1 at the last token
    of each step. A step is tokenized by itself, as TRL's process reward trainer did: what follows changes nothing of it.
    """
    ids = list(encode_prompt(tokenizer, prompt))
    ends = [0] * len(ids)
    for step_ids in encode_texts(tokenizer, [step + separator for step in steps]):
        ids += step_ids
        ends += [0] * (len(step_ids) - 1) + [1]
    return ids, ends


def right_of_tokens(output_BT2: torch.Tensor) -> torch.Tensor:
    """B x T: the log odds of `right` against `wrong`, after which sigmoid is softmax's probability of `right`."""
    return output_BT2[..., 1] - output_BT2[..., 0]
