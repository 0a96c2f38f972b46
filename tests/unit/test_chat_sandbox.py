"""Chat templates of strangers: rendered as transformers renders them, bounded, and every failure a sentence."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.errors import DataError, Preempted
from pipeline.processes import descendants
from pipeline.settings.strict import Reading, validate
from stages import STAGES
from stages.lib.text import chat_sandbox
from stages.lib.text.chat_budget import OverLimit
from stages.lib.text.chat_presets import PRESETS
from stages.lib.text.chat_probe import VERDICTS, probe
from stages.lib.text.chat_sandbox import render_template
from stages.lib.text.chat_template import apply_template
from stages.lib.text.template_date import DEFAULT, on_template_date, telling, told_date

CHAT = [
    {"role": "system", "content": " Be short.\n"},
    {"role": "user", "content": 'What is 1 + 1?\n\tSay "it" & <why>, \u4f60\u597d.'},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n  Two  "},
    {"role": "user", "content": "And\n\nthen?"},
    {"role": "assistant", "content": "Three"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

LOOPS = """\
{%- set ns = namespace(first=true, system='', seen=[]) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and ns.first %}
        {%- set ns.system = message['content'] | trim %}
        {%- set ns.first = false %}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 > 3 %}{% break %}{% endif %}
    {%- set ns.seen = ns.seen + [message.role] %}
    {{- '<|' + message['role'] + '|>' ~ loop.index ~ '/' ~ loop.length ~ (', last' if loop.last else '') }}
    {{ message.content }}
{%- endfor %}
{{ ns.system }} {{ ns.seen | join(', ') }} {{ ns.seen }} {{ not ns.first }}
"""

CUTS = """\
{%- for message in messages[1:] if message.role != 'system' -%}
    {%- set content = message.content -%}
    {%- if '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {{- '[' ~ thought ~ ']' -}}
    {%- endif -%}
    {{- content.strip() | upper }} {{ content | length }} {{ content[::-1] }} {{ content.replace('\\n', '|') }}
{% endfor -%}
{{ messages[::-1] | map(attribute='role') | unique | join('+') }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last }}
{{ messages | rejectattr('role', 'in', ['user', 'system']) | list | length }} {{ (messages | length) * 2 - 1 }}
"""

WRITTEN = """\
{%- macro shown(value, depth=0) -%}
    {%- for key, inner in value | dictsort -%}
        {{- '  ' * depth }}{{ key }}: {{ inner | tojson }}
{% endfor -%}
{%- endmacro -%}
{{ messages[0] | tojson }} {{ messages | tojson(indent=2) }} {{ messages[1] | tojson(separators=(',', ':'), sort_keys=true) }}
{{ shown(messages[1], depth=1) }} {{ '%s is %05.2f' % ('pi', 3.14159) }} {{ '{:>6}|{a}'.format('x', a=1) }}
{{ 'a\\nb' | indent(4) }} {{ 'a\\nb' | indent('> ', first=true) }} {{ 'x' | center(7) }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 7 % 4 }}
{{ [3, 1, 2] | sort | batch(2, 0) | list }} {{ [1, 2, 3] | sum }} {{ [[1], [2]] | sum(start=[]) }} {{ 2.567 | round(1) }}
{{ [1, 2, 3] | slice(2) | list }} {{ 'aXbX' | replace('X', '--') }} {{ '%s' | format('y') }} {{ tools is none }}
{{ nothing }}{{ nothing | default('d') }} {{ {'a': messages[0].role} }} {{ (messages[0].role, 1) }} {{ add_generation_prompt }}
"""

SPANS = """\
{{ bos_token }}{% for message in messages %}
{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{% endfor %}"""


@pytest.mark.parametrize("last", range(1, len(CHAT) + 1))
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("template", [LOOPS, CUTS, WRITTEN, SPANS, *(preset.template for preset in PRESETS.values())])
def test_renders_as_transformers_does(template: str, asks: bool, last: int) -> None:
    """transformers itself is the oracle."""
    if template is WRITTEN and last < 2:
        last = 2  # it looks at the second message
    (expected,), _ = render_jinja_template(
        conversations=[CHAT[:last]],
        chat_template=template,
        add_generation_prompt=asks,
        return_assistant_tokens_mask="{% generation" in template or "{%- generation" in template,
        **NAMES,
    )
    given: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": asks, **NAMES}
    assert render_template(template, CHAT[:last], given) == expected


class Template:
    """As much of a tokenizer as rendering asks for."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template
        self.special_tokens_map = NAMES

    def get_chat_template(self, tools: Any = None) -> str:
        return self.chat_template


def rendered(template: str, *, tried: bool = True) -> str:
    """The chat as text; with `tried` as after a trial that found nothing, which saves the test a process."""
    if tried:
        VERDICTS[template] = ""
    tokenizer: Any = Template(template)
    return apply_template(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages.missing.name }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include messages %}", "TypeError: no loader"),
        ("{% import 'other' as other %}", "TypeError: no loader"),
        ("{% extends 'other' %}", "TypeError: no loader"),
        ("{{ 7.0 ** 100000 }}", "OverflowError"),
        ("{{ 'a' | int(base=99) | abs / ([] | sum) }}", "Error"),
        ("{{ {messages: 1} }}", "TypeError: unhashable"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 'x'.__class__.__mro__ }}", "SecurityError|UndefinedError"),
        ("{{ [] | random }}", "No filter named 'random'"),
        ("{{ " + "(" * 100_000, "RecursionError|TemplateSyntaxError"),
        ("{{ " + "9" * 100_000 + " }}", "ValueError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_whatever_a_template_does_is_a_sentence(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        rendered(template)
    (problem,) = caught.value.problems
    assert str(problem).startswith("chat_template: cannot render chat 'What is 1 + 1?") and problem.hint  # type: ignore[union-attr]
    assert "\n" not in str(problem) and len(str(problem)) < 500


@pytest.mark.parametrize(
    ("template", "odd"),
    [
        ("{{ '\\ud800' }}", r"'\ud800'"),
        ("{% for message in messages %}{{ message.content }}{{ '\\udfff!' }}{% endfor %}", r"'\udfff'"),
        ("{{ '\\ud83d' ~ '\\ude00' }}", r"'\ud83d'"),
        ("{{ '%c' % 55296 }}", r"'\ud800'"),
    ],
)
def test_what_a_template_writes_is_text(template: str, odd: str) -> None:
    """Python's strings hold halves of characters, UTF-8 and so every tokenizer does not."""
    with pytest.raises(DataError) as caught:
        rendered(template)
    said = str(caught.value)
    assert said.startswith("chat_template: cannot render chat 'What is 1 + 1?"), said
    assert f"what it writes holds {odd}, half of a character, which UTF-8 cannot hold" in said, said
    assert said.endswith("Correct the template, or use a model or tokenizer with another one.") and said.isprintable()
    assert rendered("{{ '\\U0001f600' }}") == "\U0001f600"


def test_a_chat_that_the_template_refuses_is_named() -> None:
    with pytest.raises(DataError, match=r"chat 'What is 1 \+ 1.*: the chat template refuses it: no"):
        rendered("{{ raise_exception('no') }}")


def test_several_templates_without_a_default_are_a_sentence() -> None:
    tokenizer: Any = Template("x")
    tokenizer.chat_template = {"plain": "x", "thinking": "y"}
    with pytest.raises(DataError, match="several chat templates, and none is called default: plain, thinking"):
        apply_template(tokenizer, CHAT)


def test_a_stop_within_a_template_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that asks to stop raises `Preempted` wherever the program is."""

    def asked() -> None:
        raise Preempted

    monkeypatch.setitem(NAMES, "stop", asked)  # type: ignore[arg-type]
    with pytest.raises(Preempted):
        rendered("{{ stop() }}")


GROWING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"


VARARGS = """\
{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}
{% for i in range(60) %}{{ f(ns.x, ns.x) }}{% endfor %}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** (10 ** 9) }}",
        "{{ 10 ** 100000000 }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%.1000000000f' % 1.5 }}",
        "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
        "{{ '%(a)s' * 100000 % {'a': 'x' * 900000} }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ '{:{w}d}'.format(1, w=10 ** 9) }}",
        "{{ ('{0}' * 100000).format('x' * 900000) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ ['x'] | map('center', 10000000000) | list }}",
        "{{ 'a\nb' | indent(10 ** 10) }}",
        "{{ range(100000) | join('x' * 100000) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ [1] | slice(10 ** 9) | list }}",
        "{{ ('a' * 1000) | replace('a', 'b' * 100000) }}",
        "{{ 1 | round(10 ** 9, 'ceil') }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ ([[1]] * 900000) | sum(start=[]) }}",
        "{{ 'x'.center(10 ** 9) }}",
        "{{ '1'.zfill(10 ** 9) }}",
        "{{ ('a' * 1000).replace('a', 'b' * 100000) }}",
        "{{ ''.join(['x' * 900000] * 100000) }}",
        "{{ ('x' * 900000).join('y' * 100000) }}",
        "{{ ('x' * 900000).translate({120: 'y' * 900000}) }}",
        "{{ ('\t' * 900000).expandtabs(10000) }}",
        "{{ ('f' * 900000) | int(0, 16) % 7 }}",
        "{{ {}.fromkeys(range(100000), 'x' * 100000) | string }}",
        GROWING % ("'x'", "ns.x ~ ns.x"),
        GROWING % ("'x'", "ns.x + ns.x"),
        GROWING % ("2", "ns.x * ns.x"),
        GROWING % ("[1]", "[ns.x, ns.x]"),
        GROWING % ("[1]", "(ns.x, ns.x) | list"),
        GROWING % ("{}", "{'a': ns.x, 'b': ns.x}"),
        GROWING % ("{}", "dict(a=ns.x, b=ns.x)"),
        "{% set ns = namespace(x=()) %}{% for i in range(100000) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
        VARARGS,
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set all %}{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}{% endset %}",
        "{% set all %}{% for i in range(100000) %}{{ '" + "y" * 10000 + "' }}{% endfor %}{% endset %}",
    ],
)  # fmt: skip
def test_what_would_never_end_or_fill_the_memory_ends_soon(template: str) -> None:
    """In this process, as it would if only a later row led there: the trial of the first chat is left out."""
    started = time.thread_time()
    with pytest.raises(OverLimit):
        render_template(template, CHAT, NAMES)
    assert time.thread_time() - started < 5


