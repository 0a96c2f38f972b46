"""What `slipway inspect` proposes for data as people publish it, each form made up here in a few rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SlipwayError
from stages.data.clean import STAGE as CLEAN
from stages.data.mix import MixParams
from stages.lib.inspecting.data import Asked, inspect_data
from stages.lib.sources.layouts import LAYOUTS
from tests.unit.running_stages import run_stage

Row = dict[str, Any]
WORDS = "river stone harbour lantern meadow copper violet thunder orchard candle marble saddle".split()


def saying(number: int) -> str:
    """A sentence that no other number has."""
    return f"The {WORDS[number % 12]} stands beside the {WORDS[(number * 5 + 1) % 12]} of house {number}."


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def turns(number: int, *, answered: bool = True) -> list[Row]:
    return [user(f"Where is house {number}?"), *([assistant(saying(number))] if answered else [])]


ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pages": (lambda n: {"url": f"u{n}", "text": saying(n), "timestamp": "2020"}, {"layout": "text"}),
    "contents": (lambda n: {"id": n, "content": saying(n)}, {"layout": "text", "columns": {"text": "content"}}),
    "one column of any name": (lambda n: {"strange": saying(n)}, {"layout": "text", "columns": {"text": "strange"}}),
    "dolly": (
        lambda n: {
            "instruction": saying(n),
            "context": saying(n + 1) if n % 3 else "",
            "response": f"yes, {n}",
            "category": ("open_qa", "brainstorm")[n % 2],
        },
        {"layout": "alpaca", "columns": {"output": "response", "input": "context"}},
    ),
    "orca": (
        lambda n: {"id": n, "system_prompt": "Be brief.", "question": saying(n), "response": f"It is {n}."},
        {"layout": "alpaca", "columns": {"instruction": "question", "output": "response", "system": "system_prompt"}},
    ),
    "prompt and completion": (
        lambda n: {"prompt": saying(n), "completion": f"It is number {n}."},
        {"layout": "alpaca", "columns": {"instruction": "prompt", "output": "completion"}},
    ),
    "query and response": (
        lambda n: {"query": saying(n), "response": f"It is number {n}.", "type": "GSM_Rephrased"},
        {"layout": "alpaca", "columns": {"instruction": "query", "output": "response"}},
    ),
    "messages": (lambda n: {"messages": turns(n), "prompt_id": f"p{n}"}, {"layout": "messages"}),
    "sharegpt": (
        lambda n: {
            "id": f"i{n}",
            "conversations": [{"from": "human", "value": saying(n)}, {"from": "gpt", "value": "yes"}],
        },
        {"layout": "sharegpt"},
    ),
    "a conversation": (
        lambda n: {"conversation_id": f"c{n}", "conversation": turns(n), "language": "English"},
        {"layout": "messages", "columns": {"messages": "conversation", "group": "conversation_id"}},
    ),
    "kto with texts": (
        lambda n: {"prompt": saying(n), "completion": f"It is {n}.", "label": n % 3 > 0},
        {"layout": "unpaired_preference"},
    ),
    "kto with turns": (
        lambda n: {"prompt": turns(n, answered=False), "completion": [assistant(saying(n))], "label": n % 3 > 0},
        {"layout": "unpaired_preference"},
    ),
    "kto as a table has it": (
        lambda n: {"prompt": saying(n), "completion": f"It is {n}.", "label": ("False", "True")[n % 3 > 0]},
        {"layout": "unpaired_preference"},
    ),
    "kto with instructions": (
        lambda n: {"instruction": saying(n), "input": f"house {n}", "output": f"It is {n}.", "kto_tag": n % 3 > 0},
        {"layout": "unpaired_preference", "columns": {"completion": "output", "label": "kto_tag"}},
    ),
    "answers with ratings": (
        lambda n: {"prompt": saying(n), "response": f"It is {n}.", "ratings": {"truth": n % 5, "wit": None}},
        {"layout": "rated_answer", "columns": {"completion": "response"}},
    ),
    "steps with labels": (
        lambda n: {"prompt": saying(n), "completions": [f"It is {n}.", "So it is."], "labels": [True, n % 3 > 0]},
        {"layout": "stepwise"},
    ),
    "steps of PRM800K": (
        lambda n: {
            "question": {"problem": saying(n)},
            "label": {"steps": [{"completions": [{"text": f"It is {n}.", "rating": 1}], "chosen_completion": 0}]},
        },
        {"layout": "prm800k"},
    ),
    "chats that are called good or bad": (
        lambda n: {"messages": turns(n), "rating": ("bad", "good")[n % 3 > 0]},
        {"layout": "rated_chat", "columns": {"label": "rating"}},
    ),
    "prompts": (lambda n: {"prompt": turns(n, answered=False)}, {"layout": "prompts"}),
    "prompts with tools": (
        lambda n: {"instruction": saying(n), "tools": [{"name": "look", "description": "d"}]},
        {"layout": "prompts"},
    ),
    "prompts with what is right": (
        lambda n: {
            "data_source": "sums",
            "prompt": turns(n, answered=False),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n)},
        },
        {"layout": "prompts", "carry": ["reward_model.ground_truth"]},
    ),
    "pairs of texts": (
        lambda n: {"prompt": saying(n), "chosen": f"Yes, {n}.", "rejected": f"No, {n}!"},
        {"layout": "preference_chat"},
    ),
    "pairs of whole chats": (
        lambda n: {
            "prompt": f"Where is house {n}?",
            "chosen": turns(n),
            "rejected": [turns(n)[0], assistant("No.")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        {"layout": "preference_chat"},
    ),
    "pairs beside the whole chosen chat": (
        lambda n: {
            "prompt": f"Where is house {n}?",
            "prompt_id": f"p{n}",
            "chosen": turns(n),
            "rejected": [turns(n)[0], assistant("No.")],
            "messages": turns(n),
            "score_chosen": 8.5,
        },
        {"layout": "preference_chat", "columns": {"messages": "prompt"}},
    ),
    "pairs with a system text": (
        lambda n: {"system": "Be brief.", "question": saying(n), "chosen": f"Yes, {n}.", "rejected": f"No, {n}!"},
        {"layout": ("preference_alpaca", "preference_chat")},
    ),
    "transcripts": (
        lambda n: {
            "chosen": f"\n\nHuman: Where is {n}?\n\nAssistant: There, {n}.",
            "rejected": f"\n\nHuman: Where is {n}?\n\nAssistant: No.",
        },
        {"layout": "preference_chat", "turns_in_text": "transcript"},
    ),
    "ranked answers": (
        lambda n: {"instruction": saying(n), "input": "", "output": [f"best {n}", f"worst {n}"]},
        {"layout": "preference_alpaca"},
    ),
    "judged answers": (
        lambda n: {"instruction": saying(n), "response_a": f"a {n}", "response_b": f"b {n}", "preference": 1 + n % 2},
        {"layout": "preference_between", "columns": {"output_1": "response_a", "output_2": "response_b"}},
    ),
    "battles of an arena": (
        lambda n: {
            "question_id": f"q{n}",
            "model_a": "x",
            "model_b": "y",
            "winner": ("model_a", "model_b", "tie (bothbad)")[n % 3],
            "conversation_a": [turn("user", saying(n)), turn("assistant", f"a {n}")],
            "conversation_b": [turn("user", saying(n)), turn("assistant", f"b {n}")],
        },
        {
            "layout": "preference_between",
            "columns": {"output_1": "conversation_a", "output_2": "conversation_b", "preference": "winner"},
        },
    ),
    "inferences": (
        lambda n: {
            "sentence1": saying(n),
            "sentence2": f"It is {n}.",
            "gold_label": ("-", "neutral", "entailment")[n % 3],
        },
        {"layout": "label", "columns": {"text": "sentence1", "text_pair": "sentence2", "label": "gold_label"}},
    ),
    "sentences with labels": (
        lambda n: {"idx": n, "sentence": saying(n), "label": n % 2},
        {"layout": "label", "columns": {"text": "sentence"}},
    ),
    "reviews": (
        lambda n: {"review": saying(n), "sentiment": ("positive", "negative")[n % 2]},
        {"layout": "label", "columns": {"text": "review", "label": "sentiment"}},
    ),
    "labels at two depths": (
        lambda n: {"text": saying(n), "coarse_label": n % 3, "fine_label": n % 7},
        {"layout": "label", "columns": {"label": "coarse_label"}},
    ),
    "spans": (
        lambda n: {"text": f"House {n} is here", "entities": [{"start": 0, "end": 5, "label": "PLACE"}]},
        {"layout": "spans", "columns": {"spans": "entities"}},
    ),
    "spans as lists": (
        lambda n: {"id": n, "text": f"House {n} is here", "label": [[0, 5, "PLACE"]]},
        {"layout": "spans", "columns": {"spans": "label"}},
    ),
    "tags": (
        lambda n: {"id": str(n), "tokens": ["Mira", f"sings{n}"], "ner_tags": ["B-PER", "O"]},
        {"layout": "bio", "columns": {"tags": "ner_tags"}},
    ),
    "questions as the hub has them": (
        lambda n: {
            "id": f"q{n}",
            "title": "t",
            "context": saying(n),
            "question": f"What stands there, {n}?",
            "answers": {"text": ["The"], "answer_start": [0]},
        },
        {"layout": "squad"},
    ),
    "seed tasks": (
        lambda n: {
            "instruction": saying(n),
            "instances": [{"input": "", "output": f"{n}"}],
            "is_classification": False,
        },
        {"layout": "alpaca"},
    ),
}
"""How a row of each form is made of its number, and what the source must say."""


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def proposed(path: Path, **options: Any) -> dict[str, Any]:
    """The whole report, whose first proposal's figures must add up."""
    report = inspect_data([str(path)], Asked(**options))
    for proposal in report["proposals"]:
        rows = proposal["rows"]
        assert rows["read"] == rows["kept"] + rows["dropped"]
        assert rows["dropped"] == sum(reason["count"] for reason in rows["reasons"])
    return report


