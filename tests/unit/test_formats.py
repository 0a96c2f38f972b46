"""One golden row per layout, each repair and each reason why a converter drops a row, and the real files as a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import DataError
from pipeline.settings.strict import documentation
from stages.lib.rows.canonical import FORMATS
from stages.lib.sources.conversion import REASONS, REPAIRS, Conversion, Dropped
from stages.lib.sources.layouts import LAYOUTS, convert_record
from stages.lib.sources.layouts_questions import ANSWERABLE, IMPOSSIBLE
from stages.lib.sources.params import LaidOutSource
from tests.unit.running_stages import read_files

Row = dict[str, Any]


def convert(
    layout: str, row: Row, *, columns: dict[str, str] | None = None, carry: Sequence[str] = (), **options: Any
) -> tuple[Any, Counter[str]]:
    """(the row's canonical row, or its reason and detail), and what was repaired."""
    conversion = Conversion(declared=frozenset(columns or {}), **options)
    (found,) = [found for _, found in convert_record(row, LAYOUTS[layout], columns or {}, conversion, carry)]
    return ((found.reason, found.detail) if isinstance(found, Dropped) else found), conversion.repaired


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


def system(content: str, *tools: str) -> Row:
    """A system message, and the names of the tools that it lists."""
    listed = [{"type": "function", "function": {"name": name}} for name in tools]
    return {"role": "system", "content": content, **({"tools": listed} if tools else {})}


def calls(*called: Row, content: str = "") -> Row:
    return {"role": "assistant", "content": content, "tool_calls": list(called)}


def parts(*said: str | Row) -> Row:
    """An assistant's message in parts."""
    return assistant("") | {
        "content": [{"type": "text", **({"text": each} if isinstance(each, str) else each)} for each in said]
    }


def tool(content: str) -> Row:
    return {"role": "tool", "content": content}


GOLDEN: list[tuple[str, str, Row, dict[str, Any], Row]] = [
    ("a text keeps its id", "text", {"id": 7, "text": "abc", "url": "u"}, {}, {"id": "7", "text": "abc"}),
    ("columns rename", "text", {"content": "abc"}, {"columns": {"text": "content"}}, {"text": "abc"}),
    (
        "the input stands below the instruction",
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {},
        {"messages": [user("Add.\n\n1 2"), assistant("3")]},
    ),
    (
        "history comes first, after the system text",
        "alpaca",
        {"system": "Be brief.", "instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        {},
        {"messages": [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    (
        "messages",
        "messages",
        {"messages": [system("s"), user("a"), assistant("b")]},
        {},
        {"messages": [system("s"), user("a"), assistant("b")]},
    ),
    (
        "text parts are joined",
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "c"}], "loss_weight": 1.0},
            ]
        },
        {},
        {"messages": [user("ab"), assistant("c")]},
    ),
    (
        "OpenAI's tool calls: what the assistant says and calls is one turn",
        "messages",
        {
            "messages": [
                user("weather?"),
                {
                    "role": "assistant",
                    "content": "Let me look.",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "w", "arguments": {"at": "a"}}},
                        {"type": "function", "function": {"name": "w", "arguments": {"at": "b"}}},
                    ],
                },
                {"role": "tool", "content": "1"},
                {"role": "tool", "content": "2"},
                assistant("1 and 2"),
            ]
        },
        {},
        {
            "messages": [
                user("weather?"),
                calls(
                    {"name": "w", "arguments": {"at": "a"}},
                    {"name": "w", "arguments": {"at": "b"}},
                    content="Let me look.",
                ),
                tool("1"),
                tool("2"),
                assistant("1 and 2"),
            ]
        },
    ),
    (
        "ShareGPT with tools",
        "sharegpt",
        {
            "system": "Be kind.",
            "tools": '[{"name": "w"}]',
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": '{"name": "w"}'},
                {"from": "observation", "value": '{"rain": true}'},
                {"from": "gpt", "value": "Rain."},
            ],
        },
        {},
        {
            "messages": [
                system("Be kind.", "w"),
                user("weather?"),
                calls({"name": "w", "arguments": {}}),
                tool('{"rain": true}'),
                assistant("Rain."),
            ]
        },
    ),
    (
        "reasoning in a field of its own stays in one, whatever its name",
        "messages",
        {"messages": [user("a"), {**assistant("b"), "thinking": "c\n"}]},
        {},
        {"messages": [user("a"), {**assistant("b"), "reasoning_content": "c"}]},
    ),
    (
        "calls in turns of their own are what the assistant says with them",
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "Let me see."},
                {"from": "function_call", "value": '[{"name": "w", "parameters": {"at": 1}}, {"name": "v"}]'},
                {"from": "observation", "value": [1]},
                {"from": "gpt", "value": "b"},
            ]
        },
        {},
        {
            "messages": [
                user("a"),
                calls({"name": "w", "arguments": {"at": 1}}, {"name": "v", "arguments": {}}, content="Let me see."),
                tool("[1]"),
                assistant("b"),
            ]
        },
    ),
    (
        "a call without a name is text",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "w(1)"}]},
        {},
        {"messages": [user("a"), assistant("<tool_call>\nw(1)\n</tool_call>")]},
    ),
    (
        "what is said after a call leaves that as text",
        "messages",
        {"messages": [user("a"), {"role": "assistant", "content": "b", "tool_calls": [{"name": "w"}]}, assistant("c")]},
        {},
        {"messages": [user("a"), assistant('b\n<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>\nc')]},
    ),
    (
        "an empty list of tools says nothing",
        "sharegpt",
        {"tools": "[]", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {},
        {"messages": [user("a"), assistant("b")]},
    ),
    (
        "a chat that was rated good",
        "rated_chat",
        {"messages": [user("a"), assistant("b")], "label": True},
        {},
        {"messages": [user("a"), assistant("b")]},
    ),
    (
        "a prompt and a completion that was rated good, in a group",
        "rated_chat",
        {"prompt": "a", "completion": "b", "label": 1.0, "conversation": 5},
        {"columns": {"messages": "prompt", "answer": "completion", "group": "conversation"}},
        {"group": "5", "messages": [user("a"), assistant("b")]},
    ),
    (
        "an answer that is not desirable, as texts (TRL)",
        "unpaired_preference",
        {"prompt": "a", "completion": "b", "label": False},
        {},
        {"prompt": [user("a")], "completion": [assistant("b")], "label": False},
    ),
    (
        "a desirable answer after turns",
        "unpaired_preference",
        {
            "prompt": [system("s"), user("a"), {**assistant("b"), "weight": 0}, user("c")],
            "completion": [assistant("d")],
            "label": 1,
        },
        {},
        {"prompt": [system("s"), user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "label": True},
    ),
    (
        "a chat whose last answer is not desirable, in a group",
        "unpaired_preference",
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "kto_tag": "bad", "session": "1"},
        {"columns": {"label": "kto_tag", "group": "session"}},
        {
            "group": "1",
            "prompt": [user("a"), assistant("b"), user("c")],
            "completion": [assistant("d")],
            "label": False,
        },
    ),
    (
        "an instruction with its input, and a desirable answer",
        "unpaired_preference",
        {"instruction": "Add.", "input": "1 2", "history": [["q", "r"]], "output": "3", "label": "true"},
        {"columns": {"completion": "output"}},
        {"prompt": [user("q"), assistant("r"), user("Add.\n\n1 2")], "completion": [assistant("3")], "label": True},
    ),
    (
        "ratings in columns, one of them missing and one a text (HelpSteer)",
        "rated_answer",
        {"prompt": "a", "response": "b", "helpfulness": 4, "correctness": None, "verbosity": "1.5"},
        {"columns": {"completion": "response"}, "rating_columns": ["helpfulness", "correctness", "verbosity"]},
        {
            "prompt": [user("a")],
            "completion": [assistant("b")],
            "ratings": {"helpfulness": 4, "correctness": None, "verbosity": 1.5},
        },
    ),
    (
        "a chat with one rating",
        "rated_answer",
        {"messages": [user("a"), assistant("b")], "score": -2},
        {"columns": {"ratings": "score"}},
        {"prompt": [user("a")], "completion": [assistant("b")], "ratings": {"rating": -2}},
    ),
    (
        "ratings as a mapping (UltraFeedback)",
        "rated_answer",
        {"instruction": "a", "completion": "b", "ratings": {"truth": "N/A", "honesty": 5}},
        {},
        {"prompt": [user("a")], "completion": [assistant("b")], "ratings": {"truth": None, "honesty": 5}},
    ),
    (
        "steps and a label of each (TRL)",
        "stepwise",
        {"prompt": "a", "completions": ["b", "c", "d"], "labels": [True, None, 0]},
        {},
        {
            "prompt": [user("a")],
            "steps": [assistant("b"), assistant("c"), assistant("d")],
            "labels": [True, None, False],
        },
    ),
    (
        "steps with marks behind them",
        "math_shepherd",
        {
            "input": "What is 2 + 3? Step 1: It is 5. \u043a\u0438\nStep 2: The answer is: 6 \u043a\u0438",
            "label": "What is 2 + 3? Step 1: It is 5. +\nStep 2: The answer is: 6 -",
            "task": "GSM8K",
        },
        {},
        {
            "prompt": [user("What is 2 + 3?")],
            "steps": [assistant("Step 1: It is 5."), assistant("Step 2: The answer is: 6")],
            "labels": [True, False],
        },
    ),
    (
        "steps that were chosen, one that a person wrote, and one where nothing was",
        "prm800k",
        {
            "labeler": "l",
            "question": {"problem": "a", "ground_truth_answer": "9"},
            "label": {
                "steps": [
                    {"completions": [{"text": "b", "rating": 1}], "human_completion": None, "chosen_completion": 0},
                    {"completions": [], "human_completion": {"text": "c", "rating": None}, "chosen_completion": None},
                    {"completions": [{"text": "d", "rating": -1}], "human_completion": None, "chosen_completion": None},
                ],
                "finish_reason": "found_error",
            },
        },
        {},
        {
            "prompt": [user("a")],
            "steps": [assistant("b"), assistant("c"), assistant("d")],
            "labels": [True, True, False],
        },
    ),
    (
        "a last question that nobody answers stays",
        "messages",
        {"messages": [user("a"), assistant("b"), user("c")]},
        {},
        {"messages": [user("a"), assistant("b"), user("c")]},
    ),
    (
        "a prompt as turns, and what its answer is compared with (verl)",
        "prompts",
        {"prompt": [system("s"), user("a")], "reward_model": {"style": "rule", "ground_truth": "7"}, "answer": "7"},
        {"carry": ["answer", "reward_model.ground_truth"]},
        {"prompt": [system("s"), user("a")], "columns": {"answer": "7", "reward_model.ground_truth": "7"}},
    ),
    (
        "a prompt as text after system, tools and history",
        "prompts",
        {"question": "c", "system": "s", "tools": [{"name": "w"}], "history": [["a", "b"]]},
        {"columns": {"prompt": "question"}},
        {"prompt": [system("s", "w"), user("a"), assistant("b"), user("c")]},
    ),
    (
        "a prompt as instruction and input",
        "prompts",
        {"instruction": "Add.", "input": "1 2"},
        {},
        {"prompt": [user("Add.\n\n1 2")]},
    ),
    (
        "chosen and rejected win over a single output",
        "preference_alpaca",
        {"instruction": "a", "input": "", "output": "x", "chosen": "b", "rejected": "c"},
        {},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    (
        "output = [better, worse] after history",
        "preference_alpaca",
        {"instruction": "c", "output": ["d", "e"], "history": [["a", "b"]]},
        {},
        {"prompt": [user("a"), assistant("b"), user("c")], "chosen": [assistant("d")], "rejected": [assistant("e")]},
    ),
    (
        "turns, and one answer each",
        "preference_chat",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {},
        {"prompt": [system("s"), user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    (
        "a prompt as text",
        "preference_chat",
        {"question": "a", "chosen": "b", "rejected": "c", "system": "s"},
        {"columns": {"messages": "question"}},
        {"prompt": [system("s"), user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    (
        "two whole conversations: what they have in common is the prompt",
        "preference_chat",
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    (
        "two transcripts",
        "preference_chat",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        {"turns_in_text": "transcript"},
        {"prompt": [user("a"), assistant("b"), user("c")], "chosen": [assistant("d")], "rejected": [assistant("e")]},
    ),
    (
        "answers that are JSON or transcripts are texts",
        "preference_chat",
        {"question": '[{"role": "user"}, 1]', "chosen": '{"a": 1}', "rejected": "Human"},
        {"columns": {"messages": "question"}},
        {
            "prompt": [user('[{"role": "user"}, 1]')],
            "chosen": [assistant('{"a": 1}')],
            "rejected": [assistant("Human")],
        },
    ),
    (
        "turns as JSON, where the source says so",
        "preference_chat",
        {"messages": '[{"role": "user", "content": "a"}]', "chosen": '{"from": "gpt", "value": "b"}', "rejected": "c"},
        {"turns_in_text": "json"},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ),
    (
        "a prompt that stands before whole conversations",
        "preference_chat",
        {
            "prompt": [system("s"), user("a"), assistant("b")],
            "chosen": [user("c"), assistant("d")],
            "rejected": [user("c"), assistant("e")],
        },
        {"columns": {"messages": "prompt"}},
        {
            "prompt": [system("s"), user("a"), assistant("b"), user("c")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
        },
    ),
    (
        "the second of two answers is preferred",
        "preference_between",
        {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 2.0},
        {},
        {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("b")], "margin": 1.0},
    ),
    (
        "the first is preferred a little",
        "preference_between",
        {"instruction": "a", "output_1": "b", "output_2": "c", "preference": "1.4"},
        {},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "margin": 0.2},
    ),
    (
        "the second of two whole conversations is preferred, in a word",
        "preference_between",
        {
            "conversation_a": [user("a"), assistant("b")],
            "conversation_b": [user("a"), assistant("c")],
            "winner": "model_b",
        },
        {"columns": {"output_1": "conversation_a", "output_2": "conversation_b", "preference": "winner"}},
        {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("b")], "margin": 1.0},
    ),
    (
        "the first of two answers after a conversation is preferred, on a scale from -3 to 3",
        "preference_between",
        {
            "context": [user("a"), assistant("b"), user("c")],
            "response1": "d",
            "response2": "e",
            "overall_preference": -1,
        },
        {
            "first_answer": -3,
            "second_answer": 3,
            "columns": {
                "messages": "context",
                "output_1": "response1",
                "output_2": "response2",
                "preference": "overall_preference",
            },
        },
        {
            "prompt": [user("a"), assistant("b"), user("c")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
            "margin": 0.333333,
        },
    ),
    (
        "the first is preferred by a 1, on a scale that goes down",
        "preference_between",
        {
            "instruction": "a",
            "input": "i",
            "output_1": [assistant("b")],
            "output_2": [assistant("c")],
            "preference": "1",
        },
        {"first_answer": 1, "second_answer": 0},
        {"prompt": [user("a\n\ni")], "chosen": [assistant("b")], "rejected": [assistant("c")], "margin": 1.0},
    ),
    (
        "turns that nothing is to be learned from, in all spellings",
        "messages",
        {
            "messages": [
                turn
                for key, no in (
                    ("weight", 0),
                    ("train", False),
                    ("loss", False),
                    ("trainable", False),
                    ("loss_weight", 0.0),
                    ("training", False),
                    ("loss_mask", 0),
                    ("step_loss_mask", 0),
                )
                for turn in (user(key), {**assistant("no"), key: no})
            ]
            + [user("a"), {**assistant("yes"), "weight": 1, "train": True}]
        },
        {},
        {
            "messages": [
                turn
                for key in (
                    "weight",
                    "train",
                    "loss",
                    "trainable",
                    "loss_weight",
                    "training",
                    "loss_mask",
                    "step_loss_mask",
                )
                for turn in (user(key), {**assistant("no"), "train": False})
            ]
            + [user("a"), assistant("yes")]
        },
    ),
    (
        "arguments as JSON text are those that are written as a mapping",
        "messages",
        {
            "functions": [{"name": "w"}],
            "messages": [
                user("weather?"),
                {"role": "assistant", "function_call": {"name": "w", "arguments": '{"at": "a"}'}},
                {"role": "function", "content": "1"},
                assistant("1"),
            ],
        },
        {},
        {
            "messages": [
                system("", "w"),
                user("weather?"),
                calls({"name": "w", "arguments": {"at": "a"}}),
                tool("1"),
                assistant("1"),
            ]
        },
    ),
    (
        "a whole number beside gaps, as pandas writes it",
        "label",
        {"text": "a", "label": 1.0},
        {},
        {"text": "a", "label": "1"},
    ),
    ("a label", "label", {"text": "a", "label": "x"}, {}, {"text": "a", "label": "x"}),
    ("a label that is a number", "label", {"text": "a", "label": 3}, {}, {"text": "a", "label": "3"}),
    (
        "a pair of texts",
        "label",
        {"sentence1": "你吃了吗", "sentence2": "吃了吗", "label": 1},
        {"columns": {"text": "sentence1", "text_pair": "sentence2"}},
        {"text": "你吃了吗", "text_pair": "吃了吗", "label": "1"},
    ),
    (
        "an empty second text that nobody declared is none",
        "label",
        {"text": "a", "text_pair": None, "label": "x"},
        {},
        {"text": "a", "label": "x"},
    ),
    (
        "a pair that is yet to be labelled keeps its group and what is carried",
        "label",
        {"premise": "a", "hypothesis": "b", "label": -1, "number": 7},
        {
            "columns": {"text": "premise", "text_pair": "hypothesis", "group": "premise"},
            "carry": ["number"],
            "unlabelled": True,
        },
        {"group": "a", "text": "a", "text_pair": "b", "label": None, "columns": {"number": 7}},
    ),
    (
        "a question that is yet to be answered",
        "squad",
        {"id": "q1", "context": "c", "question": "q"},
        {"unlabelled": True},
        {"id": "q1", "context": "c", "question": "q", "answers": None},
    ),
    (
        "a labelled text in pieces",
        "label",
        {"data": [{"text": "play "}, {"text": "jazz", "entity": "genre"}], "intent": "Play"},
        {"columns": {"text": "data", "label": "intent"}},
        {"text": "play jazz", "label": "Play"},
    ),
    (
        "a relation: head and tail are marked",
        "relation",
        {
            "tokens": ["Jobs", "founded", "Apple"],
            "head": ["jobs", "Q1", [[0]]],
            "tail": ["apple", "Q2", [[2]]],
            "label": "P1",
        },
        {},
        {"text": "[E1] Jobs [/E1] founded [E2] Apple [/E2]", "label": "P1"},
    ),
    (
        "spans as mappings and as lists",
        "spans",
        {"text": "Ann met Bo", "spans": [{"start": 0, "end": 3, "label": "P"}, [8.0, 10.0, "P"]]},
        {},
        {"text": "Ann met Bo", "spans": [{"start": 0, "end": 3, "label": "P"}, {"start": 8, "end": 10, "label": "P"}]},
    ),
    (
        # "Ann Lee met Bo": Ann Lee is [0, 7), Bo is [12, 14)
        "BIO",
        "bio",
        {"tokens": ["Ann", "Lee", "met", "Bo"], "tags": ["B-P", "I-P", "O", "B-P"]},
        {},
        {
            "text": "Ann Lee met Bo",
            "spans": [{"start": 0, "end": 7, "label": "P"}, {"start": 12, "end": 14, "label": "P"}],
        },
    ),
    (
        "BMEWO, and letters behind labels",
        "bio",
        {"tokens": list("abcde"), "tags": ["X-B", "X-E", "O", "W-Y", "S_name-S"]},
        {"token_separator": ""},
        {
            "text": "abcde",
            "spans": [
                {"start": 0, "end": 2, "label": "X"},
                {"start": 3, "end": 4, "label": "Y"},
                {"start": 4, "end": 5, "label": "name-S"},
            ],
        },
    ),
    (
        "BMES and BILOU",
        "bio",
        {"tokens": list("abcdefg"), "tags": ["B-X", "M-X", "E-X", "S-Y", "B-Z", "L-Z", "U-Z"]},
        {"token_separator": ""},
        {
            "text": "abcdefg",
            "spans": [
                {"start": 0, "end": 3, "label": "X"},
                {"start": 3, "end": 4, "label": "Y"},
                {"start": 4, "end": 6, "label": "Z"},
                {"start": 6, "end": 7, "label": "Z"},
            ],
        },
    ),
    (
        # B- right after I- of the same label begins a new span; S- and E- end one
        "BIOES without separator, segment digits stripped",
        "bio",
        {"tokens": ["a0", "b1", "c0", "d0", "e1"], "tags": ["B-X", "E-X", "S-X", "B-X", "E-X"]},
        {"token_separator": "", "strip_segment_digit": True},
        {
            "text": "abcde",
            "spans": [
                {"start": 0, "end": 2, "label": "X"},
                {"start": 2, "end": 3, "label": "X"},
                {"start": 3, "end": 5, "label": "X"},
            ],
        },
    ),
    (
        "pieces: spaces around an entity are no part of it",
        "pieces",
        {"pieces": [{"text": "to "}, {"text": " Rome ", "entity": "city"}, {"text": "!"}]},
        {},
        {"text": "to  Rome !", "spans": [{"start": 4, "end": 8, "label": "city"}]},
    ),
    (
        "a nested document",
        "squad",
        {
            "data": [
                {
                    "paragraphs": [
                        {
                            "context": "Ann met Bo.",
                            "qas": [{"id": "q1", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 8}]}],
                        }
                    ]
                }
            ]
        },
        {},
        {"id": "q1", "context": "Ann met Bo.", "question": "Who?", "answers": [{"start": 8, "text": "Bo"}]},
    ),
    (
        "the hub's columns",
        "squad",
        {
            "id": "q1",
            "context": "Ann met Bo.",
            "question": "Who?",
            "answers": {"text": ["Ann", "Bo"], "answer_start": [0, 8.0]},
        },
        {},
        {
            "id": "q1",
            "context": "Ann met Bo.",
            "question": "Who?",
            "answers": [{"start": 0, "text": "Ann"}, {"start": 8, "text": "Bo"}],
        },
    ),
    (
        "a question without answer",
        "squad",
        {"id": "q1", "context": "c", "question": "q", "answers": [], "is_impossible": True},
        {},
        {"id": "q1", "context": "c", "question": "q", "answers": []},
    ),
]


@pytest.mark.parametrize(
    ("layout", "row", "how", "expected"), [case[1:] for case in GOLDEN], ids=[c[0] for c in GOLDEN]
)
def test_golden_row(layout: str, row: Row, how: dict[str, Any], expected: Row) -> None:
    assert convert(layout, row, **how) == (expected, Counter())


def test_every_layout_has_a_golden_row() -> None:
    assert {case[1] for case in GOLDEN} == set(LAYOUTS)


DROPPED: list[tuple[str, Row, str, str]] = [
    ("text", {"txt": "a"}, "missing_field", "text"),
    ("text", {"text": None}, "missing_field", "text"),
    ("text", {"text": 5}, "wrong_type", "text is a number, not a text"),
    ("text", {"text": " \n"}, "empty_field", "text"),
    ("text", {"text": "\ud800"}, "not_utf8", ""),
    ("alpaca", {"instruction": "a", "input": "b"}, "missing_field", "output"),
    ("alpaca", {"instruction": "", "input": "", "output": "c"}, "empty_field", "instruction"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "wrong_type", "output is a list, not a text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "bad_history", "a history pair has 1 texts"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q", ""]]}, "bad_history", "a history pair has one empty text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q", 5]]}, "wrong_type", "history holds something else than pairs of texts"),
    ("messages", {"messages": [user("a"), {"role": "narrator", "content": "b"}]}, "unknown_role", "'narrator'"),
    ("messages", {"messages": [user("a"), user("b"), assistant("c")]}, "bad_turn_order", "turn 2 is the user's"),
    ("messages", {"messages": [user("a"), assistant("b"), system("s"), assistant("c")]}, "bad_turn_order", "turn 3 is the system's"),
    ("messages", {"messages": [system("s"), user("a")]}, "no_assistant_turn", ""),
    ("messages", {"messages": [user("a"), {"role": "assistant"}]}, "missing_field", "content"),
    ("messages", {"messages": [user("a"), {"content": "b"}]}, "missing_field", "role"),
    ("messages", {"messages": [user("a"), assistant("")]}, "empty_field", "content"),
    ("messages", {"messages": "hello"}, "wrong_type", "messages is a text, not a list of turns"),
    ("messages", {"messages": []}, "empty_field", "messages"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]}, "not_text", "a part is of type 'image'"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "loss_weight": 0.0}]}, "not_trained_on", ""),
    ("messages", {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}, "partial_weight", "weight is 0.5"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}]}, "partial_weight", "only stretches of its content are to be trained on"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "loss_mask": [0, 1]}]}, "wrong_type", "loss_mask is a list, not a number or truth value"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "train": "no"}]}, "wrong_type", "train is a text, not a number or truth value"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "weight": 1, "train": False}]}, "contradictory", "weight is 1, train is False"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "text": "c"}]}, "contradictory", "content and text"),
    ("messages", {"messages": [user("a"), {**assistant("<think>c</think>b"), "reasoning": "d"}]}, "contradictory", "a turn has its reasoning in a field and within its content"),
    ("messages", {"messages": [user("a"), assistant("b")], "tools": [1], "functions": [2]}, "contradictory", "tools and functions"),
    ("messages", {"messages": [user("a"), assistant("\u200b\u2060 ")]}, "empty_field", "content"),
    ("messages", {"messages": [user("a"), {"role": "assistant", "content": [{"type": "text", "content": "b"}]}]}, "missing_field", "the text of a part of content"),
    ("messages", {"messages": [user("a"), parts("b", {"type": "text", "text": None})]}, "missing_field", "the text of a part of content"),
    ("messages", {"messages": [user("a"), parts({"text": "b", "train": False}, "c")]}, "partial_weight", "some parts of its content are to be trained on, and some are not"),
    ("messages", {"messages": [user("a"), parts({"text": "b", "weight": 0}, {"text": "c", "weight": 1})]}, "partial_weight", "some parts of its content are to be trained on, and some are not"),
    ("messages", {"messages": [user("a"), {**parts({"text": "b", "weight": 0}), "weight": 1}]}, "contradictory", "a turn says of itself and of its parts whether they are to be trained on"),
    ("messages", {"messages": [user("a"), parts({"text": "b", "weight": 0})]}, "not_trained_on", ""),
    ("messages", {"messages": [user("a"), {**assistant("b"), "weight": "0"}]}, "not_trained_on", ""),
    ("messages", {"messages": [user("a"), {**assistant("b"), "from": "human"}]}, "contradictory", "role and from"),
    ("messages", {"messages": [user("a"), {"role": "tool"}, assistant("b")]}, "missing_field", "content"),
    ("messages", {"messages": [user("a"), {**assistant("b"), "tool_calls": "f(1)"}]}, "wrong_type", "tool_calls is a text, not a list"),
    ("rated_chat", {"messages": [user("a"), assistant("b")], "label": False}, "rated_bad", ""),
    ("rated_chat", {"messages": [user("a"), assistant("b")], "label": "False"}, "rated_bad", ""),
    ("rated_chat", {"messages": [user("a"), assistant("b")], "label": "bad"}, "rated_bad", ""),
    ("rated_chat", {"messages": [user("a"), assistant("b")], "label": "so-so"}, "wrong_type", "label is 'so-so', neither true nor false"),
    ("rated_chat", {"messages": [user("a"), assistant("b")]}, "missing_field", "label"),
    ("rated_chat", {"messages": [user("a"), assistant("b")], "label": 0.5}, "wrong_type", "label is 0.5, neither true nor false"),
    ("rated_answer", {"prompt": "a", "completion": "b"}, "missing_field", "ratings (or name their columns in rating_columns)"),
    ("rated_answer", {"prompt": "a", "completion": "b", "ratings": {"x": None, "y": ""}}, "unrated", ""),
    ("rated_answer", {"prompt": "a", "completion": "b", "ratings": "high"}, "wrong_type", "rating is 'high', no rating"),
    ("rated_answer", {"prompt": "a", "completion": "b", "ratings": {"x": True}}, "wrong_type", "x is a truth value, no rating"),
    ("rated_answer", {"prompt": "a", "completion": "b", "ratings": float("inf")}, "wrong_type", "rating is inf, and a rating is from -1e6 to 1e6"),
    ("stepwise", {"prompt": "a", "completions": ["b", "c"], "labels": [True]}, "bad_steps", "2 steps and 1 labels"),
    ("stepwise", {"prompt": "a", "completions": ["b", 5], "labels": [True, True]}, "wrong_type", "a step is a number, not a text"),
    ("stepwise", {"prompt": "a", "completions": ["b", " "], "labels": [True, True]}, "empty_field", "a step"),
    ("stepwise", {"prompt": "a", "completions": ["b"], "labels": [None]}, "unrated", ""),
    ("stepwise", {"prompt": "a", "completions": ["b"], "labels": ["maybe"]}, "wrong_type", "labels is 'maybe', neither true nor false"),
    ("math_shepherd", {"input": "q Step 1: a", "label": "q Step 1: a"}, "bad_steps", "input does not end with the mark \u043a\u0438 of a step"),
    ("math_shepherd", {"input": "q Step 1: a \u043a\u0438", "label": "q Step 1: b +"}, "bad_steps", "label is not what input says, with + or - in the place of each mark"),
    ("math_shepherd", {"input": "Step 1: a \u043a\u0438", "label": "Step 1: a +"}, "bad_steps", "input has no question before Step 1:"),
    ("prm800k", {"question": {"problem": "a"}, "label": {"steps": [{"completions": [{"text": "b"}], "chosen_completion": "0"}]}}, "bad_steps", "a step has no completion that was chosen, and none that was not"),
    ("prm800k", {"question": "a", "label": {}}, "missing_field", "question and label, which are mappings"),
    ("prm800k", {"question": {"problem": "a"}, "label": {"steps": [{"completions": []}]}}, "bad_steps", "a step has no completion that was chosen, and none that was not"),
    ("unpaired_preference", {"prompt": "a", "completion": "b"}, "missing_field", "label"),
    ("unpaired_preference", {"prompt": "a", "completion": "b", "label": 0.5}, "wrong_type", "label is 0.5, neither true nor false"),
    ("unpaired_preference", {"prompt": "a", "label": True}, "missing_field", "completion"),
    ("unpaired_preference", {"completion": "b", "label": True}, "missing_field", "prompt"),
    ("unpaired_preference", {"prompt": "a", "completion": " ", "label": True}, "empty_field", "completion"),
    ("unpaired_preference", {"prompt": "a", "completion": [user("b")], "label": True}, "bad_turn_order", "completion is not one assistant turn"),
    ("unpaired_preference", {"prompt": "a", "completion": [assistant("b"), user("c")], "label": True}, "bad_turn_order", "completion is not one assistant turn"),
    ("unpaired_preference", {"prompt": [user("a"), assistant("b")], "completion": "c", "label": True}, "bad_turn_order", "the prompt does not end with the user's turn"),
    ("unpaired_preference", {"prompt": "a", "instruction": "x", "completion": "c", "label": True}, "contradictory", "prompt and instruction"),
    ("unpaired_preference", {"messages": [user("a"), assistant("b"), user("c")], "label": True}, "bad_turn_order", "the chat does not end with the assistant's turn"),
    ("unpaired_preference", {"messages": [assistant("b")], "label": True}, "no_assistant_turn", ""),
    ("unpaired_preference", {"prompt": "a", "completion": {**assistant("b"), "weight": 0}, "label": True}, "not_trained_on", "an answer of the pair"),
    ("prompts", {"question": "a"}, "missing_field", "prompt"),
    ("prompts", {"prompt": [user("a"), assistant("b")]}, "bad_turn_order", "the prompt does not end with the user's turn"),
    ("prompts", {"prompt": "a", "instruction": "b"}, "contradictory", "prompt and instruction"),
    ("preference_alpaca", {"instruction": "a", "chosen": "b", "rejected": "b"}, "identical_pair", ""),
    ("preference_alpaca", {"instruction": "a", "chosen": "b"}, "missing_field", "rejected"),
    ("preference_alpaca", {"instruction": "a", "output": ["b"]}, "one_answer", ""),
    ("preference_alpaca", {"instruction": "a", "output": ["b", ""]}, "empty_field", "output"),
    ("preference_chat", {"prompt": "a", "chosen": "b"}, "missing_field", "rejected"),
    ("preference_chat", {"chosen": "b", "rejected": "c"}, "missing_field", "messages (if chosen and rejected hold it as a transcript or as JSON, set turns_in_text)"),
    ("preference_chat", {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "pair_differs_early", ""),
    ("preference_chat", {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("x"), user("c"), assistant("d")]}, "several_answers_differ", ""),
    ("preference_chat", {"prompt": [user("x"), assistant("y"), user("a"), assistant("b")], "chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("b"), user("c"), assistant("e")]}, "contradictory", "the end of the prompt is repeated at the beginning of chosen and rejected"),
    ("preference_chat", {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "contradictory", "the prompt is neither what chosen and rejected begin with nor what can stand before them"),
    ("preference_chat", {"prompt": "x", "chosen": {**assistant("b"), "weight": 0}, "rejected": assistant("c")}, "not_trained_on", "an answer of the pair"),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c"}, "missing_field", "preference"),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.5}, "tie", ""),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 3}, "wrong_type", "preference is 3, not a number from 1 to 2 (first_answer and second_answer name other ends)"),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c", "preference": "c"}, "wrong_type", "preference is 'c', not a number from 1 to 2, nor a word as model_a, model_b or tie"),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c", "preference": "Tie (both bad)"}, "tie", ""),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": "c", "preference": " "}, "missing_field", "preference"),
    ("preference_between", {"instruction": "a", "output_1": "b", "output_2": [assistant("c")]}, "missing_field", "preference"),
    ("preference_between", {"instruction": "a", "output_2": [assistant("c")], "preference": "a"}, "missing_field", "output_1"),
    (
        "preference_chat",
        {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "bad_turn_order",
        "the prompt does not end with the user's turn",
    ),
    ("label", {"text": "a", "label": "-"}, "no_label", "label is -, which no_label names"),
    ("label", {"text": "a", "label": -1}, "no_label", "label is -1, which no_label names"),
    ("label", {"text": "a", "label": -1.0}, "no_label", "label is -1, which no_label names"),
    ("relation", {"tokens": ["a", "b"], "head": ["h", "", [[0]]], "tail": ["t", "", [[1]]], "label": -1}, "no_label", "label is -1, which no_label names"),
    ("relation", {"tokens": ["a", "b", "c"], "head": ["h", "", [[0, 2]]], "tail": ["t", "", [[1]]], "label": "P"}, "bad_span", "head has tokens that do not follow each other: [0, 2]"),
    ("relation", {"tokens": ["a", "b"], "head": ["h", "", [[0]]], "tail": ["t", "", [[1, 0]]], "label": "P"}, "bad_span", "tail has tokens that do not follow each other: [1, 0]"),
    ("relation", {"tokens": ["a", "b"], "head": ["h", "", [[0, 10**12]]], "tail": ["t", "", [[1]]], "label": "P"}, "bad_span", "head has tokens that do not follow each other: [0, 1000000000000]"),
    ("label", {"text": "a", "label": 0.5}, "wrong_type", "label is a number, not a text"),
    (
        "relation",
        {"tokens": ["a", "b"], "head": ["h", "", [[0, 1]]], "tail": ["t", "", [[1]]], "label": "P"},
        "overlapping_entities",
        "",
    ),
    ("relation", {"tokens": ["a"], "head": ["h", "", [[1]]], "tail": ["t", "", [[0]]], "label": "P"}, "bad_span", "head"),
    ("spans", {"text": "abc", "spans": [[1, 4, "X"]]}, "bad_span", "[1, 4) of 3 characters"),
    ("spans", {"text": "abc", "spans": [[1, 1, "X"]]}, "bad_span", "[1, 1) of 3 characters"),
    ("spans", {"text": "abc", "spans": [{"start": 0, "end": 1}]}, "missing_field", "spans.label"),
    ("spans", {"text": "abc", "spans": [{"start": 0, "end": 1, "label": "X", "text": "d"}]}, "contradictory", "a span says 'd', which stands nowhere in the text"),
    ("spans", {"text": "abc", "spans": [[0.5, 1, "X"]]}, "wrong_type", "a span's start and end must be whole numbers"),
    ("spans", {"text": "abc", "spans": [["0", 1, "X"]]}, "wrong_type", "a span's start and end must be whole numbers"),
    ("bio", {"tokens": ["a", "b"], "tags": ["O"]}, "bad_tag", "1 tags for 2 tokens"),
    ("bio", {"tokens": ["a"], "tags": ["Q-X"]}, "bad_tag", "'Q-X'"),
    ("bio", {"tokens": ["a", ""], "tags": ["O", "O"]}, "empty_field", "a token of tokens"),
    ("pieces", {"pieces": [{"text": " ", "entity": "x"}]}, "bad_span", "a piece that is a x holds no text"),
    (
        "squad",
        {"context": "abc", "question": "q", "answers": [{"text": "x", "answer_start": 0}]},
        "answer_not_in_context",
        "x",
    ),
    ("squad", {"context": "ab cd ab", "question": "q", "answers": [{"text": "ab", "answer_start": 5}]}, "ambiguous_place", "'ab' stands several times, and not at 5"),
    ("spans", {"text": "ab cd ab", "spans": [{"start": 1, "end": 3, "label": "X", "text": "ab"}]}, "ambiguous_place", "'ab' stands several times, and not at 1"),
    ("squad", {"context": "abc", "question": "q"}, "missing_field", "answers"),
    ("squad", {"context": "abc", "question": "q", "answers": [], "is_impossible": False}, "contradictory", "is_impossible is false, and there is no answer"),
    ("squad", {"context": "abc", "question": " ", "answers": []}, "empty_field", "question"),
    ("squad", {"data": [{"paragraphs": 5}]}, "wrong_type", "paragraphs is a number, not a list"),
    ("squad", {"data": []}, "nothing_in_it", "data"),
    ("squad", {"paragraphs": []}, "nothing_in_it", "paragraphs"),
    ("squad", {"context": "a", "qas": []}, "nothing_in_it", "qas"),
    ("squad", {"context": "a", "qas": None}, "missing_field", "qas"),
    ("squad", {"context": "abc", "question": "q", "answers": [], "is_impossible": 0}, "contradictory", "is_impossible is false, and there is no answer"),
    ("squad", {"context": "abc", "question": "q", "answers": [], "is_impossible": "False"}, "contradictory", "is_impossible is false, and there is no answer"),
    ("squad", {"context": "abc", "question": "q", "answers": [], "is_impossible": "maybe"}, "wrong_type", "is_impossible is 'maybe', neither true nor false"),
    ("squad", {"context": "abc", "question": "q", "answers": [], "is_impossible": 2}, "wrong_type", "is_impossible is 2, neither true nor false"),
    ("squad", {"context": "abc", "question": "q", "answers": {"text": [""], "answer_start": [-1]}}, "empty_field", "text"),
    ("alpaca", {"instruction": "a", "instances": []}, "nothing_in_it", "instances"),
    ("alpaca", {"instruction": "a", "instances": "b"}, "wrong_type", "instances is a text, not a list"),
    ("alpaca", {"instruction": "a", "output": "b", "instances": [{"input": "c", "output": "d"}]}, "contradictory", "instances beside the row's own output"),
    ("alpaca", {"instruction": "a", "output": "b", "instances": [{"input": "c"}]}, "contradictory", "instances beside the row's own output"),
    ("alpaca", {"instruction": "a", "instances": [{"instruction": "c", "output": "d"}]}, "contradictory", "instances beside the row's own instruction"),
    ("alpaca", {"instruction": "a", "input": "b", "instances": [{"input": "", "output": "d"}]}, "contradictory", "instances beside the row's own input"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "row", "reason", "detail"), DROPPED)
