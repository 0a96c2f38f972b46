"""What stands between a turn that a model has written itself and its next one: a message, as tokens of the chat template.

The model's own tokens are kept as they are; only what follows the token that ended its turn is encoded:

    ...<|im_start|>assistant\\n{written by the model}<|im_end|>   \\n<|im_start|>tool\\n4<|im_end|>\\n<|im_start|>assistant\\n
                                                                 what `encode` gives for a tool's message 4

A template that rewrites earlier turns once others follow would have a server read something else than the model has: no
such template is told apart here, because the model goes on from what it has read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_answers import require_written, split_at_end
from stages.lib.text.chat_dialect import ASKED, REPLY, RESULT, dialect_of
from stages.lib.text.chat_rendering import Rendered, guard_special, render_guarded
from stages.lib.text.chat_tokens import tokenize_stretches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_REPLY: dict[str, Any] = {"role": "assistant", "content": REPLY}
CALLING_REPLY: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"name": "tool", "arguments": {}}],
}
"""For templates that take what a tool returns only after a call of it."""


@dataclass(frozen=True)
class TurnBetween:
    """Encodes messages of one role that follow a turn of the model's own."""

    tokenizer: PreTrainedTokenizerBase
    role: Literal["tool", "user"]
    reply: dict[str, Any]
    """What stands for the model's turn: nothing of it is in what is encoded."""

    def encode(self, content: str) -> list[int]:
        """The ids from behind the token that ended the model's turn up to where its next turn begins.

        What the content spells of special tokens is text. Raises `DataError` where it cannot be encoded so.
        """
        guarded, guard = guard_special(self.tokenizer, [ASKED, self.reply, {"role": self.role, "content": content}])
        whole, _ = split_at_end(self.tokenizer, render_guarded(self.tokenizer, guarded[:2]), guarded[1])
        text = render_guarded(self.tokenizer, guarded, add_generation_prompt=True)
        if not text.startswith(whole):
            what = f"writes an answer otherwise once a {self.role}'s message follows it"
            raise DataError(Problem("chat_template", what, "Use a template that leaves finished turns as they are."))
        between = text[len(whole) :]
        if content == RESULT:
            require_written(guarded, RESULT, between)
        return tokenize_stretches(self.tokenizer, Rendered(between, guard), begins=False)[0]

    def cut(self, content: str, max_tokens: int) -> str:
        """The content as far as its first `max_tokens` tokens go; whole characters."""
        offsets = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return content if len(offsets) <= max_tokens else content[: offsets[max_tokens][0]]


def turn_between(tokenizer: PreTrainedTokenizerBase, role: Literal["tool", "user"]) -> TurnBetween:
    """What encodes messages of the role. Raises `DataError` if the template cannot write such a message after an answer."""
    plain = TurnBetween(tokenizer, role, PLAIN_REPLY)
    try:
        plain.encode(RESULT)
    except DataError:
        if role != "tool" or not dialect_of(tokenizer).calls:
            raise
        calling = TurnBetween(tokenizer, role, CALLING_REPLY)
        calling.encode(RESULT)
        return calling
    return plain
