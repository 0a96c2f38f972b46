"""Chat templates that come along, for models that have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


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


if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]
