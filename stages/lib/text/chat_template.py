"""Chat templates as they are: a tokenizer's own, rendered in bounds. Nothing here imports torch or transformers before it is
called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Preempted, Problem, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, Any]]
"""Canonical messages: `stages/lib/rows/canonical.py` says what they hold."""

Prompt = Messages | str
"""A conversation up to the assistant's turn, or raw text."""

TemplateMessage = dict[str, Any]
"""A message as one template reads it."""

Tool = Mapping[str, Any]
"""The JSON schema of a function that the assistant may call, as OpenAI writes it."""


class UnfitChat(DataError):
    """One chat cannot be used under a template or a tokenizer that take others. `reason` is a word for the ledger."""

    reason = ""


class RefusedChat(UnfitChat):
    """The template itself refuses the chat, such as one with a system message."""

    reason = "refused_by_template"


class NotRendered(UnfitChat):
    """The template fails on the chat, takes more time or memory than it may, or writes what is no text."""

    reason = "not_rendered_by_template"


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[TemplateMessage],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The rendered text.

    Raises `RefusedChat` where the template refuses the chat, and `NotRendered` where it fails on it, takes more time or memory
    than it may, or writes what is no text.
    """
    from stages.lib.text.chat_probe import require_bounded
    from stages.lib.text.chat_sandbox import Refusal, render_template

    template = template_of(tokenizer, tools)
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    variables |= {"tools": tools or None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        require_bounded(template, messages, variables)
        return writable(render_template(template, messages, variables))
    except Preempted:
        raise
    except Refusal as error:
        raise RefusedChat(Problem(about(messages), f"the chat template refuses it: {error}")) from None
    except Exception as error:  # a template is anybody's program
        raise NotRendered(
            Problem(
                "chat_template",
                f"cannot render {about(messages)}: {what_happened(error)}",
                "Correct the template, or use a model or tokenizer with another one.",
            )
        ) from None


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] | None = None) -> str:
    """The tokenizer's chat template; where it has several the one for tools if there are some, else the default one.

    As `apply_chat_template` chooses. Raises `DataError` if there is none.
    """
    templates = tokenizer.chat_template
    if not templates:
        hint = "Use a tokenizer that was made or trained for chats."
        raise DataError(Problem("chat_template", "the tokenizer has none", hint))
    if isinstance(templates, dict) and "default" not in templates and not (tools and "tool_use" in templates):
        what = f"the tokenizer has several chat templates, and none is called default: {', '.join(sorted(templates))}"
        raise DataError(Problem("chat_template", what, CHOOSE_ONE))
    return tokenizer.get_chat_template(tools=list(tools) if tools else None)


CHOOSE_ONE = (
    "Train it by sft, whose chat_template chooses one, and take that model; or, in a copy of the folder, move the one you want "
    "from additional_chat_templates to chat_template.jinja (where tokenizer_config.json lists them, give it the name default)."
)
"""What to do about templates none of which is the default one: only sft can be told which."""


class NoText(Exception):
    """What a template wrote cannot be written down, so no tokenizer takes it."""


def writable(rendered: str) -> str:
    """The rendered text itself. Raises `NoText` if UTF-8 cannot hold it: Jinja and Python read `\\ud800` as half of a character."""
    try:
        rendered.encode()
    except UnicodeEncodeError as error:
        odd = shown(rendered[error.start : error.end][:1])
        around = shown(rendered[max(0, error.start - 20) : error.start + 20])
        raise NoText(f"what it writes holds {odd}, half of a character, which UTF-8 cannot hold: {around}") from None
    return rendered


def what_happened(error: Exception) -> str:
    from stages.lib.text.chat_budget import OverLimit

    said = (str(error).splitlines() or [""])[0][:200]
    return said if isinstance(error, OverLimit | NoText) else f"{type(error).__name__}: {said}"


def about(messages: Messages) -> str:
    """A few words by which the reader finds the chat again."""
    first = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return f"chat {first[:60]!r}" if isinstance(first, str) else f"chat {str(first[0].get('text', ''))[:60]!r}"
