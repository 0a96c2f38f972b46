"""The stage `clean` with rules: what the ledger, the metrics and the notes say of them, and the recipe that the README shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.settings.yaml_loader import parse_yaml
from stages.data.clean import STAGE
from tests.unit.running_stages import REPO_ROOT, Ran, run_stage

Row = dict[str, Any]

FOUND: list[Row] = [
    {"instruction": "生成两句经理和客户之间的对话。", "input": "无输入", "output": "经理：您好。\n客户：您好。"},
    {
        "instruction": "Rewrite the sentence to provide more clarity and flow.",
        "input": "Making the decision to rent a house was a wise choice",
        "output": "Renting a house was a wise decision to make.",
    },
    {"instruction": "预测某公司的股票价格", "input": "", "output": "<nooutput>"},
    {"instruction": "What label best describes this news article?", "input": "", "output": "Business<|endoftext|>"},
    {
        "instruction": "The edge of a cube is 7a cm. Find its surface?\\nOptions:\\n(A) 24a8\\n(E) 294a2",
        "input": "",
        "output": "6a2 = 294a2 So, the answer is (E).",
    },
    {"instruction": "制定用户界面的设计计划。", "input": "", "output": "制定用户界面的设计计划。"},
    {"instruction": "找到以下单词的同义词：&#39;Tenacious&#39;。", "input": "", "output": "顽强、坚定。"},
]
"""Dirty chats as they are found: each has one thing wrong with it. Two are English among Chinese ones, and so is the second."""


def chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def clean(folder: Path, rows: list[Row], *, format: str = "chats", layout: str = "alpaca", **params: Any) -> Ran:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "found_chats.jsonl").write_text(lines, encoding="utf-8")
    source = {"kind": "files", "paths": ["found_chats.jsonl"], "layout": layout, "max_broken_fraction": 1.0}
    return run_stage(STAGE, {"format": format, "source": source, **params}, folder)


def rules_of_the_readme() -> list[Row]:
    text = (REPO_ROOT / "data_recipes" / "README.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "rules:" in block]
    recipe, problems = parse_yaml(block, "README.md")
    assert problems == []
    rules: list[Row] = recipe["stages"]["chat_rows"]["params"]["rules"]
    return rules


KEPT = [
    chat("生成两句经理和客户之间的对话。", "经理：您好。\n客户：您好。"),
    chat("What label best describes this news article?", "Business"),
    chat(
        "The edge of a cube is 7a cm. Find its surface?\nOptions:\n(A) 24a8\n(E) 294a2",
        "6a2 = 294a2 So, the answer is (E).",
    ),
    chat("找到以下单词的同义词：'Tenacious'。", "顽强、坚定。"),
]


def test_the_recipe_of_the_readme_handles_chats_as_they_are_found(tmp_path: Path) -> None:
    """By script and language the three English ones go; two of those were rewritten before, which counts for kept rows only."""
    ran = clean(tmp_path, FOUND, rules=rules_of_the_readme())
    assert ran.rows() == [KEPT[0], KEPT[3]]
    ledger = ran.json("ledger.json")
    assert {reason: found["count"] for reason, found in ledger["dropped"].items()} == {
        "rule_answer_equals_prompt": 1,
        "rule_placeholder": 1,
        "rule_script": 3,
    }
    assert ledger["dropped"]["rule_placeholder"]["examples"] == [
        "found_chats.jsonl:3: 预测某公司的股票价格\n\n<nooutput>"
    ]
    assert ledger["repaired"] == {"rule_empty_input": 1, "rule_html_entities": 1}
    assert list(ran.result.metrics.items()) == [
        ("rows_read", 7),
        ("rows_kept", 2),
        ("dropped_rule_script", 3),
        ("dropped_rule_answer_equals_prompt", 1),
        ("dropped_rule_placeholder", 1),
        ("repaired_rule_empty_input", 1),
        ("repaired_rule_html_entities", 1),
        ("characters_kept", sum(len("\n\n".join(m["content"] for m in row["messages"])) for row in ran.rows())),
    ]
    assert ran.result.facts.dropped_rows == {
        "rule_answer_equals_prompt": 1,
        "rule_placeholder": 1,
        "rule_script": 3,
    }
    assert "repaired 1: rule_empty_input" in ran.notes
    example = "rule_end_marks rewrote, for example, found_chats.jsonl:4: 'Business<|endoftext|>' became 'Business'"
    assert example in ran.notes
    assert "rules that found nothing to do: refusal, link, language" in ran.notes


def test_without_a_share_each_of_them_is_mended_or_dropped_for_what_is_wrong_with_it(tmp_path: Path) -> None:
    """All but the second, of which only its language is wrong."""
    rules = [rule for rule in rules_of_the_readme() if rule["kind"] not in ("script", "language")]
    ran = clean(tmp_path / "a", FOUND, rules=rules)
    assert [row for row in ran.rows() if row in KEPT] == KEPT
    assert len(ran.rows()) == 5
    assert ran.json("ledger.json")["repaired"] == {
        "rule_empty_input": 1,
        "rule_end_marks": 1,
        "rule_escapes": 1,
        "rule_html_entities": 1,
    }
    without = clean(tmp_path / "b", FOUND)
    assert len(without.rows()) == 7


def test_rows_of_too_few_letters_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "1 + 1", "output": "2"}, {"instruction": "好", "output": "你好"}]
    ran = clean(tmp_path, rows, rules=[{"kind": "script", "scripts": ["Han"], "min_fraction": 0.5}])
    assert len(ran.rows()) == 2
    what = "kept, because they have too few letters for rule_script to judge them"
    assert ran.json("ledger.json")["noticed"] == {what: 1}
    assert f"1 rows: {what}" in ran.notes


def test_what_rules_leave_is_normalized_judged_and_compared(tmp_path: Path) -> None:
    """The second becomes the first; nothing is left of the third, nothing that shows of the fourth; the fifth gets too short."""
    rows = [
        {"text": "one & two"},
        {"text": "one &amp; two &nbsp; </s>"},
        {"text": "</s>"},
        {"text": "&#8203;&#8203;&#8203;&#8203;&#8203;&#8203;"},
        {"text": "&lt;&lt;&lt;"},
    ]
    rules = [{"kind": "end_marks"}, {"kind": "html_entities"}]
    ran = clean(tmp_path, rows, format="text", layout="text", rules=rules, filters={"min_characters": 5})
    assert ran.rows() == [rows[0]]
    assert ran.result.facts.dropped_rows == {"emptied_by_rule": 2, "exact_duplicate": 1, "too_short": 1}
    assert ran.json("ledger.json")["repaired"] == {}


def test_a_pair_whose_answers_become_the_same_is_dropped(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "chosen": "yes", "rejected": "yes<|im_end|>"},
        {"instruction": "b", "chosen": "yes<|im_end|>", "rejected": "no<|im_end|>"},
        {"instruction": "c", "chosen": "yes", "rejected": "yes \r\n"},
    ]
    arguments = {"format": "preferences", "layout": "preference_alpaca"}
    ran = clean(tmp_path, rows, **arguments, rules=[{"kind": "end_marks"}])
    (row,) = ran.rows()
    assert [row[name][0]["content"] for name in ("prompt", "chosen", "rejected")] == ["b", "yes", "no"]
    assert ran.result.facts.dropped_rows == {"identical_pair": 2}


@pytest.mark.parametrize(("format", "layout"), [("spans", "spans"), ("questions", "squad")])
def test_spans_and_questions_are_dropped_by_rule_and_never_rewritten(format: str, layout: str, tmp_path: Path) -> None:
    texts = ["Bo &amp; Al \r\n", "see http://a.b"]
    rows: list[Row] = (
        [{"text": text, "spans": [{"start": 0, "end": 2, "label": "P"}]} for text in texts]
        if format == "spans"
        else [{"id": text[:2], "context": text, "question": "Who?", "answers": []} for text in texts]
    )
    ran = clean(tmp_path, rows, format=format, layout=layout, rules=[{"kind": "pattern", "pattern": "https?://"}])
    assert ran.rows() == rows[:1]
    assert ran.result.facts.dropped_rows == {"rule_pattern": 1}


def test_nothing_left_names_the_rules(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of 7 is left \(rule_pattern 7\)\. .* at the rules and filters"):
        clean(tmp_path, FOUND, rules=[{"kind": "pattern", "pattern": "(?s)."}])


def test_zero_width_text_is_empty(tmp_path: Path) -> None:
    ran = clean(tmp_path, [{"text": "a\u200b"}, {"text": "\u200b\x00"}], format="text", layout="text")
    assert ran.rows() == [{"text": "a\u200b"}]
    assert ran.result.facts.dropped_rows == {"empty_field": 1}