def test_reason_for_dropping(layout: str, row: Row, reason: str, detail: str) -> None:
    columns = {"messages": "prompt"} if layout == "preference_chat" and "prompt" in row else None
    assert convert(layout, row, columns=columns) == ((reason, detail), Counter())


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"a": "x", "label": 1}, "missing_field"), ({"a": "x", "b": None, "label": 1}, "missing_field"), ({"a": "x", "b": " ", "label": 1}, "empty_field")],
)  # fmt: skip
def test_where_a_second_text_is_declared_every_row_must_have_one(row: Row, reason: str) -> None:
    """Or a single text would slip in among the pairs."""
    assert convert("label", row, columns={"text": "a", "text_pair": "b"}) == ((reason, "text_pair"), Counter())


def test_a_label_that_is_left_out_is_said() -> None:
    conversion = Conversion(unlabelled=True)
    for row in ({"text": "a", "label": "x"}, {"text": "b"}):
        list(convert_record(row, LAYOUTS["label"], {}, conversion))
    assert conversion.noticed == {"the label is left out, as unlabelled says": 1}
    assert "unlabelled" in LAYOUTS["squad"].options


def test_every_reason_of_a_converter_has_a_row() -> None:
    """The reasons that come before `missing_field` in the table are the readers', and have their tests there."""
    names = list(REASONS)
    of_converters = set(names[names.index("missing_field") :])
    assert of_converters <= {case[2] for case in DROPPED}