def source(path: Path, **options: Any) -> dict[str, Any]:
    """The source that is proposed first, without where it is."""
    report = proposed(path, **options)
    assert report["proposals"], report["missing"]
    block = report["proposals"][0]["source"]
    return {name: value for name, value in block.items() if name not in ("kind", "paths", "path")}


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_told_by_its_columns(form: str, tmp_path: Path) -> None:
    """And what is proposed works: `clean` with it keeps as many rows as `inspect` says."""
    make, wanted = ROWS[form]
    path = write(tmp_path / "rows.jsonl", [make(number) for number in range(60)])
    report = proposed(path)
    first = report["proposals"][0]
    found = {name: value for name, value in first["source"].items() if name not in ("kind", "paths")}
    either = wanted["layout"] if isinstance(wanted["layout"], tuple) else (wanted["layout"],)
    assert found["layout"] in either, report
    if len(either) == 1:
        assert found == wanted
    ran = run_stage(CLEAN, {"format": first["format"], "source": first["source"]}, tmp_path / "ran")
    assert len(ran.rows()) == first["rows"]["kept"] > 0


def test_forms_of_pairs_are_proposed_where_the_layout_knows_them(tmp_path: Path) -> None:
    if "text_pair" not in LAYOUTS["label"].columns:
        pytest.skip("the layout label has one text")
    rows = [{"premise": saying(n), "hypothesis": f"It is {n}.", "label": n % 3} for n in range(30)]
    assert source(write(tmp_path / "rows.jsonl", rows)) == {
        "layout": "label",
        "columns": {"text": "premise", "text_pair": "hypothesis"},
    }
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{saying(n)}\t{saying(n + 1)}\t{n % 2}\n" for n in range(30)))
    assert source(table) == {
        "has_header": False,
        "layout": "label",
        "columns": {"text": "0", "text_pair": "1", "label": "2"},
    }


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fields between semicolons": (
        "a.csv",
        "text;label\n" + "".join(f"{saying(n)};{n % 2}\n" for n in range(20)),
        {"delimiter": ";", "layout": "label"},
    ),
    "tabs in a file that is called CSV": (
        "a.csv",
        "text\tlabel\n" + "".join(f'{saying(n)} "\t{n % 2}\n' for n in range(20)),
        {"file_type": "tsv", "layout": "label"},
    ),
    "no header": (
        "a.csv",
        "".join(f'{1 + n % 4},"House {n}","{saying(n)}"\n' for n in range(40)),
        {"has_header": False, "layout": "label", "columns": {"text": "2", "label": "0"}},
    ),
    "a header with large letters": (
        "a.csv",
        "Class Index,Title,Description\n" + "".join(f'{1 + n % 4},"House {n}","{saying(n)}"\n' for n in range(40)),
        {"layout": "label", "columns": {"text": "Description", "label": "Class Index"}},
    ),
    "label before text": (
        "questions.txt",
        "".join(f"{('NUM:date', 'LOC:city', 'HUM:ind')[n % 3]} Where is {saying(n)}\n" for n in range(30)),
        {
            "file_type": "tsv",
            "has_header": False,
            "delimiter": " ",
            "max_fields": 2,
            "layout": "label",
            "columns": {"text": "1", "label": "0"},
        },
    ),
    "labels with a mark of their own": (
        "reviews.txt",
        "".join(f"__label__{1 + n % 2} {saying(n)}\n" for n in range(30)),
        {
            "file_type": "tsv",
            "has_header": False,
            "delimiter": " ",
            "max_fields": 2,
            "layout": "label",
            "columns": {"text": "1", "label": "0"},
        },
    ),
    "four columns and documents": (
        "eng.txt",
        "-DOCSTART- -X- -X- O\n\n" + "Mira NNP B-NP B-PER\nsings VBZ B-VP O\n\nTom NNP B-NP B-PER\nruns VBZ B-VP O\n",
        {"file_type": "conll", "layout": "bio"},
    ),
    "marks and an empty column": (
        "cola.tsv",
        "".join(
            f"{('gj04', 'bc01', 'cj99')[n % 3]}\t{n % 2}\t{'*' if n % 2 else ''}\t{saying(n)}\n" for n in range(40)
        ),
        {"has_header": False, "layout": "label", "columns": {"text": "3", "label": "1"}},
    ),
    "entries by name": (
        "rows.json",
        json.dumps({f"e{n}": {"question": saying(n), "answer": f"It is {n}."} for n in range(9)}),
        {"records": "*", "layout": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
    ),
    "comments and numbers": (
        "eng.conll",
        "# sent_id = 1\n# text = Mira sings\n1\tMira\tB-PER\t_\n2\tsings\tO\t_\n\n# text = Tom\n1\tTom\tB-PER\t_\n",
        {"token_column": 1, "tag_column": 2, "comment_prefix": "# ", "layout": "bio"},
    ),
    "JSON lines without suffix": (
        "rows",
        "".join(json.dumps({"messages": turns(n)}) + "\n" for n in range(5)),
        {"file_type": "jsonl", "layout": "messages"},
    ),
    "JSON lines that are called JSON": (
        "rows.json",
        "".join(json.dumps({"messages": turns(n)}) + "\n" for n in range(5)),
        {"file_type": "jsonl", "layout": "messages"},
    ),
    "a list that is called JSON lines": (
        "rows.jsonl",
        json.dumps([{"messages": turns(n)} for n in range(5)], indent=1),
        {"file_type": "json", "layout": "messages"},
    ),
    "rows within a document": (
        "rows.json",
        json.dumps({"version": 1, "data": [{"text": saying(n), "label": n % 2} for n in range(9)]}),
        {"records": "data", "layout": "label"},
    ),
    "rows within a document of which one has a key twice": (
        "rows.json",
        json.dumps({"data": [{"text": saying(n), "label": n % 2} for n in range(60)]}).replace(
            "0}", '0, "label": 1}', 1
        ),
        {"records": "data", "layout": "label"},
    ),
    "list after list": (
        "rows.json",
        "".join(json.dumps([{"text": saying(n), "label": n % 2} for n in range(k, k + 9)]) + "\n" for k in (0, 9)),
        {"layout": "label"},
    ),
    "lists of rows that are called JSON lines": (
        "rows.jsonl",
        "".join(json.dumps([{"text": saying(n), "label": n % 2}]) + "\n" for n in range(9)),
        {"file_type": "json", "layout": "label"},
    ),
    "quotes that enclose fields between tabs": (
        "a.tsv",
        "text\tlabel\n" + "".join(f'"{saying(n)} ""Yes"""\t{n % 2}\n{saying(n)}\t{n % 2}\n' for n in range(9)),
        {"file_type": "csv", "delimiter": "\t", "layout": "label"},
    ),
    "quotes around fields of several lines": (
        "a.tsv",
        "text\tlabel\n" + "".join(f'"{saying(n)}\nAnd more."\t{n % 2}\n' for n in range(9)),
        {"file_type": "csv", "delimiter": "\t", "layout": "label"},
    ),
    "quotes around each text": (
        "a.txt",
        '"text"\t"label"\n' + "".join(f'"{saying(n)}"\t{n % 2}\n' for n in range(9)),
        {"file_type": "csv", "delimiter": "\t", "layout": "label"},
    ),
    "quotes that texts have of their own": (
        "a.tsv",
        "text\tlabel\n" + "".join(f'"{saying(n)}\t0\n{saying(n + 1)}"\t1\n"Go {n}!"\t1\n' for n in range(9)),
        {"layout": "label"},
    ),
    "a header once more": (
        "a.csv",
        "".join("text,label\n" + "".join(f"{saying(n)},{n % 2}\n" for n in range(k, k + 9)) for k in (0, 9)),
        {"layout": "label"},
    ),
    "empty columns of a spreadsheet": (
        "a.csv",
        "text,label,,\n" + "".join(f"{saying(n)},{n % 2},,\n" for n in range(9)),
        {"layout": "label"},
    ),
    "line ends of old Macs": (
        "a.csv",
        "text,label\r" + "".join(f"{saying(n)},{n % 2}\r" for n in range(9)),
        {"layout": "label"},
    ),
    "spaces that do not break": (
        "a.conll",
        "Mira B-PER\nhas O\n10\u00a0000 B-NUM\n\nOsaka\u3000Bay B-LOC\nis O\n",
        {"layout": "bio"},
    ),
    "lines": ("poem.txt", "".join(f"{saying(n)}\n" for n in range(9)), {"split_text": "line", "layout": "text"}),
    "paragraphs": ("book.md", "\n\n".join(map(saying, range(9))), {"split_text": "paragraph", "layout": "text"}),
    "one text": ("page.txt", saying(1), {"layout": "text"}),
}


