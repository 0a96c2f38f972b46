"""Cleaning by rule: what each kind drops, rewrites and leaves alone, where it looks, and what is refused beforehand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from pipeline.settings.resources import Resources
from pipeline.settings.strict import Strict
from pipeline.stage import Forecast
from stages.data.clean import STAGE, CleanParams, build_verdict
from stages.lib.curation.languages import LANGUAGES, SCRIPTS, pieces_of, share_of_languages, share_of_scripts
from stages.lib.curation.rule_params import NamedRule, Rule, Rules, kind_of_rule, rule_names
from stages.lib.curation.rule_parts import PARTS
from stages.lib.curation.rules import CHANGES, JUDGES, Ruled, build_rules
from stages.lib.curation.said import rewrite_texts, texts_said
from stages.lib.rows.canonical import FORMATS
from tests.unit.running_stages import params_of, problems_of

Row = dict[str, Any]


class Holder(Strict):
    rules: Rules = []
    """The rules."""


def rules_of(*rules: Row) -> list[Rule]:
    return params_of(Holder, {"rules": list(rules)}, Path.cwd()).rules


def refused(*rules: Row) -> str:
    """What a recipe's author is told of such rules."""
    return problems_of(Holder, {"rules": list(rules)}, Path.cwd())


def ruled(row: Row, *rules: Row, format: str = "chats") -> Ruled:
    return build_rules(rules_of(*rules), format)(row)


def chat(*turns: str, system: str | None = None) -> Row:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def pair(question: str, chosen: str, rejected: str) -> Row:
    def turn(role: str, content: str) -> list[Row]:
        return [{"role": role, "content": content}]

    return {
        "prompt": turn("user", question),
        "chosen": turn("assistant", chosen),
        "rejected": turn("assistant", rejected),
    }


def rewritten(text: str, **rule: Any) -> str:
    return ruled({"text": text}, rule, format="text").row["text"]


# What rewrites


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&#39;a&#x27; &amp; &quot;b&quot; &lt;c&gt; &eacute;", "'a' & \"b\" <c> é"),
        ("&amp;lt; once", "&lt; once"),
        # without a semicolon, or no entity: as it is
        ("?a=1&copy=2&lt=3 &nosuch; AT&T; & ;", "?a=1&copy=2&lt=3 &nosuch; AT&T; & ;"),
        # what no character stands for is never made one
        ("&#55296;&#0;", "\ufffd\ufffd"),
    ],
)
def test_html_entities(text: str, expected: str) -> None:
    assert rewritten(text, kind="html_entities") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Find it?\nOptions:\n(A) 1\n\n(B)\t2\r\nEnd", "Find it?\nOptions:\n(A) 1\n\n(B)\t2\nEnd"),
        (r"第一行\n第二行", "第一行\n第二行"),
        (r"Q:\nWhat", "Q:\nWhat"),
        # commands of TeX, paths of Windows, what is quoted or escaped itself
        (r"\nu \nabla f \times \text{x} \theta_1 \neq 2", r"\nu \nabla f \times \text{x} \theta_1 \neq 2"),
        (r"in C:\new\table.txt and \\server\new", r"in C:\new\table.txt and \\server\new"),
        (r"split at '\n' or `\t`", r"split at '\n' or `\t`"),
        (r"a \\n b", r"a \\n b"),
        (r"\nuance", "\nuance"),
        # where lines are broken it is likelier code; blank lines stand between the fields of a layout
        ('print("a\\nb")\nprint(1)', 'print("a\\nb")\nprint(1)'),
        ("Is it?\\nYes or no\n\nthe input", "Is it?\nYes or no\n\nthe input"),
    ],
)
def test_escapes(text: str, expected: str) -> None:
    assert rewritten(text, kind="escapes") == expected


def test_escapes_beside_line_breaks() -> None:
    assert rewritten("a\nb\\nc", kind="escapes", beside_line_breaks=True) == "a\nb\nc"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Business<|endoftext|>", "Business"),
        ("a </s></s>\n<|im_end|> \n", "a"),
        ("好的。<｜end▁of▁sentence｜>", "好的。"),
        ("a<|endoftext|>b", "a<|endoftext|>b"),
        ("no mark  ", "no mark  "),
        ("<|endoftext|>", ""),
    ],
)
def test_end_marks(text: str, expected: str) -> None:
    assert rewritten(text, kind="end_marks") == expected


def test_end_marks_of_ones_own() -> None:
    assert rewritten("a###END</s>", kind="end_marks", marks=["###END"]) == "a###END</s>"
    assert rewritten("a###END", kind="end_marks", marks=["###END"]) == "a"


