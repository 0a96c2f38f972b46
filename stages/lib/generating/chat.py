"""The conversation that `slipway chat` holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.errors import ArtifactError, DataError, Problem
from stages.lib.formulas.bounds import LARGEST_TEMPERATURE, LEAST_TEMPERATURE
from stages.lib.generating.replies import write_reply
from stages.lib.models.loading import load_language_model
from stages.lib.text.tokenizers import load_tokenizer


def load_chat_model(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder that can chat. Raises `ArtifactError` if the tokenizer has no chat template."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ArtifactError(
            Problem(str(folder), "its tokenizer has no chat template", "Name a model that was trained on chats.")
        )
    return load_language_model(folder, device), tokenizer


def chat(
    folder: Path,
    read_line: Callable[[], str | None],
    write: Callable[[str], Any],
    *,
    temperature: float = 0.7,
    device: str | None = None,
    **options: Any,
) -> None:
    """Holds a conversation of several turns with the model in `folder`, until `/exit` or the end of the input.

    `read_line` returns the user's next line, None at the end. `/reset` forgets the conversation. `options` are those of a
    `Conversation`.
    """
    if temperature and not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        raise DataError(
            Problem("temperature", f"is {temperature!r}", f"0, or from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}.")
        )
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_chat_model(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    conversation = Conversation(model, tokenizer, write, temperature=temperature, **options)
    write("/reset starts anew, /exit ends.\n")
    while (line := read_line()) is not None:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            conversation.messages.clear()
            write("The conversation is forgotten.\n")
        elif line:
            conversation.answer(line)


@dataclass
class Conversation:
    """What was said, and how the model goes on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    write: Callable[[str], Any]
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0

    def answer(self, line: str) -> None:
        """Writes the reply to the user's line as it comes. One that is interrupted by Ctrl-C is kept as far as it came."""
        self.messages.append({"role": "user", "content": line})
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        try:
            write_reply(
                self.model,
                self.tokenizer,
                self.messages,
                # Each turn draws anew: the same question twice need not get the same answer.
                position=self.turns,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                show=show,
            )
        except KeyboardInterrupt:
            pass
        except DataError as error:
            self.messages.pop()
            self.write(f"{error}\nThat message was not sent. /reset starts anew.\n")
            return
        self.turns += 1
        self.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