@pytest.mark.parametrize("form", FILES)
def test_each_file_is_told_by_its_content(form: str, tmp_path: Path) -> None:
    name, content, wanted = FILES[form]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    report = proposed(path)
    first = report["proposals"][0]
    assert {name: value for name, value in first["source"].items() if name not in ("kind", "paths")} == wanted
    ran = run_stage(CLEAN, {"format": first["format"], "source": first["source"]}, tmp_path / "ran")
    assert len(ran.rows()) == first["rows"]["kept"] > 0


@pytest.mark.parametrize(
    ("encoding", "text", "wanted"),
    [
        ("gb18030", "\u8d28\u91cf\u5f88\u597d", "gb18030"),
        ("big5", "\u54c1\u8cea\u5f88\u597d\uff0c\u975e\u5e38\u6eff\u610f", "big5"),
        ("shift_jis", "\u54c1\u8cea\u306f\u3068\u3066\u3082\u826f\u3044\u3067\u3059", "shift_jis"),
        ("euc_jp", "\u54c1\u8cea\u306f\u3068\u3066\u3082\u826f\u3044\u3067\u3059", "euc_jp"),
        ("euc_kr", "\ud488\uc9c8\uc774 \uc544\uc8fc \uc88b\uc544\uc694", "euc_kr"),
        ("cp1251", "\u043e\u0447\u0435\u043d\u044c \u0445\u043e\u0440\u043e\u0448\u043e", "cp1251"),
        (
            "koi8_r",
            "\u043e\u0447\u0435\u043d\u044c \u0445\u043e\u0440\u043e\u0448\u043e",
            "koi8-u",
        ),  # with Russian letters in the same places
        (
            "cp1250",
            "Wszyscy ludzie rodz\u0105 si\u0119 wolni i r\xf3wni pod wzgl\u0119dem swej godno\u015bci i swych praw",
            "cp1250",
        ),
        (
            "cp1254",
            "B\xfct\xfcn insanlar h\xfcr haysiyet ve haklar bak\u0131m\u0131ndan e\u015fit do\u011farlar; karde\u015flik zihniyeti ile hareket etmelidirler",
            "cp1254",
        ),
        (
            "cp1255",
            "\u05db\u05dc \u05d1\u05e0\u05d9 \u05d4\u05d0\u05d3\u05dd \u05e0\u05d5\u05dc\u05d3\u05d5 \u05d1\u05e0\u05d9 \u05d7\u05d5\u05e8\u05d9\u05df \u05d5\u05e9\u05d5\u05d5\u05d9\u05dd \u05d1\u05e2\u05e8\u05db\u05dd \u05d5\u05d1\u05d6\u05db\u05d5\u05d9\u05d5\u05ea\u05d9\u05d4\u05dd",
            "cp1255",
        ),
        (
            "cp1256",
            "\u064a\u0648\u0644\u062f \u062c\u0645\u064a\u0639 \u0627\u0644\u0646\u0627\u0633 \u0623\u062d\u0631\u0627\u0631\u0627 \u0645\u062a\u0633\u0627\u0648\u064a\u0646 \u0641\u064a \u0627\u0644\u0643\u0631\u0627\u0645\u0629 \u0648\u0627\u0644\u062d\u0642\u0648\u0642",
            "cp1256",
        ),
        (
            "cp874",
            "\u0e21\u0e19\u0e38\u0e29\u0e22\u0e4c\u0e17\u0e31\u0e49\u0e07\u0e2b\u0e25\u0e32\u0e22\u0e40\u0e01\u0e34\u0e14\u0e21\u0e32\u0e21\u0e35\u0e2d\u0e34\u0e2a\u0e23\u0e30\u0e41\u0e25\u0e30\u0e40\u0e2a\u0e21\u0e2d\u0e20\u0e32\u0e04\u0e01\u0e31\u0e19\u0e43\u0e19\u0e40\u0e01\u0e35\u0e22\u0e23\u0e15\u0e34\u0e28\u0e31\u0e01\u0e14\u0e34\u0e4c\u0e41\u0e25\u0e30\u0e2a\u0e34\u0e17\u0e18\u0e34",
            "cp874",
        ),
        ("cp1253", "\u03c0\u03bf\u03bb\u03cd \u03ba\u03b1\u03bb\u03ac", "cp1253"),
        ("latin-1", "caf\u00e9 au lait", "cp1252"),
        ("utf-16", "caf\u00e9", "utf-16"),
        ("utf-16-le", "plain words", "utf-16-le"),
        ("utf-8-sig", "caf\u00e9", None),
    ],
)
def test_encodings_are_proposed(encoding: str, text: str, wanted: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(("text,label\n" + "".join(f"{text} {n},{n % 2}\n" for n in range(20))).encode(encoding))
    found = source(path)
    assert (found.get("encoding"), found["layout"]) == (wanted, "label")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_rows_within_a_document_are_found_in_other_encodings(encoding: str, tmp_path: Path) -> None:
    rows = [{"text": f"caf\u00e9 au lait {n}", "label": n % 2} for n in range(9)]
    (tmp_path / "rows.json").write_bytes(json.dumps({"data": rows}, ensure_ascii=False).encode(encoding))
    assert source(tmp_path / "rows.json") == {"encoding": encoding, "records": "data", "layout": "label"}


def test_a_header_that_names_two_columns_alike_is_told(tmp_path: Path) -> None:
    """And not taken for a row. Who says that it is one is believed."""
    path = tmp_path / "a.csv"
    path.write_text("id,text,label,label\n" + "".join(f"{n},{saying(n)},{n % 2},{n % 3}\n" for n in range(9)))
    assert "has a header that names more than one column 'label'" in refused(path)
    assert proposed(path, given={"has_header": False})["proposals"][0]["rows"]["read"] == 10
    path.write_text("Title,My label,My label\n" + "".join(f"{saying(n)},{n % 2},{n % 3}\n" for n in range(9)))
    assert "has a header that names more than one column 'My label'" in refused(path)
    path.rename(tmp_path / "a.txt")
    assert any("more than one column 'My label'" in note for note in proposed(tmp_path / "a.txt")["notes"])
    path.write_text("".join(f"good {n},good {n},no word\n" for n in range(9)))
    assert source(path)["has_header"] is False


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
        ("train/a.jsonl", "dev/a.jsonl"),
        ("squad_dev.jsonl", "squad_train.jsonl"),
    ],
)
def test_official_splits_are_told(names: tuple[str, ...], tmp_path: Path) -> None:
    """The way out: each by itself, and the one to test with named in heldout_sources of `mix`."""
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": saying(number * 9 + n)} for n in range(9)])
    (note,) = [note for note in proposed(tmp_path)["notes"] if "official splits" in note]
    assert "name that `clean` in heldout_sources of the stage `mix`" in note
    assert "heldout_sources" in MixParams.model_fields
    assert not any("splits" in note for note in proposed(tmp_path / names[0])["notes"])