def test_placeholders_are_taken_off_below_an_instruction() -> None:
    rule = {"kind": "placeholder", "action": "remove"}
    for empty in ("无输入", "<noinput>", "N/A", "[No Input]", "No-Input.", "（无）"):
        assert ruled(chat(f"Write a poem.\n\n{empty}", "Ok."), rule).row == chat("Write a poem.", "Ok.")
    for kept in (chat("N/A", "Ok."), chat("Write.\n\nNothing at all", "N/A"), chat("a\n\nN/A\n\nb", "c")):
        assert ruled(kept, rule).row == kept


def test_a_pattern_replaces() -> None:
    rule = {"kind": "pattern", "action": "replace", "pattern": r"(?i)\[(\d+)\]|<br ?/?>", "replacement": r"(\1)"}
    assert rewritten("a[1] b<BR/>", **rule) == "a(1) b()"
    assert rewritten("abc", kind="pattern", action="replace", pattern="b", replacement="") == "ac"
    assert rewritten("中文 text 中", kind="pattern", action="replace", pattern=r"\p{Han}+", replacement="") == " text "


def test_rules_act_in_their_order() -> None:
    marks, drops = {"kind": "end_marks"}, {"kind": "placeholder"}
    row = chat("What is it?", "<nooutput><|endoftext|>")
    assert ruled(row, marks, drops).dropped_by == "placeholder"
    assert ruled(row, drops, marks).dropped_by is None
    both = ruled(row, drops, marks)
    assert both.row == chat("What is it?", "<nooutput>")
    assert both.rewritten_by == {"end_marks": "'<nooutput><|endoftext|>' became '<nooutput>'"}


# What drops


def dropped(row: Row, format: str = "chats", **rule: Any) -> bool:
    return ruled(row, rule, format=format).dropped_by is not None


def test_placeholders() -> None:
    for empty in ("<nooutput>", " N/A ", "n/a.", "输入", "[ No Output ]", "None", "<|noinput|>", "Null"):
        assert dropped(chat("What is it?", empty), kind="placeholder"), empty
        assert dropped(chat(empty, "It is a box."), kind="placeholder"), empty
    for kept in ("None of them.", "Na", "The input", "-", "42", "输入法"):
        assert not dropped(chat("What is it?", kept), kind="placeholder"), kept
    assert not dropped(chat("What is it?", "N/A"), kind="placeholder", values=["nothing"])
    assert not dropped(chat("What is it?", "N/A"), kind="placeholder", where=["user"])


def test_answers_that_equal_their_prompt() -> None:
    rule = {"kind": "answer_equals_prompt"}
    assert dropped(chat("制定计划。", "制定计划。"), **rule)
    assert dropped(chat("Make  a plan", "make a plan."), **rule)
    assert dropped(chat("a", "b", "Say it!", "“Say it”"), **rule)
    assert dropped(chat("Shorten this text.\n\nIt is long.", "Shorten this text."), **rule)
    assert not dropped(chat("Shorten this text.\n\nIt is long.", "It is long."), **rule)
    assert not dropped(chat("a", "b", "c", "a"), **rule)
    assert not dropped(chat("1 + 1", "11"), **rule)
    assert not dropped(chat("?", "..."), **rule)


def test_refusals() -> None:
    for text in (
        "As an AI language model, I cannot have opinions.",
        "I\u2019m sorry, but I can\u2019t help with this.",
        "很抱歉，我无法回答这个问题。",
        "作为一个AI语言模型，我没有感情。",
        "Als KI-Sprachmodell habe ich keine Meinung.",
        "Desculpe, mas não posso ajudar.",
    ):
        assert dropped(chat("Why?", text), kind="refusal"), text
        assert not dropped(chat(text, "Ok."), kind="refusal"), text
    for text in (
        "He was an AI modeller, and as an airman he flew.",
        "Sorry, but it can't be helped.",
        "x" * 300 + " As an AI language model",
    ):
        assert not dropped(chat("Why?", text), kind="refusal"), text
    assert dropped(chat("Why?", "Nope, never."), kind="refusal", phrases=["nope"])


