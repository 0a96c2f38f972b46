"""The conversation that `slipway chat` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.errors import ArtifactError, DataError, Problem
from stages.lib.formulas.bounds import LARGEST_TEMPERATURE, LEAST_TEMPERATURE
from stages.lib.generating.replies import write_reply
from stages.lib.generating.side_by_side import SameForAll, replies_of_all
from stages.lib.models.adapters.opening import Adapted, open_adapted
from stages.lib.models.loading import load_language_model
from stages.lib.text.tokenizers import load_tokenizer

NO_ADAPTER = "none"
"""What a user writes for the model without an adapter."""

NO_ADAPTERS = "There are no adapters: begin with `slipway chat MODEL --adapter PLACE`"


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


def load_adapted_chat_model(
    folder: Path, adapters: Mapping[str, Path], device: str | torch.device, write: Callable[[str], Any]
) -> Adapted:
    """The model in `folder` and adapters of it, none of them on. `write` is told what is to be said of their base.

    Raises `ArtifactError` where an adapter is not of this model, or its tokenizer has no chat template. The model's own may
    have none: a conversation without an adapter is then in the template of the first one.
    """
    adapted = open_adapted(
        folder, adapters, lambda base: load_language_model(base, device), say=lambda note: write(f"{note}\n")
    )
    for name, place in adapters.items():
        if not adapted.tokenizers[name].chat_template:
            hint = "Save the tokenizer that it was trained with beside it."
            raise ArtifactError(Problem(str(place), f"the tokenizer of adapter {name} has no chat template", hint))
    if not adapted.tokenizers[None].chat_template:
        first = next(iter(adapters))
        adapted.tokenizers[None] = adapted.tokenizers[first]
        write(f"The model has no chat template of its own: without an adapter it reads that of {first}.\n")
    return adapted


def chat(
    folder: Path,
    read_line: Callable[[], str | None],
    write: Callable[[str], Any],
    *,
    adapters: Mapping[str, Path] | None = None,
    temperature: float = 0.7,
    device: str | None = None,
    **options: Any,
) -> None:
    """Holds a conversation of several turns with the model in `folder`, until `/exit` or the end of the input.

    `read_line` returns the user's next line, None at the end. `/reset` forgets the conversation. Of `adapters` the first is on
    the model; `/adapter NAME` has another one answer, `/adapter none` the model alone, and the conversation goes on. `/all TEXT`
    shows what each of them would answer to that, and the conversation is as it was. `options` are those of a `Conversation`.
    """
    if temperature and not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        raise DataError(
            Problem("temperature", f"is {temperature!r}", f"0, or from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}.")
        )
    transformers_logging.set_verbosity_error()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapted = None
    if adapters:
        adapted = load_adapted_chat_model(folder, adapters, device, write)
        first = next(iter(adapters))
        model, tokenizer = adapted.use(first), adapted.tokenizers[first]
        write(f"{who_talks(adapted)}; /adapter NAME changes that, /adapter none takes it off, /all TEXT asks all.\n")
    else:
        model, tokenizer = load_chat_model(folder, device)
    conversation = Conversation(model, tokenizer, write, temperature=temperature, **options)
    write("/reset starts anew, /exit ends.\n")
    while (line := read_line()) is not None:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            conversation.messages.clear()
            write("The conversation is forgotten.\n")
        elif line.split(" ")[0] == "/adapter":
            write(f"{change_adapter(conversation, adapted, line.removeprefix('/adapter').strip())}.\n")
        elif line.split(" ")[0] == "/all":
            write(f"{answers_of_all(conversation, adapted, line.removeprefix('/all').strip())}\n")
        elif line:
            conversation.answer(line)


def change_adapter(conversation: Conversation, adapted: Adapted | None, name: str) -> str:
    """Has the adapter of this name answer from now on, with its tokenizer; "none": the model alone; "": who does it already.

    Returns what is to be said of it. A name that there is not changes nothing.
    """
    if adapted is None:
        return NO_ADAPTERS
    if name:
        wanted = None if name == NO_ADAPTER else name
        try:
            conversation.model = adapted.use(wanted)
        except (DataError, ArtifactError) as error:
            conversation.model = adapted.model
            conversation.tokenizer = adapted.tokenizers[adapted.active]
            return f"{error} {who_talks(adapted)}"
        conversation.tokenizer = adapted.tokenizers[wanted]
    return who_talks(adapted)


def answers_of_all(conversation: Conversation, adapted: Adapted | None, line: str) -> str:
    """What each adapter, and the model alone, would answer to the line at this point of the conversation."""
    if adapted is None:
        return f"{NO_ADAPTERS}."
    if not line:
        return "Write what they are to answer behind it: /all What is open?"
    messages = [*conversation.messages, {"role": "user", "content": line}]
    drawn = SameForAll(
        conversation.turns,
        conversation.max_new_tokens,
        conversation.temperature,
        conversation.top_p,
        conversation.seed,
    )
    try:
        said = replies_of_all(adapted, messages, drawn)
    except KeyboardInterrupt:
        return "Interrupted; the conversation is as it was."
    finally:
        conversation.model = adapted.model
    return "\n".join(
        f"{name or NO_ADAPTER}: {reply if isinstance(reply, DataError) else reply.text}" for name, reply in said.items()
    )


def who_talks(adapted: Adapted) -> str:
    """The adapters there are, and which of them is on the model."""
    names = [f"{name} (on)" if name == adapted.active else name for name in adapted.adapters]
    return f"Adapters: {', '.join(names)}" + ("" if adapted.active else "; none is on")


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