def test_other_names_are_no_splits(tmp_path: Path) -> None:
    for name in ("test-1.jsonl", "test-2.jsonl", "latest.jsonl", "contrast.jsonl", "developers.jsonl"):
        write(tmp_path / name, [{"text": saying(1)}])
    assert not any("splits" in note for note in proposed(tmp_path)["notes"])


def test_a_folder_of_texts_is_read_text_by_text(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(map(saying, range(9))))
    report = proposed(tmp_path)
    assert report["proposals"][0]["rows"]["read"] == 3
    assert "split_text" not in report["proposals"][0]["source"]


def test_a_folder_with_a_word_about_its_data_is_read_without_it(tmp_path: Path) -> None:
    """What is proposed names the type that is read, so that `clean` reads no more."""
    data = tmp_path / "data"
    data.mkdir()
    write(data / "rows.jsonl", [{"text": saying(n)} for n in range(3)])
    (data / "README.md").write_text("What it is.")
    (data / "log").write_text("when it was made")
    report = proposed(data)
    first = report["proposals"][0]
    assert "2 files beside these are not read: 1 .md, 1 without suffix" in report["notes"]
    ran = run_stage(CLEAN, {"format": first["format"], "source": first["source"]}, tmp_path / "ran")
    assert len(ran.rows()) == 3