def chosen_step(*ratings: int, chosen: int) -> Row:
    completions = [{"text": f"step {rating}", "rating": rating} for rating in ratings]
    return {
        "question": {"problem": "a"},
        "label": {"steps": [{"completions": completions, "chosen_completion": chosen}]},
    }


REPAIRED: list[tuple[str, Row, str, int, Row]] = [
    (
        "prm800k",
        chosen_step(-1, 1, chosen=1),
        "steps_not_chosen_left_out",
        1,
        {"prompt": [user("a")], "steps": [assistant("step 1")], "labels": [True]},
    ),
    (
        "prm800k",
        chosen_step(0, chosen=0),
        "neutral_steps_called_right",
        1,
        {"prompt": [user("a")], "steps": [assistant("step 0")], "labels": [True]},
    ),
    (
        "messages",
        {"messages": [system("\u200b"), user("a"), assistant("b")]},
        "empty_system_turn",
        1,
        {"messages": [user("a"), assistant("b")]},
    ),
    (
        # a browser counts the emoji as two: Tom stands at 7; and an end that is inclusive
        "spans",
        {
            "text": "Hi 😀😀 Tom",
            "spans": [
                {"start": 8, "end": 11, "label": "P", "text": "Tom"},
                {"start": 0, "end": 1, "label": "X", "text": "Hi"},
            ],
        },
        "span_moved",
        2,
        {"text": "Hi 😀😀 Tom", "spans": [{"start": 6, "end": 9, "label": "P"}, {"start": 0, "end": 2, "label": "X"}]},
    ),
    (
        "squad",
        {
            "id": "q",
            "context": "ab",
            "question": "q",
            "is_impossible": True,
            "answers": [{"text": "ab", "answer_start": 0}],
        },
        "plausible_answers_left_out",
        1,
        {"id": "q", "context": "ab", "question": "q", "answers": []},
    ),
    (
        "alpaca",
        {"instruction": "c", "output": "d", "history": [["", ""], ["a", "b"], [" ", "\n"]]},
        "empty_history_pair",
        2,
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    (
        "messages",
        {"messages": [assistant("Hi."), user("a"), assistant("b")]},
        "opening_assistant_turn",
        1,
        {"messages": [user("a"), assistant("b")]},
    ),
    (
        "preference_alpaca",
        {"instruction": "a", "output": ["b", "c", "d", "e"]},
        "answers_between_best_and_worst",
        2,
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("e")]},
    ),
    (
        "bio",
        {"tokens": ["a", "b", "c", "d", "e"], "tags": ["B-X", "O", "B-X", "I-X", "S-Y"]},
        "begin_without_end",
        2,
        {
            "text": "a b c d e",
            "spans": [
                {"start": 0, "end": 1, "label": "X"},
                {"start": 4, "end": 7, "label": "X"},
                {"start": 8, "end": 9, "label": "Y"},
            ],
        },
    ),
    (
        "bio",
        {"tokens": ["a", "b", "c"], "tags": ["I-X", "I-Y", "I-Y"]},
        "inside_without_begin",
        2,
        {"text": "a b c", "spans": [{"start": 0, "end": 1, "label": "X"}, {"start": 2, "end": 5, "label": "Y"}]},
    ),
    (
        "squad",
        {"id": "q", "context": "ab cd ab", "question": "q", "answers": [{"text": "cd", "answer_start": 5}]},
        "answer_moved",
        1,
        {"id": "q", "context": "ab cd ab", "question": "q", "answers": [{"start": 3, "text": "cd"}]},
    ),
    (
        # "ab" stands at 0 and 4; each emoji before it is two units of UTF-16, so 6 is the second one, and no place in bytes
        "squad",
        {"id": "q", "context": "ab😀😀ab", "question": "q", "answers": [{"text": "ab", "answer_start": 6}]},
        "offset_in_utf16",
        1,
        {"id": "q", "context": "ab😀😀ab", "question": "q", "answers": [{"start": 4, "text": "ab"}]},
    ),
    (
        # the second one: four characters of three bytes each before it
        "squad",
        {
            "id": "q",
            "context": "巴黎。很巴黎。巴黎",
            "question": "q",
            "answers": [{"text": "巴黎", "answer_start": 12}],
        },
        "offset_in_utf8",
        1,
        {"id": "q", "context": "巴黎。很巴黎。巴黎", "question": "q", "answers": [{"start": 4, "text": "巴黎"}]},
    ),
    (
        # of two references the one of which nobody knows where it stands
        "squad",
        {
            "id": "q",
            "context": "ab cd ab",
            "question": "q",
            "answers": [{"text": "ab", "answer_start": 5}, {"text": "cd", "answer_start": 3}],
        },
        "reference_left_out",
        1,
        {"id": "q", "context": "ab cd ab", "question": "q", "answers": [{"start": 3, "text": "cd"}]},
    ),
    (
        "squad",
        {
            "id": "q",
            "context": "ab",
            "question": "q",
            "answers": [{"text": "ab", "answer_start": 0}, {"text": "A.B.", "answer_start": 0}],
        },
        "reference_left_out",
        1,
        {"id": "q", "context": "ab", "question": "q", "answers": [{"start": 0, "text": "ab"}]},
    ),
]


