"""Chat templates that come along, for models that have none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationInfo

from pipeline.errors import PathError, Problem, shown_path
from pipeline.settings.strict import Strict, reading
from stages.lib.text.tokenizer_files import DEFAULT, read_tokenizer_files


@dataclass(frozen=True)
class Preset:
    """A chat template and the special tokens it is written with. Assistant turns stand in `{% generation %}` blocks."""

    template: str
    special_tokens: tuple[str, ...]


SLIPWAY = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("unknown role '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|' ~ message.role ~ '|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content ~ '<|end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


CHATML = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("unknown role '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content ~ '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


PRESETS: dict[str, Preset] = {
    # Every role is one special token, so that no answer can grow together with the header before it.
    "slipway": Preset(SLIPWAY, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # What most tools know. An answer that begins with a line break cannot be told from the header's: see encode_chat.
    "chatml": Preset(CHATML, ("<|im_start|>", "<|im_end|>")),
}


class TokenToAdd(Strict):
    """A token that a vocabulary is to have, as the `tokenizers` library describes one."""

    content: str = Field(min_length=2)
    """The text of the token."""
    special: bool = True
    """Whether it is no text: what is decoded for people leaves it out, and no message can produce it."""
    lstrip: bool = False
    """Whether it takes the spaces before it."""
    rstrip: bool = False
    """Whether it takes the spaces behind it."""
    normalized: bool = False
    """Whether it is looked for in the text as the tokenizer normalizes it."""
    single_word: bool = False
    """Whether it counts only where no letter stands next to it."""


class TemplateOfTokenizer(Strict):
    """The chat template of another tokenizer, read from its folder when the recipe is."""

    template: str = Field(min_length=1)
    """The text of the template."""
    tokens: list[TokenToAdd] = []
    """The added tokens of that tokenizer that the template may be written with."""


def text_if_file(value: str, info: ValidationInfo) -> str:
    """The text of the template whose file `value` names, or else `value` itself: a preset's name, a text, or neither."""
    path = None if is_template(value) else reading(info).find_file(value)
    return path.read_text(encoding="utf-8") if path else value


def template_if_named(value: str | TemplateOfTokenizer, info: ValidationInfo) -> str | TemplateOfTokenizer:
    """As `text_if_file`, and the template of the tokenizer in whose folder `value` is. Raises `PathError` if it has none."""
    if isinstance(value, TemplateOfTokenizer) or is_template(value):
        return value
    path = reading(info).find(value)
    return template_of_folder(path) if path is not None and path.is_dir() else text_if_file(value, info)


def template_of_folder(folder: Path) -> TemplateOfTokenizer:
    """The only chat template of the tokenizer in `folder`, or its default one, with the tokens that it may be written with.

    Raises `PathError` if there is none.
    """
    files = read_tokenizer_files(folder)
    if files is None or DEFAULT not in files.templates:
        several = f" called default, but {', '.join(files.templates)}" if files and files.templates else ""
        what = f"holds no chat template{several}" if files else "holds no tokenizer.json"
        hint = "Name the folder of a tokenizer or model with one chat template, a Jinja file, or a preset."
        raise PathError(Problem(shown_path(folder), what, hint))
    template = files.templates[DEFAULT]
    flags = TokenToAdd.model_fields.keys() - {"content"}
    tokens = [
        TokenToAdd(content=text, **{name: value for name, value in given.items() if name in flags})
        for text, given in files.added.items()
        if may_write(template, text)
    ]
    return TemplateOfTokenizer(template=template, tokens=tokens)


def may_write(template: str, text: str) -> bool:
    """Whether the template's own words can make up `text`: it stands there, or around a role's name its two ends do."""
    if len(text) < 2:
        return False
    if text in template:
        return True
    return any(text[:i] in template and text[j:] in template for i in (2, 3) for j in (-2, -1) if len(text) > i - j)


def is_template(value: str) -> bool:
    """Whether it is a preset's name or the text of a template."""
    return value in PRESETS or "{{" in value or "{%" in value