def test_patterns_drop_or_are_required() -> None:
    row = chat("What?", "See http://a.b", system="Be brief.")
    assert dropped(row, kind="pattern", pattern="https?://")
    assert dropped(row, kind="pattern", pattern="^Be")
    assert not dropped(row, kind="pattern", pattern="https?://", where=["user", "system"])
    assert not dropped(row, kind="pattern", pattern=r"\?", action="require")
    assert dropped(row, kind="pattern", pattern=r"\?", action="require", where=["assistant"])
    assert dropped({"text": "a", "spans": []}, "spans", kind="pattern", pattern="a")
    question = {"context": "c", "question": "Really?", "answers": []}
    assert dropped(question, "questions", kind="pattern", pattern="Really", where=["question"])
    assert not dropped(question, "questions", kind="pattern", pattern="Really", where=["context"])


def test_no_pattern_takes_long() -> None:
    """Python's `re` would need some 2^100000 steps for the first."""
    begin = time.monotonic()
    for pattern in ("(a+)+$", "(a|aa)+$", "(.*)*x(.*)*y"):
        assert not dropped(chat("What?", "a" * 100_000 + "b"), kind="pattern", pattern=pattern)
    assert time.monotonic() - begin < 10
    spaces = "a" + " " * 300_000 + "b"
    assert rewritten(spaces, kind="end_marks") == spaces
    assert rewritten(f"\\n{spaces}", kind="escapes") == f"\n{spaces}"
    verdict = build_verdict(clean_params("text", rules=[{"kind": "html_entities"}]))
    assert verdict({"text": spaces + "&amp;"})[0].row == {"text": spaces + "&"}
    assert time.monotonic() - begin < 20


def test_scripts() -> None:
    """Of the letters of 'ABC中文字', three of six are Han; digits, marks and letters that many scripts use do not count."""
    share = share_of_scripts(["Han"])
    assert share("ABC中文字 123，𝑥") == 0.5
    assert share("123 + 4") is None
    assert share_of_scripts(["Hiragana", "Katakana", "Han"])("コンピューターを使う") == 1.0
    mixed = chat("ABC", "中文字")
    assert not dropped(mixed, kind="script", scripts=["Han"], min_fraction=0.5)
    assert dropped(mixed, kind="script", scripts=["Han"], min_fraction=0.51)
    assert dropped(mixed, kind="script", scripts=["Han"], min_fraction=0.5, where=["user"])
    assert dropped(mixed, kind="script", scripts=["Latin"], max_fraction=0.4)
    numbers = ruled(chat("1 + 1", "2"), {"kind": "script", "scripts": ["Han"], "min_fraction": 0.5})
    assert (numbers.dropped_by, numbers.not_judged_by) == (None, ["script"])
    # the system's turn is often in another language
    assert not dropped(
        chat("你好", "你好吗", system="Answer in Chinese."), kind="script", scripts=["Han"], min_fraction=1.0
    )


def test_every_script_is_known_to_unicode() -> None:
    for script in SCRIPTS:
        assert share_of_scripts([script])("A") in (0.0, 1.0)
    assert share_of_scripts(["Thai"])("ไทย") == share_of_scripts(["Devanagari"])("हिन्दी") == 1.0


ENGLISH = "The weather is nice today, and we are going to the park with the children."
CHINESE = "今天天气很好，我们和孩子们一起去公园玩，然后在湖边吃午饭。"


def test_languages() -> None:
    """A line is a piece. The English one has 58 letters, the Chinese one 26."""
    share = share_of_languages(["zh"], 20)
    assert share(f"{ENGLISH}\n{CHINESE}") == pytest.approx(26 / 84)
    assert share("太短") is None
    assert dropped(chat(ENGLISH, ENGLISH), kind="language", languages=["zh"], min_fraction=0.5)
    assert not dropped(chat(CHINESE, ENGLISH), kind="language", languages=["zh", "en"], min_fraction=0.9)
    assert dropped(chat(CHINESE, ENGLISH), kind="language", languages=["zh"], min_fraction=0.5, where=["assistant"])
    short = ruled(chat("好", "是"), {"kind": "language", "languages": ["en"], "min_fraction": 0.5})
    assert (short.dropped_by, short.not_judged_by) == (None, ["language"])
    assert list(pieces_of("ab\n\ncd\n12\nefgh\ni", 4)) == ["ab\n\ncd", "12\nefgh\ni"]


def test_the_languages_are_those_of_py3langid() -> None:
    from py3langid import rank

    assert {language for language, _ in rank(ENGLISH)} == set(LANGUAGES)


# Where they look