@pytest.mark.parametrize(("layout", "row", "name", "count", "expected"), REPAIRED)
def test_repair_is_counted(layout: str, row: Row, name: str, count: int, expected: Row) -> None:
    assert convert(layout, row) == (expected, Counter({name: count}))


def test_every_repair_has_a_row() -> None:
    assert {case[2] for case in REPAIRED} == set(REPAIRS)


def test_repairs_of_a_row_that_is_dropped_do_not_count() -> None:
    row = {"instruction": "c", "output": "", "history": [["", ""]]}
    assert convert("alpaca", row) == (("empty_field", "output"), Counter())


def test_one_bad_question_spoils_no_other() -> None:
    paragraph = {
        "context": "Ann met Bo.",
        "qas": [
            {"id": "1", "question": "Who?", "answers": [{"text": "Cy", "answer_start": 0}]},
            {"id": "2", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 8}]},
        ],
    }
    found = [row for _, row in convert_record(paragraph, LAYOUTS["squad"], {}, Conversion())]
    assert [row.reason if isinstance(row, Dropped) else row["id"] for row in found] == ["answer_not_in_context", "2"]


def test_a_question_without_id_gets_one_by_its_content() -> None:
    row = {"context": "c", "question": "q", "answers": []}
    first, _ = convert("squad", row)
    again, _ = convert("squad", row)
    other, _ = convert("squad", {**row, "question": "r"})
    assert first["id"] == again["id"] != other["id"]