def test_the_ways_out_of_a_folder_of_several_types_work(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner" / "rows.jsonl", [{"text": saying(n)} for n in range(3)])
    (tmp_path / "rows.csv").write_text("text\na\n")
    said = refused(tmp_path)
    assert f"slipway inspect '{tmp_path}/**/*.jsonl'" in said or f"slipway inspect '{tmp_path}/**/*.csv'" in said
    assert proposed(Path(f"{tmp_path}/**/*.jsonl"))["proposals"][0]["rows"]["read"] == 3
    assert proposed(tmp_path, given={"file_type": "jsonl"})["proposals"][0]["rows"]["read"] == 3


def test_of_a_saved_data_set_with_splits_the_one_for_training_is_proposed(tmp_path: Path) -> None:
    import datasets

    parts = {name: [{"text": f"{name} {n}", "label": n % 2} for n in range(9)] for name in ("test", "train")}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    report = proposed(tmp_path / "saved")
    first = report["proposals"][0]
    assert (first["source"]["kind"], first["source"]["split"], first["source"]["layout"]) == (
        "dataset",
        "train",
        "label",
    )
    assert report["notes"] == ["its splits are test, train; train is looked at"]
    assert source(tmp_path / "saved", given={"split": "test"})["split"] == "test"
    ran = run_stage(CLEAN, {"format": first["format"], "source": first["source"]}, tmp_path / "ran")
    assert len(ran.rows()) == 9


def test_names_with_marks_of_patterns_are_names(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1].jsonl", [{"text": saying(n)} for n in range(3)])
    first = proposed(path)["proposals"][0]
    ran = run_stage(CLEAN, {"format": first["format"], "source": first["source"]}, tmp_path / "ran")
    assert len(ran.rows()) == 3


def refused(path: Path) -> str:
    with pytest.raises(SlipwayError) as error:
        inspect_data([str(path)], Asked())
    return str(error.value)


def test_what_is_no_data_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Whatever it is: each of these has a way out in its sentence."""
    (tmp_path / "empty.jsonl").write_text(" \n")
    (tmp_path / "book.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:20])
    assert "holds nothing" in refused(tmp_path / "empty.jsonl")
    assert "Save its table as CSV" in refused(tmp_path / "book.xlsx")
    assert "neither text nor Parquet" in refused(tmp_path / "model.bin")
    assert "Rename it to rows.jsonl.gz" in refused(tmp_path / "rows.jsonl")
    assert "cannot be decompressed" in refused(tmp_path / "cut.jsonl.gz")
    assert "is not there" in refused(tmp_path / "none.jsonl")
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "holds no rows" in refused(tmp_path / "header.csv")
    (tmp_path / "rows.csv").write_text("text\na\n")
    assert "several types" in refused(tmp_path)
    (tmp_path / "folder").mkdir()
    assert "holds no data file" in refused(tmp_path / "folder")


@pytest.mark.parametrize("write_as", [int, float, str])
def test_which_answer_a_1_prefers_is_not_guessed(write_as: type, tmp_path: Path) -> None:
    """Both ways are shown, each with what it takes a 1 to be, and each works."""
    rows = [
        {"instruction": saying(n), "response_a": f"a {n}", "response_b": f"b {n}", "label": write_as(n % 2)}
        for n in range(30)
    ]
    report = proposed(write(tmp_path / "rows.jsonl", rows))
    better = []
    for number, each in enumerate(report["proposals"]):
        assert each["source"]["first_answer"] == 0
        better += [reason for reason in each["why"] if reason.startswith("if 1 in 'label' prefers")]
        ran = run_stage(CLEAN, {"format": "preferences", "source": each["source"]}, tmp_path / f"ran{number}")
        chosen = {row["chosen"][0]["content"][0] for row in ran.rows() if int(row["chosen"][0]["content"][2:]) % 2}
        assert len(ran.rows()) == 30 and chosen == {"ba"[number]}
    assert [reason.split("'")[3] for reason in better] == ["response_b", "response_a"]
    decided = proposed(tmp_path / "rows.jsonl", given={"first_answer": 1})["proposals"]
    assert [each["source"]["first_answer"] for each in decided] == [1]


def test_which_end_of_a_scale_around_0_is_which_is_not_guessed(tmp_path: Path) -> None:
    """Answers after whole conversations, judged from -3 to 3."""
    rows = [
        {
            "domain": "general",
            "context": [turn("user", saying(n))],
            "response1": f"a {n}",
            "response2": f"b {n}",
            "overall_preference": n % 7 - 3,
        }
        for n in range(30)
    ]
    report = proposed(write(tmp_path / "rows.jsonl", rows))
    ways = [(each["source"]["first_answer"], each["source"]["second_answer"]) for each in report["proposals"]]
    assert ways == [(-3, 3), (3, -3)]
    for number, each in enumerate(report["proposals"]):
        better = ("response2", "response1")[number]
        assert any(f"if 3 in 'overall_preference' prefers '{better}'" in reason for reason in each["why"])
        ran = run_stage(CLEAN, {"format": "preferences", "source": each["source"]}, tmp_path / f"ran{number}")
        chosen = {row["chosen"][0]["content"][0] for row in ran.rows() if int(row["chosen"][0]["content"][2:]) % 7 > 3}
        assert chosen == {"ba"[number]}


def test_data_that_no_layout_fits_is_told_what_it_lacks(tmp_path: Path) -> None:
    """Spans without labels: the layout spans needs them."""
    path = write(tmp_path / "rows.jsonl", [{"tokens": ["a", "b"], "ner_tags": [0, 1]} for _ in range(5)])
    report = proposed(path)
    assert report["proposals"] == []
    assert "'ner_tags' holds lists of numbers, and tags takes tags of tokens" in report["missing"][0]
    assert (report["rows"]["read"], report["rows"]["kept"], report["rows"]["dropped"]) == (5, 0, 5)


def test_texts_that_may_be_turns_are_shown_both_ways(tmp_path: Path) -> None:
    """Answers that are JSON with a role may be turns, or what is to be learned: nobody but the user knows."""
    turn = {"role": "assistant", "content": "Hello"}
    rows = [
        {"prompt": f"Write {n}", "chosen": json.dumps(turn), "rejected": json.dumps({**turn, "content": f"{n}"})}
        for n in range(9)
    ]
    first, second = proposed(write(tmp_path / "rows.jsonl", rows))["proposals"]
    assert ("turns_in_text" in first["source"], second["source"]["turns_in_text"]) == (False, "json")


def test_what_the_user_decides_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": saying(n), "answer": f"{n}"} for n in range(9)])
    assert source(path, layout="prompts") == {
        "layout": "prompts",
        "columns": {"prompt": "question"},
        "carry": ["answer"],
    }
    assert source(path, format="text", given={"columns": {"text": "answer"}}) == {
        "layout": "text",
        "columns": {"text": "answer"},
    }
    assert source(
        path, layout="label", given={"columns": {"label": "answer", "text": "question"}, "max_row_bytes": 99}
    ) == {
        "layout": "label",
        "columns": {"label": "answer", "text": "question"},
        "max_row_bytes": 99,
    }


def test_what_the_user_decides_leaves_layouts_out_that_have_no_such_thing(tmp_path: Path) -> None:
    rows = [{"prompt": saying(n), "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert source(path, given={"turns_in_text": "json"}) == {"layout": "preference_chat", "turns_in_text": "json"}
    assert source(path, given={"columns": {"instruction": "prompt"}})["layout"] == "preference_alpaca"


def test_columns_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": saying(n)} for n in range(9)])
    for layout, ours in (("label", "label"), ("bio", "tokens")):
        report = proposed(path, layout=layout, given={"columns": {ours: "9"}})
        assert report["proposals"] == [] and report["missing"][0].startswith(f"{layout}: ")


def test_rows_that_are_dropped_are_counted_with_their_reasons(tmp_path: Path) -> None:
    """Of 8 rows: one says what another says, one has no answer, one has an unknown role, one is no JSON."""
    rows: list[Any] = [{"messages": turns(n), "weight": 2} for n in (0, 1, 2, 3, 3)]
    rows += [{"messages": turns(7, answered=False)}, {"messages": [{"role": "wizard", "content": "a"}]}]
    path = write(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "{\n")
    first = proposed(path)["proposals"][0]
    counts = {reason["reason"]: reason["count"] for reason in first["rows"]["reasons"]}
    assert counts == {"exact_duplicate": 1, "no_assistant_turn": 1, "unknown_role": 1, "bad_json": 1}
    assert (first["rows"]["read"], first["rows"]["kept"]) == (8, 4)
    assert first["rows"]["noticed"] == [{"what": "column 'weight' is not read", "count": 5}]
    assert "3 of 8 rows are broken" in first["stops"][0]


def test_only_as_many_rows_are_read_as_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": saying(n)} for n in range(30)])
    rows = proposed(path, num_rows=10)["proposals"][0]["rows"]
    assert (rows["read"], rows["complete"]) == (10, False)
    rows = proposed(path, num_rows=0)["proposals"][0]["rows"]
    assert (rows["read"], rows["complete"]) == (30, True)


PAIR = {"chosen": "good", "rejected": "bad"}


def ranked(**numbers: Any) -> list[Row]:
    """Rows in which most, and not all, of the numbers say so; none in a row says nothing."""
    rows = [{"prompt": saying(n), **PAIR, **numbers} for n in range(20)]
    return [*rows, {"prompt": saying(20), **PAIR}]


@pytest.mark.parametrize(
    "numbers",
    [
        {"chosen_score": 1.0, "rejected_score": 5.0},
        {"score_chosen": "1", "score_rejected": "4.5"},
        {"chosen-rating": 2, "rejected-rating": 3},
        {"chosenReward": -2.5, "rejectedReward": 0.5},
        {"rank_chosen": 2, "rank_rejected": 1},
        {"scores": {"chosen": 1, "rejected": 2}},
        {"ratings": [1, 2]},
    ],
)
def test_pairs_that_their_own_numbers_turn_round_are_not_proposed(numbers: Row, tmp_path: Path) -> None:
    """Neither with the numbers of the best answer below those of the other, nor with its rank above; the columns the other
    way round are proposed, and what the user names is shown with a warning."""
    path = write(tmp_path / "rows.jsonl", ranked(**numbers))
    report = proposed(path)
    (note,) = report["notes"]
    assert note.startswith("NOT PROPOSED: layout preference_chat: in 20 of 20 rows ")
    assert all(each["layout"] != "preference_chat" for each in [*report["proposals"], *report["also_fit"]])
    (note,) = proposed(path, layout="preference_chat")["notes"]
    assert note.startswith("CAREFUL: layout preference_chat: in 20 of 20 rows ")
    if "ratings" not in numbers:
        swapped = proposed(path, given={"columns": {"chosen": "rejected", "rejected": "chosen"}})
        assert (swapped["notes"], swapped["proposals"][0]["layout"]) == ([], "preference_chat")
        assert swapped["proposals"][0]["shown"][0]["row"]["chosen"] == [assistant("bad")]


@pytest.mark.parametrize(
    "numbers",
    [
        {"chosen_score": 5.0, "rejected_score": 1.0},
        {"chosen_score": 1.0, "rejected_score": 1.0},
        {"chosen_rank": 1, "rejected_rank": 2},
        {"chosen_tokens": 10, "rejected_tokens": 20},
        {"ratings": [2, 1]},
        {"score": 3, "scores": [1, 2, 3]},
    ],
)
def test_pairs_whose_numbers_agree_or_judge_nothing_are_proposed(numbers: Row, tmp_path: Path) -> None:
    report = proposed(write(tmp_path / "rows.jsonl", ranked(**numbers)))
    assert (report["notes"], report["proposals"][0]["layout"]) == ([], "preference_chat")


def test_a_choice_between_two_answers_must_be_as_their_numbers_are(tmp_path: Path) -> None:
    """`preference` 1 prefers the first answer, 2 the second: what counts from 0, or names the worse one, is told."""
    for preferences, agrees in (((1, 2), True), ((2, 1), False)):
        rows = [
            {"instruction": saying(n), "output_1": "a", "output_2": "b", "preference": preferences[n % 2]}
            | {"score_1": 5 - n % 2 * 4, "score_2": 3}
            for n in range(20)
        ]
        report = proposed(write(tmp_path / "rows.jsonl", rows))
        proposes = "preference_between" in [each["layout"] for each in report["proposals"]]
        assert (proposes, report["notes"] == []) == (agrees, agrees)
    assert (
        "in 20 of 20 rows 'score_1' and 'score_2' are higher for the answer that 'preference' does not"
        in report["notes"][0]
    )
    swapped = proposed(tmp_path / "rows.jsonl", given={"columns": {"output_1": "output_2", "output_2": "output_1"}})
    assert (swapped["notes"], swapped["proposals"][0]["layout"]) == ([], "preference_between")


def test_numbers_that_judge_several_things_turn_nothing_round_where_they_differ(tmp_path: Path) -> None:
    several = {"chosen_score": 5, "rejected_score": 1, "chosen_quality": 1, "rejected_quality": 2}
    report = proposed(write(tmp_path / "rows.jsonl", ranked(**several)))
    assert (report["notes"], report["proposals"][0]["layout"]) == ([], "preference_chat")


def test_a_list_of_answers_must_be_ordered_as_its_numbers_are(tmp_path: Path) -> None:
    """By the first and the last of three: scores that fall and ranks that rise are as the layout reads them."""
    for name, numbers, agrees in (
        ("scores", [1, 3, 5], False),
        ("scores", [5, 1, 3], True),
        ("rank", [3, 2, 1], False),
        ("rank", [1, 2, 3], True),
        ("lengths", [1, 2, 3], True),
    ):
        rows = [{"instruction": saying(n), "responses": ["a", "b", "c"], name: numbers} for n in range(20)]
        report = proposed(write(tmp_path / "rows.jsonl", rows))
        layouts = [each["layout"] for each in report["proposals"]]
        assert ("preference_alpaca" in layouts, report["notes"] == []) == (agrees, agrees)
        if not agrees:
            assert f"in 20 of 20 rows '{name}' is" in report["notes"][0]
    for reversed_of_ten, agrees in ((2, True), (3, False)):
        rows = [
            {
                "instruction": saying(n),
                "responses": ["a", "b"],
                "scores": [1, 2] if n % 10 < reversed_of_ten else [2, 1],
            }
            for n in range(20)
        ]
        assert (proposed(write(tmp_path / "rows.jsonl", rows))["notes"] == []) == agrees


def test_rows_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    """Of four rows two say the same and are labelled otherwise; of three pairs one is said twice with two margins."""
    labels = [{"text": saying(n // 2), "label": "ab"[n]} for n in (0, 1)] + [{"text": saying(9), "label": "a"}] * 2
    rows = proposed(write(tmp_path / "rows.jsonl", labels), layout="label")["proposals"][0]["rows"]
    (noticed,) = rows["noticed"]
    assert (rows["kept"], noticed["count"]) == (3, 2)
    assert noticed["example"] == f'rows.jsonl:2: {{"label":"b"}}: {saying(0)}'
    pairs = [{"prompt": "q", **PAIR, "margin": margin} for margin in (1, 2)] + [{"prompt": "p", **PAIR}]
    rows = proposed(write(tmp_path / "pairs.jsonl", pairs), layout="preference_chat")["proposals"][0]["rows"]
    assert [each["reason"] for each in rows["reasons"]] == ["contradicts_earlier_row"]
    assert (rows["kept"], rows["noticed"][0]["count"]) == (2, 1)