def test_every_format_and_every_kind_is_in_the_tables() -> None:
    assert PARTS.keys() == FORMATS.keys()
    kinds = {kind_of_rule(model) for model in Rule.__args__}
    assert {kind_of_rule(model) for model in (*JUDGES, *CHANGES)} == kinds
    fields: dict[str, FieldInfo] = NamedRule.model_fields
    assert set(fields) == {"name", "where"}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("chats", {**chat("q", "a", system="s"), "id": "1"}),
        ("prompts", {"prompt": chat("q", "a", "r", system="s")["messages"]}),
        ("preferences", {**pair("q", "c", "d"), "prompt": chat("q", "a", "r", system="s")["messages"], "margin": 1.0}),
        (
            "unpaired_preferences",
            {
                "prompt": chat("q", "a", "r", system="s")["messages"],
                "completion": [{"role": "assistant", "content": "b"}],
                "label": False,
            },
        ),
        (
            "ratings",
            {
                "prompt": chat("q", "a", "r", system="s")["messages"],
                "completion": [{"role": "assistant", "content": "b"}],
                "ratings": {"x": 1},
            },
        ),
        (
            "step_labels",
            {
                "prompt": chat("q", "a", "r", system="s")["messages"],
                "steps": [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
                "labels": [True, None],
            },
        ),
        ("text", {"text": "t"}),
        ("labels", {"text": "t", "label": "text"}),
        ("spans", {"text": "t", "spans": []}),
        ("questions", {"context": "c", "question": "q", "answers": [{"start": 0, "text": "c"}]}),
    ],
)
def test_each_part_of_each_format_is_changed_alone(format: str, row: Row) -> None:
    def marked(part: str) -> list[str]:
        return [said.text for said in texts_said(rewrite_texts(row, {part}, lambda text: f"{text}!"))]

    plain = [said.text for said in texts_said(row)]
    assert plain == FORMATS[format].texts(row)
    for part in PARTS[format]:
        changed = [f"{said.text}!" if said.part == part else said.text for said in texts_said(row)]
        assert marked(part) == changed
        assert changed != plain


def test_what_else_messages_hold_is_left_as_it_is() -> None:
    call = {"type": "function", "function": {"name": "w", "arguments": {"at": "&amp;"}}}
    row = {
        "messages": [
            {"role": "user", "content": "a &amp; b", "name": "&amp;"},
            {"role": "assistant", "content": "", "reasoning_content": "&amp;", "tool_calls": [call], "train": False},
            {"role": "tool", "content": "&amp; \u00e9 ", "tool_call_id": "1"},
            {"role": "assistant", "content": "c &amp; d ", "reasoning_content": "&amp;"},
        ],
        "tools": [{"name": "&amp;"}],
        "columns": {"answer": "&amp;"},
    }
    expected = {**row, "messages": [dict(message) for message in row["messages"]]}
    expected["messages"][0]["content"] = "a & b"
    expected["messages"][3]["content"] = "c & d"
    found, reason = build_verdict(clean_params("chats", rules=[{"kind": "html_entities"}]))(row)
    assert (found.row, reason) == (expected, None)


def test_both_answers_of_a_pair_answer_the_prompt() -> None:
    rule = {"kind": "answer_equals_prompt"}
    assert dropped(pair("Say it.", "say it", "No."), "preferences", **rule)
    assert not dropped(pair("Say it.", "No.", "say it"), "preferences", **rule)
    assert dropped(pair("Say it.", "No.", "say it"), "preferences", **rule, where=["rejected"])


# What is refused


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"kind": "patern"}, "there is no rule 'patern' (Did you mean"),
        ({"pattern": "a"}, "kind: is required"),
        ({"kind": "pattern", "pattern": "(a"}, "is no regular expression of RE2: missing )"),
        ({"kind": "pattern", "pattern": "a(?!b)"}, "no lookaround and no backreferences"),
        ({"kind": "pattern", "pattern": "a*"}, "matches also where nothing stands"),
        ({"kind": "pattern", "pattern": r"\b"}, "matches also where nothing stands"),
        ({"kind": "pattern", "pattern": "a", "action": "replace"}, "replacement: is needed with action: replace"),
        ({"kind": "pattern", "pattern": "a", "replacement": "b"}, "replacement: is for action: replace"),
        (
            {"kind": "pattern", "pattern": "(a)", "action": "replace", "replacement": r"\2"},
            r"names group 2, and the pattern has 1",
        ),
        ({"kind": "pattern", "pattern": "a", "action": "replace", "replacement": r"\n"}, "followed by no digit"),
        ({"kind": "script", "scripts": ["Chinese"], "min_fraction": 0.5}, "there is no script 'Chinese'"),
        ({"kind": "script", "scripts": ["Hann"], "min_fraction": 0.5}, "Did you mean 'Han'"),
        ({"kind": "script", "scripts": ["Han"]}, "keeps every row. Set min_fraction, max_fraction or both"),
        ({"kind": "script", "scripts": ["Han"], "min_fraction": 0.5, "max_fraction": 0.4}, "drops every row"),
        ({"kind": "language", "languages": ["chinese"], "min_fraction": 0.5}, "py3langid knows no 'chinese'"),
        ({"kind": "refusal", "where": ["asistant"]}, "Did you mean 'assistant'"),
        ({"kind": "refusal", "name": "No!"}, "name"),
        ({"kind": "end_marks", "mark": "a"}, "unknown field"),
    ],
)
def test_what_is_no_rule_is_told(rule: Row, told: str) -> None:
    assert told in refused(rule)