# Columns that are carried along

CARRIED: list[tuple[str, Row, dict[str, Any], Row]] = [
    (
        "text",
        {"text": "a", "answer": " 72 ", "level": 3, "score": 0.5, "good": False, "url": "u"},
        {"carry": ["answer", "level", "score", "good"]},
        {"text": "a", "columns": {"answer": " 72 ", "level": 3, "score": 0.5, "good": False}},
    ),
    ("text", {"text": "a", "answer": ""}, {"carry": ["answer"]}, {"text": "a", "columns": {"answer": ""}}),
    # a column that is also read, by its name in the data
    (
        "alpaca",
        {"question": "6 * 12?", "answer": "#### 72"},
        {"columns": {"instruction": "question", "output": "answer"}, "carry": ["answer"]},
        {"messages": [user("6 * 12?"), assistant("#### 72")], "columns": {"answer": "#### 72"}},
    ),
    # a name that means something else once columns are renamed: the data's `output` is carried, not what is read as output
    (
        "alpaca",
        {"id": "7", "instruction": "a", "response": "b", "output": "c"},
        {"columns": {"output": "response"}, "carry": ["output"]},
        {"id": "7", "messages": [user("a"), assistant("b")], "columns": {"output": "c"}},
    ),
    # a document that is split gives each of its rows its own columns and those of the document
    (
        "squad",
        {"title": "T", "qas": [{"id": "1", "question": "q", "answers": [], "level": 2}], "context": "c"},
        {"carry": ["title", "level"]},
        {"id": "1", "context": "c", "question": "q", "answers": [], "columns": {"title": "T", "level": 2}},
    ),
]


@pytest.mark.parametrize(("layout", "row", "how", "expected"), CARRIED)
def test_carried_columns_stay_as_they_are(layout: str, row: Row, how: dict[str, Any], expected: Row) -> None:
    found, _ = convert(layout, row, **how)
    assert found == expected
    carried = found["columns"]
    assert list(carried) == how["carry"]
    assert {name: type(value) for name, value in carried.items()} == {
        name: type(value) for name, value in expected["columns"].items()
    }


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (None, "missing_field", "answer, which carry names"),
        (["72"], "wrong_type", "answer is a list, which cannot be carried"),
        ({"value": 72}, "wrong_type", "answer is a mapping, which cannot be carried"),
        (float("nan"), "wrong_type", "answer is nan, which cannot be carried"),
        (float("-inf"), "wrong_type", "answer is -inf, which cannot be carried"),
        (date(2026, 1, 1), "wrong_type", "answer is date, which cannot be carried"),
        ("\ud800", "not_utf8", ""),
    ],
)
def test_a_row_without_what_it_should_carry_is_dropped(value: Any, reason: str, detail: str) -> None:
    assert convert("text", {"text": "a", "answer": value}, carry=["answer"]) == ((reason, detail), Counter())


def test_a_row_that_lacks_a_carried_column_is_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "answer": 1}\n{"text": "b"}\n', encoding="utf-8")
    rows, ledger = read_files(tmp_path, paths=["a.jsonl"], layout="text", carry=["answer"], max_broken_fraction=0.5)
    assert rows == [{"text": "a", "columns": {"answer": 1}}]
    assert ledger.dropped == {"missing_field": 1}
    assert ledger.examples["missing_field"] == ["a.jsonl:2: answer, which carry names: {'text': 'b'}"]


# The real files. Row counts are those of the data's README and of the repositories that publish them. The others were
# counted with a few lines of json and re: 200 references of CMRC's dev file and 5 of its trial file do not stand at their
# offset; 341 rows of the ranked answers have more than two, 443 too many in all; 4 transcripts end with an empty turn.

