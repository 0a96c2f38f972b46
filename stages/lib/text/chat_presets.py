"""Chat templates that come along, for models that have none."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationInfo

from pipeline.settings.strict import reading


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


def text_if_file(value: str, info: ValidationInfo) -> str:
    """The text of the template whose file `value` names, or else `value` itself: a preset's name, a text, or neither."""
    path = None if is_template(value) else reading(info).find(value)
    return path.read_text(encoding="utf-8") if path else value


def is_template(value: str) -> bool:
    """Whether it is a preset's name or the text of a template."""
    return value in PRESETS or "{{" in value or "{%" in value