def test_processor_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^60 calls. The bound is lowered from seconds to a tenth of one, so that the test does not take as long."""
    monkeypatch.setattr("stages.lib.text.chat_budget.MAX_SECONDS", 0.1)
    template = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    with pytest.raises(OverLimit, match="processor time"):
        render_template(template, CHAT, NAMES)


def test_a_longer_chat_may_take_more() -> None:
    """The chat, written 15 times: 30 million characters, which are refused for a chat of a few words."""
    template = "{% for i in range(15) %}{% set ns.x = ns.x ~ messages[0].content %}{% endfor %}"
    template = "{% set ns = namespace(x='') %}" + template + "{{ ns.x }}"
    chat = [{"role": "user", "content": "x" * 2_000_000}]
    assert len(render_template(template, chat, NAMES)) == 30_000_000
    with pytest.raises(OverLimit):
        render_template("{{ 'x' * 30000000 }}", CHAT, NAMES)


@pytest.mark.slow
def test_a_template_is_tried_in_another_process_first() -> None:
    """That process is stopped by the kernel after a second: this template takes longer to be read."""
    template = "{{a}}" * (chat_sandbox.MAX_TEMPLATE_CHARACTERS // 5)
    assert "more than 1 s of processor time" in probe(template, CHAT, NAMES, max_seconds=1)
    assert probe(PRESETS["slipway"].template, CHAT, NAMES) == ""
    assert "whole number" in probe("{{ 10 ** 10000 }}", CHAT, NAMES)


@pytest.mark.slow
def test_a_process_that_a_launcher_ends_says_nothing_of_the_template() -> None:
    """A launcher that ends a job asks all below it to end: the rank stops by itself, and its template is not to blame."""
    killed: list[int] = []

    def end_the_first() -> None:
        while not killed:
            for each in descendants(os.getpid()):
                if any(word.endswith("chat_probe") for word in each.command_line()):
                    os.kill(each.pid, signal.SIGTERM)
                    killed.append(each.pid)
                    return

    thread = threading.Thread(target=end_the_first)
    thread.start()
    assert probe(PRESETS["slipway"].template, CHAT, NAMES) == ""
    thread.join()
    assert len(killed) == 1


def test_what_the_trial_found_is_told_for_every_chat() -> None:
    """A template that the trial does not get through is not rendered in this process at all."""
    template = "{{ 10 ** 12345 }}"
    for _ in range(2):
        with pytest.raises(DataError, match=r"chat_template: cannot render chat .*more than 4096 bits"):
            rendered(template, tried=False)
    assert VERDICTS[template]
    assert rendered("{{ 1 + 1 }}", tried=False) == "2"


def test_a_template_of_any_length_is_not_read() -> None:
    with pytest.raises(OverLimit, match="has 200,001 characters"):
        render_template("x" * 200_001, CHAT, NAMES)


def test_every_day_is_the_same_day() -> None:
    """Llama-3.2's template writes the date: the same artifact would be trained on other tokens tomorrow."""
    template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}Today Date: {{ date_string }}'
    )
    assert render_template(template, CHAT, NAMES) == "Today Date: 26 Jul 2024"
    with telling("2031-02-03"):
        assert render_template(template, CHAT, NAMES) == "Today Date: 03 Feb 2031"
    assert render_template(template, CHAT, NAMES) == "Today Date: 26 Jul 2024"


@pytest.mark.parametrize(
    "kind",
    [
        "sft",
        "reward",
        "sample_preferences",
        "reference_logprobs",
        "dpo",
        "kto",
        "ppo",
        "grpo",
        "rloo",
        "reinforce_plus_plus",
        "online_dpo",
        "evaluate",
        "quantize",
    ],
)
def test_every_stage_that_renders_chats_has_the_date_among_its_params(kind: str) -> None:
    stage, days = STAGES[kind], []

    def run(ctx: Any, params: Any) -> Any:
        days.append(told_date().isoformat())

    assert stage.run.__wrapped__  # type: ignore[attr-defined]
    on_template_date(run)(None, SimpleNamespace(template_date="2031-02-03"))  # type: ignore[arg-type]
    assert days == ["2031-02-03"] and told_date().isoformat() == DEFAULT
    for wrong in ("today", "2031-2-3", "03.02.2031", "2031-02-30"):
        _, problems = validate(stage.params, {"template_date": wrong}, "params", Reading([]))
        assert any(f"'{wrong}' is no date: write one as 2024-07-26" in str(each) for each in problems)
    _, problems = validate(stage.params, {"template_date": "2031-02-03"}, "params", Reading([]))
    assert not any("template_date" in str(each) for each in problems)