REAL: list[tuple[str, dict[str, Any], int, dict[str, int], dict[str, int]]] = [
    ("text/litbank_20_novels.jsonl.gz", {"layout": "text"}, 20, {}, {}),
    ("text/tang_poems_zh.jsonl.gz", {"layout": "text"}, 12_003, {}, {}),
    ("text/tinyshakespeare.txt", {"layout": "text", "split_text": "paragraph"}, 7_222, {}, {}),
    ("fixtures/c4_demo.jsonl", {"layout": "text"}, 300, {}, {}),
    ("chat/instruction_1100.json", {"layout": "alpaca"}, 1_100, {}, {}),
    ("chat/oasst_zh_history.json", {"layout": "alpaca"}, 689, {}, {}),
    (
        "chat/gsm8k_test.jsonl",
        {"layout": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        1_319,
        {},
        {},
    ),
    ("fixtures/identity.json", {"layout": "alpaca"}, 91, {}, {}),
    ("fixtures/alpaca_en_demo.json", {"layout": "alpaca"}, 999, {}, {}),
    ("fixtures/alpaca_zh_demo.json", {"layout": "alpaca"}, 1_000, {}, {}),
    ("fixtures/glaive_toolcall_en_demo.json", {"layout": "sharegpt"}, 300, {}, {}),
    ("fixtures/glaive_toolcall_zh_demo.json", {"layout": "sharegpt"}, 300, {}, {}),
    ("fixtures/v1_sft_demo.jsonl", {"layout": "messages"}, 500, {}, {}),
    ("fixtures/kto_en_demo.json", {"layout": "rated_chat"}, 150, {"rated_bad": 150}, {}),
    ("fixtures/kto_en_demo.json", {"layout": "unpaired_preference"}, 300, {}, {}),
    (
        "preferences/taskmaster4_rewards.jsonl.gz",
        {
            "layout": "rated_chat",
            "columns": {"messages": "context", "answer": "generation", "label": "reward", "group": "conversation_id"},
            "turns_in_text": "json",
        },
        2_775,
        {"rated_bad": 453},
        {"opening_assistant_turn": 2_765},
    ),
    ("preferences/polite_rude_1100.json", {"layout": "preference_alpaca"}, 1_094, {"identical_pair": 6}, {}),
    (
        "preferences/oasst_zh_history.json",
        {"layout": "preference_alpaca"},
        772,
        {"identical_pair": 3},
        {"answers_between_best_and_worst": 443},
    ),
    (
        "preferences/hh_harmless_test.jsonl.gz",
        {"layout": "preference_chat", "turns_in_text": "transcript"},
        2_299,
        {"bad_turn_order": 9, "empty_field": 4},
        {},
    ),
    ("fixtures/dpo_en_demo.json", {"layout": "preference_chat"}, 299, {}, {}),
    ("fixtures/dpo_zh_demo.json", {"layout": "preference_chat"}, 300, {}, {}),
    ("encoder/banking77_train.csv", {"layout": "label", "columns": {"label": "category"}}, 10_003, {}, {}),
    (
        "encoder/clinc150.json",
        {"layout": "label", "records": "test", "columns": {"text": "0", "label": "1"}},
        4_500,
        {},
        {},
    ),
    (
        "encoder/fewrel_val_wiki.json",
        {"layout": "relation", "records": "*", "columns": {"head": "h", "tail": "t", "label": "key"}},
        11_200,
        {},
        {},
    ),
    ("encoder/snips_test.jsonl.gz", {"layout": "label", "columns": {"text": "data", "label": "intent"}}, 700, {}, {}),
    ("encoder/snips_test.jsonl.gz", {"layout": "pieces", "columns": {"pieces": "data"}}, 700, {}, {}),
    ("encoder/wnut17_train.conll", {"layout": "bio"}, 3_394, {}, {}),
    (
        "encoder/weibo_ner_dev.conll",
        {"layout": "bio", "token_separator": "", "strip_segment_digit": True},
        270,
        {},
        {},
    ),
    ("encoder/cmrc2018_dev.json", {"layout": "squad"}, 3_219, {}, {"reference_left_out": 193, "answer_moved": 7}),
    ("encoder/cmrc2018_trial.json", {"layout": "squad"}, 1_000, {"empty_field": 2}, {"answer_moved": 5}),
    ("encoder/xquad_zh.json", {"layout": "squad"}, 1_190, {}, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("format", sorted({LAYOUTS[how["layout"]].format for _, how, *_ in REAL}))
def test_real_files(format: str, shared_data: Path, tmp_path: Path) -> None:
    """Of one format, each in its layout."""
    files = [case for case in REAL if LAYOUTS[case[1]["layout"]].format == format]
    for name, how, kept, dropped, repaired in files:
        rows, ledger = read_files(tmp_path, paths=[str(shared_data / name)], **how)
        assert (name, len(rows), dict(ledger.dropped), dict(ledger.repaired)) == (name, kept, dropped, repaired)
        assert ledger.read == kept + sum(dropped.values())
        assert all(text.strip() for row in rows for text in FORMATS[format].texts(row))
        if format == "questions":
            places = [(row["context"], answer) for row in rows for answer in row["answers"]]
            assert all(c[a["start"] : a["start"] + len(a["text"])] == a["text"] for c, a in places)


def test_first_rows_of_real_files(shared_data: Path, tmp_path: Path) -> None:
    """Compared with what stands in the files, read here by eye."""

    def first(name: str, **how: Any) -> Row:
        return read_files(tmp_path, paths=[str(shared_data / name)], **how)[0][0]

    weibo = first("encoder/weibo_ner_test.conll", layout="bio", token_separator="", strip_segment_digit=True)
    assert weibo == {
        "text": "一节课的时间真心感动了李开复感动",
        "spans": [{"start": 11, "end": 14, "label": "PER.NAM"}],
    }
    wnut = read_files(tmp_path, paths=[str(shared_data / "encoder/wnut17_dev.conll")], layout="bio")[0][1]
    assert wnut["text"][wnut["spans"][0]["start"] : wnut["spans"][0]["end"]] == "Redondo Beach Blvd"
    snips = first("encoder/snips_test.jsonl.gz", layout="pieces", columns={"pieces": "data"})
    assert snips == {
        "text": "I'd like to have this track onto my Classical Relaxations playlist.",
        "spans": [
            {"start": 22, "end": 27, "label": "music_item"},
            {"start": 33, "end": 35, "label": "playlist_owner"},
            {"start": 36, "end": 57, "label": "playlist"},
        ],
    }
    tools = first("fixtures/glaive_toolcall_zh_demo.json", layout="sharegpt")
    asked, called, returned = tools["messages"][1:4]
    assert (asked["role"], called["role"], returned["role"]) == ("user", "assistant", "tool")
    assert called["tool_calls"][0]["name"] == "generate_invoice"
    assert tools["messages"][0]["tools"][0]["function"]["name"] == "generate_invoice"
    banking = first("encoder/banking77_train.csv", layout="label", columns={"label": "category"})
    assert banking == {"text": "I am still waiting on my card?", "label": "card_arrival"}
    history = read_files(tmp_path, paths=[str(shared_data / "chat/oasst_zh_history.json")], layout="alpaca")[0]
    raw = json.loads((shared_data / "chat/oasst_zh_history.json").read_bytes())
    longest = max(range(len(raw)), key=lambda index: len(raw[index]["history"]))
    assert [m["content"] for m in history[longest]["messages"][:4]] == [
        text for pair in raw[longest]["history"] for text in pair
    ]


def test_the_documentation_of_layout_names_every_layout() -> None:
    """`slipway stages clean` prints it, and a recipe's author finds the layouts there."""
    documented = documentation(LaidOutSource)["layout"]
    named = documented.partition(": ")[2].partition(".")[0].replace(" or ", ", ").split(", ")
    assert sorted(named) == sorted(LAYOUTS)


def test_self_instruct_instances_share_their_instruction() -> None:
    record = {
        "instruction": "Add.",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
        "id": "s",
    }
    found = [row for _, row in convert_record(record, LAYOUTS["alpaca"], {}, Conversion())]
    assert found == [
        {"id": "s", "messages": [user("Add.\n\n1 2"), assistant("3")]},
        {"id": "s", "messages": [user("Add.\n\n2 2"), assistant("4")]},
    ]
    ((_, dropped),) = convert_record({"instruction": "a", "instances": [1]}, LAYOUTS["alpaca"], {}, Conversion())
    assert isinstance(dropped, Dropped) and dropped.detail == "instances holds a number, not a mapping"


def test_what_nobody_reads_is_counted_by_name() -> None:
    conversion = Conversion()
    rows: list[Row] = [
        {"messages": [{**user("a"), "name": "Bo"}, assistant("b")], "score": 3, "empty": None, "kept": "x"},
        {"messages": [user("a"), {**assistant("b"), "name": "Al"}], "score": 4, "kept": "x"},
        {"messages": [user("a")], "score": 5, "kept": "x"},
    ]
    for row in rows:
        list(convert_record(row, LAYOUTS["messages"], {}, conversion, ["kept"]))
    assert conversion.noticed == {"column 'score' is not read": 2, "turns have 'name', which is not read": 2}


def test_a_column_that_a_renamed_one_hides_is_counted_too() -> None:
    conversion = Conversion()
    row = {"text": "a", "content": "b", "id": "1"}
    list(convert_record(row, LAYOUTS["text"], {"text": "content"}, conversion))
    assert conversion.noticed == {"column 'text' is not read": 1}
    list(convert_record(row, LAYOUTS["text"], {"text": "content"}, conversion, ["text"]))
    assert conversion.noticed == {"column 'text' is not read": 1}


def test_texts_that_look_like_turns_are_said() -> None:
    conversion = Conversion()
    row = {"prompt": "a", "chosen": '{"role": "assistant", "content": "b"}', "rejected": "\n\nHuman: a\n\nAssistant: c"}
    ((_, found),) = convert_record(row, LAYOUTS["preference_chat"], {}, conversion)
    assert isinstance(found, dict) and found["chosen"] == [assistant(row["chosen"])]
    assert conversion.noticed == {"a text that looks like turns was taken as it stands: see turns_in_text": 1}


@pytest.mark.parametrize("repeated", ["chosen", "rejected"])
def test_a_conversation_of_the_pair_under_messages_is_no_prompt(repeated: str) -> None:
    """As a widely used set of pairs repeats it: taken for a prompt, the answer would stand before the question."""
    pair = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    found, _ = convert("preference_chat", {"prompt": "a", **pair, "messages": pair[repeated]})
    assert found == {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}


# Calls of tools, what answers them, and what is said of them twice.


def called(identifier: str | None, name: str, **arguments: Any) -> Row:
    """A call as OpenAI writes it."""
    function = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return function if identifier is None else {"id": identifier, **function}


def answered(content: str, **more: str) -> Row:
    return {"role": "tool", "content": content, **more}


TWO_CALLS = {"role": "assistant", "content": None, "tool_calls": [called("1", "alpha", x=1), called("2", "beta")]}


def test_answers_stand_in_the_order_of_the_calls_that_they_are_of() -> None:
    turns = [user("a"), TWO_CALLS, answered("B", tool_call_id="2"), answered("A", tool_call_id="1"), assistant("c")]
    row, _ = convert("messages", {"messages": turns})
    asked = calls({"name": "alpha", "arguments": {"x": 1}}, {"name": "beta", "arguments": {}})
    assert row == {"messages": [user("a"), asked, tool("A"), tool("B"), assistant("c")]}


ODD_CALLS: list[tuple[str, list[Row], str]] = [
    ("an identifier of no call", [TWO_CALLS, answered("B", tool_call_id="3")], "tool_call_id is that of no call, or of one that is answered already"),
    ("one call answered twice", [TWO_CALLS, answered("B", tool_call_id="1"), answered("B", tool_call_id="1")], "tool_call_id is that of no call, or of one that is answered already"),
    ("more answers than calls", [calls(called(None, "f")), answered("1"), answered("2")], "2 turns of tools follow upon 1 calls"),
    ("another tool's name", [calls(called(None, "f")), answered("1", name="g")], "a tool named g answers a call of f"),
    ("calls in two places", [{**calls(called(None, "f")), "function_call": {"name": "g"}}, answered("1")], "tool_calls and function_call"),
    ("arguments in two places", [calls({"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}), answered("1")], "a call has two arguments that differ"),
    ("arguments beside the function", [calls({"function": {"name": "f", "arguments": {"a": 1}}, "arguments": {"a": 2}}), answered("1")], "a call has two arguments that differ"),
    ("names beside the function", [calls({"function": {"name": "f"}, "name": "g"}), answered("1")], "a call has two names that differ"),
    ("one identifier for two calls", [calls(called("0", "f"), called("0", "g")), answered("1", tool_call_id="0")], "several calls have the identifier 0"),
    ("one identifier for all", [calls(called("0", "f"), called("0", "g")), answered("1", tool_call_id="0"), answered("2", tool_call_id="0")], "tool_call_id is that of no call, or of one that is answered already"),
    ("identifiers of answers alone", [calls(called(None, "f"), called(None, "f")), answered("2", tool_call_id="2"), answered("1", tool_call_id="1")], "tool_call_id is that of no call, or of one that is answered already"),
    ("two identifiers of an answer", [TWO_CALLS, answered("1", tool_call_id="1", call_id="2")], "tool_call_id and call_id"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "detail"), [case[1:] for case in ODD_CALLS], ids=[case[0] for case in ODD_CALLS])
def test_calls_and_answers_that_contradict_each_other(turns: list[Row], detail: str) -> None:
    found, _ = convert("messages", {"messages": [user("a"), *turns, assistant("c")]})
    assert found == ("contradictory", detail)


def paired_in(*turns: Row) -> tuple[list[str], list[str], Counter[str]]:
    """(the arguments x of the calls, what tools return, what was noticed), of a chat with these turns."""
    conversion = Conversion()
    ((_, row),) = convert_record({"messages": [user("a"), *turns, assistant("c")]}, LAYOUTS["messages"], {}, conversion)
    assert isinstance(row, dict), row
    asked = [call["arguments"]["x"] for call in row["messages"][1]["tool_calls"]]
    return asked, [turn["content"] for turn in row["messages"] if turn["role"] == "tool"], conversion.noticed


def test_what_tools_return_stands_in_the_place_of_its_call() -> None:
    """Templates pair by position: the first answer is told as that of the first call."""
    three = calls(*(called(str(x), "f", x=x) for x in (1, 2, 3)))
    unanswered = {
        "calls of tools that nothing answers": 1,
        "calls of tools that nothing answers were put behind those that are answered": 1,
    }
    assert paired_in(three, answered("two", tool_call_id="2")) == ([2, 1, 3], ["two"], unanswered)
    both = answered("three", tool_call_id="3"), answered("two", tool_call_id="2")
    assert paired_in(three, *both) == ([2, 3, 1], ["two", "three"], unanswered)
    by_order = {"answers of tools that do not say which call they answer were taken in the order of the calls": 1}
    some = answered("three", tool_call_id="3"), answered("one"), answered("two")
    assert paired_in(three, *some) == ([1, 2, 3], ["one", "two", "three"], by_order)
    assert paired_in(three, *map(answered, ("one", "two", "three"))) == ([1, 2, 3], ["one", "two", "three"], by_order)
    newer = calls(*({"call_id": f"c{x}", "id": f"i{x}", "name": "f", "arguments": {"x": x}} for x in (1, 2)))
    assert paired_in(newer, answered("two", call_id="c2"), answered("one", call_id="c1")) == (
        [1, 2],
        ["one", "two"],
        {},
    )
    alone = calls(called(None, "f", x=1))
    assert paired_in(alone, answered("", tool_call_id="7")) == ([1], [""], {})
    assert paired_in(alone, {"role": "tool", "content": None}) == ([1], [""], {})


def test_nothing_of_calls_is_lost_on_the_way() -> None:
    def first(turn: Row) -> Any:
        row, _ = convert("messages", {"messages": [user("a"), turn, answered("1"), assistant("c")]})
        return row["messages"][1]

    said = {"role": "assistant", "content": "Let me see."}
    call = {"name": "f", "arguments": {"a": 1}}
    assert first({**said, "tool_calls": [], "function_call": call}) == calls(call, content="Let me see.")
    assert first({**said, "tool_calls": [call], "function_call": call}) == calls(call, content="Let me see.")
    numbered = called("1", "f", a=1)
    assert first({**said, "tool_calls": [numbered], "function_call": call}) == calls(call, content="Let me see.")
    for spelled in (
        {"name": "f", "arguments": None, "parameters": {"a": 1}},
        {"name": "f", "arguments": json.dumps(json.dumps({"a": 1}))},
        {"name": "f", "parameters": '{"a": 1}'},
        {"type": "function", "function": {"name": "f"}, "arguments": {"a": 1}},
        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}, "arguments": {"a": 1}},
        {"type": "function", "function": "f", "arguments": {"a": 1}},
        {"function": {"arguments": {"a": 1}}, "name": "f"},
    ):
        assert first({**said, "tool_calls": [spelled]}) == calls(call, content="Let me see.")
        assert first({**said, "tool_calls": json.dumps([spelled])}) == calls(call, content="Let me see.")
    assert first({**said, "function_call": json.dumps(call)}) == calls(call, content="Let me see.")
    assert first({**said, "tool_calls": ""}) == said
    twice = [
        {"role": "assistant", "content": None, "reasoning_content": "R1", "tool_calls": [call]},
        {"role": "assistant", "content": None, "reasoning_content": "R2", "tool_calls": [call]},
    ]
    row, _ = convert("messages", {"messages": [user("a"), *twice, answered("1"), answered("2"), assistant("c")]})
    assert row["messages"][1] == {**calls(call, call), "reasoning_content": "R1\n\nR2"}


@pytest.mark.parametrize(
    ("layout", "row", "noticed"),
    [
        ("messages", {"messages": [{**user("a"), "reasoning": "r"}, assistant("b")]}, "turns have 'reasoning', which is not read"),
        ("messages", {"messages": [{**user("a"), "tool_calls": [{"name": "f"}]}, assistant("b")]}, "turns have 'tool_calls', which is not read"),
        ("messages", {"messages": [user("a"), assistant("<think>b")]}, "turns of the assistant begin with '<think>' and say no '</think>': all of it is the answer"),
        ("messages", {"messages": [user("a"), assistant("b"), answered("1"), assistant("c")]}, "turns of tools follow upon turns that call none"),
        ("messages", {"messages": [user("a"), calls(called(None, "f"), called(None, "g")), answered("1"), assistant("c")]}, "calls of tools that nothing answers"),
        ("messages", {"system": "s", "messages": [system("t"), user("a"), assistant("b")]}, "a row's own system text was put before that of its chat"),
        ("messages", {"messages": [{**user("a"), "train": True}, assistant("b")]}, "turns of the user are to be trained on by their 'train', which is not done"),
        ("messages", {"messages": [{**system("a"), "weight": 1}, user("a"), assistant("b")]}, "turns of the system are to be trained on by their 'weight', which is not done"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "train": True}]}, assistant("b")]}, "parts of turns of the user have 'train', which is not read"),
        ("messages", {"messages": [user("a"), parts({"text": "b", "cache_control": {"type": "x"}})]}, "parts of turns of the assistant have 'cache_control', which is not read"),
        ("messages", {"messages": [user("a"), calls({"function": {"name": "f"}, "mood": "m"}), answered("1"), assistant("c")]}, "calls of tools have 'mood', which is not read"),
        ("prompts", {"prompt": "a", "input": "b"}, "rows have 'input' beside 'prompt', which is not read"),
        ("preference_between", {"messages": [user("a")], "input": "i", "output_1": "b", "output_2": "c", "preference": "A"}, "rows have 'input' beside 'messages', which is not read"),
        ("label", {"text": "a", "label": "1.0"}, "labels are texts such as 1.0 and stay so: 1, as other rows or files may have it, is another label"),
        ("label", {"text": "a", "label": "NaN"}, "a label is 'NaN', which others write for none, and stays a class: name it in no_label where it is none"),
        ("label", {"text": "a", "label": "<NA>"}, "a label is '<NA>', which others write for none, and stays a class: name it in no_label where it is none"),
        ("spans", {"text": "ab", "spans": [{"id": 1, "start": 0, "end": 1, "label": "X", "word": "b", "score": None}]}, "spans have 'word', which is not read"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_noticed(layout: str, row: Row, noticed: str) -> None:
    conversion = Conversion(declared=frozenset())
    (found,) = [found for _, found in convert_record(row, LAYOUTS[layout], {}, conversion, ())]
    assert not isinstance(found, Dropped)
    assert conversion.noticed == {noticed: 1}


def test_what_is_said_twice_is_kept_once_or_contradicts() -> None:
    turns = [system("s"), user("a"), assistant("b")]
    assert convert("messages", {"system": "s", "messages": turns})[0] == {"messages": turns}
    assert convert("sharegpt", {"system": " ", "conversations": turns[1:]})[0] == {"messages": turns[1:]}
    both = {"messages": turns, "conversations": [user("x"), assistant("y")]}
    assert convert("sharegpt", both)[0] == ("contradictory", "messages and conversations")
    same = {"messages": turns[1:], "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert convert("sharegpt", same)[0] == {"messages": turns[1:]}
    asked = {"role": "user", "from": "human", "content": "a"}
    assert convert("messages", {"messages": [asked, assistant("b")]})[0] == {"messages": turns[1:]}


def test_flags_that_ask_for_nothing_else_are_no_matter() -> None:
    conversion = Conversion()
    turns = [{**user("a"), "weight": 0, "train": False, "loss": "false"}, {**parts("b", "c"), "weight": 1}]
    ((_, row),) = convert_record({"messages": turns}, LAYOUTS["messages"], {}, conversion)
    assert row == {"messages": [user("a"), assistant("bc")]}
    assert not conversion.noticed
    trained = parts({"text": "b", "train": True}, {"text": "c", "weight": 1}, "d")
    assert convert("messages", {"messages": [user("a"), trained]})[0] == {"messages": [user("a"), assistant("bcd")]}


# Parts of a record that are no rows


def test_a_bad_part_of_a_document_takes_no_other_with_it() -> None:
    def paragraph(name: str) -> Row:
        return {"context": f"{name} is here.", "qas": [{"id": name, "question": "Who?", "answers": []}]}

    bad = {"context": "x", "qas": [7, {"id": "last", "question": "Who?", "answers": []}]}
    articles = [
        {"paragraphs": []},
        {"paragraphs": [paragraph("1"), {"context": "x", "qas": []}, paragraph("2")]},
        "no article",
        {"paragraphs": None},
        {"paragraphs": [{"context": "x", "qas": None}, [], bad, paragraph("3")]},
    ]
    found = [row for _, row in convert_record({"data": articles}, LAYOUTS["squad"], {}, Conversion())]
    assert [f"{row.reason} {row.detail}" if isinstance(row, Dropped) else row["id"] for row in found] == [
        "nothing_in_it paragraphs",
        "1",
        "nothing_in_it qas",
        "2",
        "wrong_type data holds a text, not a mapping",
        "missing_field paragraphs",
        "missing_field qas",
        "wrong_type paragraphs holds a list, not a mapping",
        "wrong_type qas holds a number, not a mapping",
        "last",
        "3",
    ]


def test_a_question_stays_one_beside_empty_columns_of_documents() -> None:
    """As tables have them that hold both."""
    row = {"id": "q", "context": "c", "question": "q", "answers": [], "data": None, "qas": None}
    assert convert("squad", row)[0] == {"id": "q", "context": "c", "question": "q", "answers": []}
    document = {"data": None, "context": "c", "qas": [{"id": "q", "question": "q", "answers": []}]}
    assert convert("squad", document)[0] == {"id": "q", "context": "c", "question": "q", "answers": []}


def test_a_prompt_with_the_system_text_that_the_conversations_lack_is_no_other_one() -> None:
    """The prompt says all of the conversation up to some turn: its system message stands before them, and nothing twice."""
    asked = [user("My name is Ana."), assistant("Noted."), user("Who am I?")]
    sides = {"chosen": [*asked, assistant("Ana")], "rejected": [*asked, assistant("Bo")]}
    for prompt in (asked[:2], asked):
        row = convert("preference_chat", {"prompt": [system("In French."), *prompt], **sides})[0]
        assert isinstance(row, dict) and row["prompt"] == [system("In French."), *asked], prompt


def test_what_answers_say_besides_is_told() -> None:
    row = {
        "context": "built in 1910",
        "question": "When?",
        "answers": {"text": ["1910"], "answer_start": [9], "is_impossible": [True]},
    }
    conversion = Conversion()
    list(convert_record(row, LAYOUTS["squad"], {}, conversion))
    assert conversion.noticed == {"answers have 'is_impossible', which is not read": 1}


def test_a_bad_instance_takes_no_other_with_it() -> None:
    instances = [{"output": "1"}, "oops", {"output": "2", "instruction": "b"}, {"output": "3", "instruction": "a"}]
    record = {"instruction": "a", "instances": instances}
    found = [row for _, row in convert_record(record, LAYOUTS["alpaca"], {}, Conversion())]
    assert [row.reason if isinstance(row, Dropped) else row["messages"][1]["content"] for row in found] == [
        "1",
        "wrong_type",
        "contradictory",
        "3",
    ]
    alone = {"instruction": "a", "output": "b", "instances": []}
    assert convert("alpaca", alone)[0] == {"messages": [user("a"), assistant("b")]}


@pytest.mark.parametrize("said", [True, 1, 1.0, "True", "true", " TRUE ", "1"])
def test_that_a_question_has_no_answer_is_read_however_it_is_written(said: Any) -> None:
    row = {"id": "q", "context": "ab", "question": "q", "is_impossible": said}
    empty = {"id": "q", "context": "ab", "question": "q", "answers": []}
    given = {"text": ["ab"], "answer_start": [0]}
    assert convert("squad", {**row, "answers": given}) == (empty, Counter({"plausible_answers_left_out": 1}))
    assert convert("squad", row) == (empty, Counter())
    assert convert("squad", {**row, "answers": {"text": [""], "answer_start": [-1]}}) == (empty, Counter())


def test_that_a_question_has_no_answer_is_read_under_each_name() -> None:
    row = {"id": "q", "context": "ab", "question": "q"}
    answers = {"text": ["ab"], "answer_start": [0]}
    taken = {"id": "q", "context": "ab", "question": "q", "answers": [{"start": 0, "text": "ab"}]}
    for name in (*IMPOSSIBLE, *ANSWERABLE):
        yes, no = (True, False) if name in IMPOSSIBLE else (False, True)
        assert convert("squad", {**row, "answers": answers, name: yes})[0] == {**taken, "answers": []}
        assert convert("squad", {**row, "answers": answers, name: no})[0] == taken
        said = f"{name} is {str(no).lower()}, and there is no answer"
        assert convert("squad", {**row, "answers": [], name: no})[0] == ("contradictory", said)
    assert {"unanswerable", "no_answer", "isImpossible"} < set(IMPOSSIBLE)
    both = {**row, "answers": answers, "is_impossible": True, "has_answer": True}
    assert convert("squad", both)[0] == ("contradictory", "is_impossible and has_answer")


@pytest.mark.parametrize("turn", [{"content": None}, {"content": ""}, {}, {"content": "\u2800\u200b"}])
def test_a_system_turn_that_says_nothing_is_left_out(turn: Row) -> None:
    turns = [{"role": "system", **turn}, user("a"), assistant("b")]
    left_out = Counter({"empty_system_turn": 1})
    assert convert("messages", {"messages": turns}) == ({"messages": turns[1:]}, left_out)
    pair = {"prompt": turns[:2], "chosen": "b", "rejected": "c"}
    assert convert("preference_chat", pair)[0]["prompt"] == [user("a")]


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("said", ["s", None])
def test_tools_of_a_system_turn_are_those_of_the_chat(name: str, said: str | None) -> None:
    function = {"name": "w", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": function}]
    turns = [user("a"), assistant("b")]
    wanted = [{"role": "system", "content": said or "", "tools": tools}, *turns]
    for listed in ([function], json.dumps([function]), tools):
        row = {"messages": [{"role": "system", "content": said, name: listed}, *turns]}
        assert convert("messages", row) == ({"messages": wanted}, Counter())
        # and they stay where the row has a system text of its own, or says the same
        assert convert("messages", {**row, "system": "r"})[0]["messages"][0]["tools"] == tools
        assert convert("messages", {**row, "tools": tools})[0] == {"messages": wanted}
        assert convert("messages", {**row, "tools": [{"name": "v"}]})[0] == (
            "contradictory",
            "the tools of the row and of its system turn",
        )


@pytest.mark.parametrize("said", [False, 0, 0.0, "False", "false", "0", None, ""])
def test_that_a_question_has_an_answer_is_read_however_it_is_written(said: Any) -> None:
    row = {"id": "q", "context": "ab", "question": "q", "is_impossible": said}
    found, _ = convert("squad", {**row, "answers": [{"text": "b", "answer_start": 1}]})
    assert found["answers"] == [{"start": 1, "text": "b"}]


@pytest.mark.parametrize("said", ["True", 1, "good", "Desirable", "1"])
def test_a_good_rating_is_read_however_it_is_written(said: Any) -> None:
    turns = [user("a"), assistant("b")]
    assert convert("rated_chat", {"messages": turns, "label": said})[0] == {"messages": turns}


def test_a_label_that_stands_for_none_may_be_declared_a_class() -> None:
    assert convert("label", {"text": "a", "label": -1}, no_label=())[0] == {"text": "a", "label": "-1"}
    assert convert("label", {"text": "a", "label": "?"}, no_label=("?",))[0] == (
        "no_label",
        "label is ?, which no_label names",
    )
    assert convert("label", {"text": "a", "label": "-"}, no_label=("?",))[0] == {"text": "a", "label": "-"}


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_stand_beside_an_instruction_too(name: str) -> None:
    row = {"instruction": "a", "system": "s", name: [{"name": "f"}]}
    assert convert("prompts", row)[0] == {"prompt": [system("s", "f"), user("a")]}


def test_prompts_in_two_columns_say_the_same_or_contradict() -> None:
    pair = {"chosen": "b", "rejected": "c"}
    wanted = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    turns = [{"from": "human", "value": "a"}]
    assert convert("preference_chat", {"prompt": "a", "conversations": turns, **pair})[0] == wanted
    assert convert("preference_chat", {"prompt": "a", "messages": [], "conversations": "", **pair})[0] == wanted
    reason, detail = convert("preference_chat", {"prompt": "x", "conversations": turns, **pair})[0]
    assert (reason, detail[:24]) == ("contradictory", "conversations and prompt")
    reason, detail = convert("preference_chat", {"prompt": "x", "messages": [user("a")], **pair})[0]
    assert (reason, detail[:19]) == ("contradictory", "messages and prompt")
    # the way out that the message names
    conversion = Conversion(declared=frozenset({"messages"}))
    row = {"prompt": "a", "conversations": [{"from": "human", "value": "x"}], **pair}
    ((_, found),) = convert_record(row, LAYOUTS["preference_chat"], {"messages": "prompt"}, conversion)
    assert found == wanted
    assert conversion.noticed == {
        "'conversations' says something else than the prompt that columns declares, and is not read": 1
    }


# Which of two answers a number prefers


def between(*preferred: Any) -> list[Row]:
    return [
        {"instruction": f"q{number}", "output_1": "first", "output_2": "second", "preference": each}
        for number, each in enumerate(preferred)
    ]


def read_between(folder: Path, *preferred: Any, **options: Any) -> tuple[list[str], Counter[str]]:
    """(the better answers, what was dropped) of rows with these preferences."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in between(*preferred)))
    rows, ledger = read_files(folder, paths=[path.name], layout="preference_between", **options)
    return [row["chosen"][0]["content"] for row in rows], ledger.dropped


@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_numbers_that_are_only_ever_0_and_1_must_be_declared(zero: Any, tmp_path: Path) -> None:
    """Taken as 1 and 2, each 1 would stand for the other answer."""
    with pytest.raises(
        DataError, match=r"preference: is 0 in 2 rows, 1 in 1 and 2 in none.*first_answer: 0.*first_answer: 1"
    ):
        read_between(tmp_path, zero, 1, zero)
    assert read_between(tmp_path, zero, 1, zero, first_answer=0) == (["first", "second", "first"], {})
    assert read_between(tmp_path, zero, 1, zero, first_answer=1) == (["first"], {"tie": 2})
    exchanged = {"output_1": "output_2", "output_2": "output_1"}
    other_way = read_between(tmp_path, zero, 1, zero, first_answer=0, columns=exchanged)
    assert other_way == (["second", "first", "second"], {})
    assert read_between(tmp_path, zero, 1, zero, first_answer=1, second_answer=0) == other_way


def test_where_a_number_above_1_stands_0_is_a_tie(tmp_path: Path) -> None:
    assert read_between(tmp_path, 0, 1, 2, 1.4) == (["first", "second", "first"], {"tie": 1})
    assert read_between(tmp_path, 1, 1) == (["first", "first"], {})


def test_margins_count_from_the_first_answer() -> None:
    (row,) = between(0.75)
    found, _ = convert("preference_between", row, first_answer=0)
    assert (found["chosen"], found["margin"]) == ([assistant("second")], 0.5)
    assert convert("preference_between", between(0.5)[0], first_answer=0)[0] == ("tie", "")
    outside = convert("preference_between", between(2)[0], first_answer=0)[0]
    assert outside == (
        "wrong_type",
        "preference is 2, not a number from 0 to 1 (first_answer and second_answer name other ends)",
    )


def test_the_ends_of_a_scale_are_two_numbers() -> None:
    for options, said in (
        ({"second_answer": 2}, "without first_answer"),
        ({"first_answer": 2, "second_answer": 2}, "is what first_answer is"),
    ):
        with pytest.raises(ValidationError, match=said):
            LaidOutSource(layout="preference_between", **options)
    assert convert("preference_between", between(0)[0], first_answer=-1, second_answer=1)[0] == ("tie", "")
    outside = convert("preference_between", between(2)[0], first_answer=-1, second_answer=1)[0]
    assert outside == (
        "wrong_type",
        "preference is 2, not a number from -1 to 1 (first_answer and second_answer name other ends)",
    )


def test_a_span_that_says_its_text_is_read_in_the_units_that_fit() -> None:
    """ "ab" stands at 0 and 3. The emoji is two units of UTF-16 and four bytes of UTF-8: 4 and 6 are the second one."""
    for start, repair in ((4, "offset_in_utf16"), (6, "offset_in_utf8")):
        span = {"start": start, "end": start + 2, "label": "X", "text": "ab"}
        found = convert("spans", {"text": "ab😀ab", "spans": [span]})
        assert found == ({"text": "ab😀ab", "spans": [{"start": 3, "end": 5, "label": "X"}]}, Counter({repair: 1}))


@pytest.mark.parametrize(
    ("offsets", "span", "expected"),
    [
        (None, [3, 6], (3, 6)),
        ("inclusive", [3, 5], (3, 6)),
        ("utf16", [4, 7], (3, 6)),
        ("utf8", [6, 9], (3, 6)),
        ("inclusive", [3, 6], "bad_span"),
        ("utf16", [3, 7], "bad_span"),
        ("utf8", [6, 10], "bad_span"),
        ("utf8", [-1, 3], "bad_span"),
    ],
)
def test_offsets_of_spans_are_read_as_declared(
    offsets: str | None, span: list[int], expected: tuple[int, int] | str
) -> None:
    """Bob stands at [3, 6) in six characters; the emoji before it is two units of UTF-16, and four bytes of UTF-8."""
    found, _ = convert("spans", {"text": "ab😀Bob", "spans": [[*span, "P"]]}, span_offsets=offsets)
    place = found[0] if isinstance(found, tuple) else (found["spans"][0]["start"], found["spans"][0]["end"])
    assert place == expected


def odd_spans(folder: Path, rows: Sequence[Row], **block: Any) -> tuple[dict[str, int], dict[str, list[str]]]:
    """What is told of the spans of these rows, and the examples."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found, ledger = read_files(folder, paths=[str(path)], layout="spans", **block)
    assert len(found) == len(rows)
    return dict(ledger.noticed), ledger.noticed_examples


ODD = "begin or end inside a word or with a space"


def test_spans_that_end_inside_words_are_told_with_the_option_that_reads_them(tmp_path: Path) -> None:
    """Ends that are inclusive cut the last letter off; offsets of a browser are too far by one for each emoji before; and
    what was counted some other way is told without an option. A row counts once, each of its spans for itself."""
    inclusive = [{"text": "Alice met Bob", "spans": [[0, 4, "P"], [10, 12, "P"]]}] * 3
    noticed, examples = odd_spans(tmp_path, inclusive)
    told = f"6 of 6 spans {ODD}; with span_offsets: inclusive it would be 0"
    assert (noticed, examples) == ({told: 3}, {told: ["[Alic]e met Bob", "Alice met [Bo]b"] * 2 + ["[Alic]e met Bob"]})
    assert odd_spans(tmp_path, inclusive, span_offsets="inclusive") == ({}, {})
    browser = [{"text": "😀 Bob met Al", "spans": [[3, 6, "P"]]}, {"text": "Bob met Al", "spans": [[0, 3, "P"]]}]
    assert odd_spans(tmp_path, browser)[0] == {f"1 of 2 spans {ODD}; with span_offsets: utf16 it would be 0": 1}
    assert odd_spans(tmp_path, browser, span_offsets="utf16") == ({}, {})
    read_bytes = [{"text": "\u00e9t\u00e9: Bob met Al", "spans": [[7, 10, "P"]]}]
    assert odd_spans(tmp_path, read_bytes)[0] == {f"1 of 1 spans {ODD}; with span_offsets: utf8 it would be 0": 1}
    shifted = [{"text": "Bob met Al", "spans": [[3, 8, "P"]]}]
    assert odd_spans(tmp_path, shifted)[0] == {f"1 of 1 spans {ODD}: look whether their offsets are right": 1}


def test_spans_that_end_as_words_do_are_not_told(tmp_path: Path) -> None:
    """Marks are no letters; where words have no spaces between them, or particles are written onto names, every end may be
    right; and what says its own text was looked for by it."""
    rows = [
        {"text": "the U.S.-led war (Iraq).", "spans": [[4, 8, "P"], [9, 12, "X"], [18, 22, "P"]]},
        {"text": "他在北京工作", "spans": [[2, 4, "P"]]},
        {"text": "東京タワーへ行く", "spans": [[0, 2, "P"]]},
        {"text": "ไปกรุงเทพมหานคร", "spans": [[2, 9, "P"]]},
        {"text": "서울에서", "spans": [[0, 2, "P"]]},
        {"text": "在Paris市", "spans": [[1, 6, "P"]]},
        {"text": "Alice", "spans": [{"start": 0, "end": 2, "label": "P", "text": "Al"}]},
    ]
    assert odd_spans(tmp_path, rows) == ({}, {})