def test_rules_are_told_apart_by_name() -> None:
    assert rule_names(rules_of({"kind": "refusal"}, {"kind": "refusal"}, {"kind": "end_marks", "name": "ends"})) == [
        "refusal",
        "refusal_2",
        "ends",
    ]
    assert "2 rules are called 'a'" in refused({"kind": "refusal", "name": "a"}, {"kind": "end_marks", "name": "a"})


SOURCES = {
    "text": "text",
    "chats": "alpaca",
    "prompts": "prompts",
    "preferences": "preference_alpaca",
    "unpaired_preferences": "unpaired_preference",
    "ratings": "rated_answer",
    "step_labels": "stepwise",
    "labels": "label",
    "spans": "spans",
    "questions": "squad",
}


def clean_params(format: str, **params: Any) -> Any:
    source = {"kind": "files", "paths": [str(Path(__file__))], "file_type": "jsonl", "layout": SOURCES[format]}
    return params_of(CleanParams, {"format": format, "source": source, **params}, Path.cwd())


def misplaced(format: str, rule: Row) -> list[str]:
    """What `plan` says."""
    return [str(each) for each in STAGE.check(Forecast(clean_params(format, rules=[rule]), Resources(), {}))]


@pytest.mark.parametrize(
    ("format", "rule", "told"),
    [
        ("spans", {"kind": "html_entities"}, "spans are never rewritten, because their offsets would move"),
        ("questions", {"kind": "end_marks"}, "questions are never rewritten"),
        ("questions", {"kind": "placeholder", "action": "remove"}, "Drop such rows with a rule of kind pattern"),
        ("spans", {"kind": "pattern", "pattern": "a", "action": "replace", "replacement": ""}, "are never rewritten"),
        (
            "text",
            {"kind": "answer_equals_prompt"},
            "It is for chats, preferences, unpaired_preferences, ratings and step_labels: remove it.",
        ),
        ("prompts", {"kind": "answer_equals_prompt"}, "prompts have none"),
        ("prompts", {"kind": "refusal"}, "where: [assistant]"),
        ("unpaired_preferences", {"kind": "refusal"}, "where: [completion]"),
        ("labels", {"kind": "refusal"}, "where: [text]"),
        ("chats", {"kind": "refusal", "where": ["chosen"]}, "chats have no chosen. They have system, user, assistant."),
        ("chats", {"kind": "answer_equals_prompt", "where": ["user"]}, "user are no answers"),
        ("preferences", {"kind": "end_marks", "where": ["chosen"]}, "Name both, chosen and rejected, or neither."),
    ],
)
def test_rules_that_are_not_for_a_format_are_told_when_it_is_planned(format: str, rule: Row, told: str) -> None:
    (found,) = misplaced(format, rule)
    assert found.startswith("params.rules.0")
    assert told in found


@pytest.mark.parametrize(
    ("format", "rule"),
    [
        # what the messages above say to write instead
        ("spans", {"kind": "pattern", "pattern": "&[a-z]+;"}),
        ("prompts", {"kind": "refusal", "where": ["assistant"]}),
        ("unpaired_preferences", {"kind": "refusal", "where": ["completion"]}),
        ("unpaired_preferences", {"kind": "answer_equals_prompt", "where": ["completion"]}),
        ("labels", {"kind": "refusal", "where": ["text"]}),
        ("preferences", {"kind": "end_marks", "where": ["chosen", "rejected"]}),
        ("preferences", {"kind": "html_entities", "where": ["user"]}),
        *((format, {"kind": "placeholder"}) for format in PARTS),
        *((format, {"kind": "script", "scripts": ["Han"], "min_fraction": 0.5}) for format in PARTS),
        *((format, {"kind": "escapes"}) for format in PARTS if FORMATS[format].rewritten),
    ],
)
def test_rules_that_are_for_a_format(format: str, rule: Row) -> None:
    assert misplaced(format, rule) == []
