"""Columns that a source carries: they pass `clean` and `mix` unchanged, and rewards find them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from stages.data import clean, mix
from stages.lib.on_policy.reward_params import ExactMatchReward
from stages.lib.on_policy.rewards import check_rows, score_programmatic
from stages.lib.on_policy.samples import Completion, Sample
from tests.rows import word_problems
from tests.unit.running_stages import Ran, run_stage


def cleaned(folder: Path, source: dict[str, Any], **params: Any) -> Ran:
    return run_stage(clean.STAGE, {"format": "chats", "source": source, **params}, folder)


def sides(ran: Ran) -> list[dict[str, Any]]:
    return [*ran.rows("train.jsonl"), *ran.rows("heldout.jsonl")]


@pytest.mark.parametrize("minhash", [None, {}], ids=["exact", "near duplicates"])
def test_columns_pass_cleaning_and_mixing(minhash: dict[str, Any] | None, tmp_path: Path) -> None:
    """Texts are normalized (the blank behind the answer goes), columns are not. Of two rows that say the same the first is
    kept with its columns, and as these differ the other one counts as what contradicts it. Every row of the mix has what stood beside its question, also where it is drawn twice."""
    # Near-duplicate search reads all numbers as one, so it is words that tell the questions apart: six in each, all different.
    words = ["".join(letters) for letters in itertools.product("bcdfg", "aeiou", "klmnp", "aeiou")]
    raw = [
        {"question": " ".join(words[6 * n : 6 * n + 6]), "answer": f"{n} ", "number": n, "even": n % 2 == 0}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*raw, {**raw[0], "number": -1}]), encoding="utf-8"
    )
    source = {
        "kind": "files",
        "paths": [str(tmp_path / "rows.jsonl")],
        "layout": "alpaca",
        "columns": {"instruction": "question", "output": "answer"},
        "carry": ["answer", "number", "even"],
    }
    rows = cleaned(tmp_path / "rows", source, minhash=minhash)
    assert rows.result.facts.dropped_rows == {"contradicts_earlier_row": 1}
    plain = cleaned(tmp_path / "plain", {**source, "carry": []})
    assert [{name: row[name] for name in row if name != "columns"} for row in rows.rows()] == plain.rows()
    mixed = run_stage(
        mix.STAGE,
        {"heldout_fraction": 0.2, "budgets": {"a": 100}, "on_exhausted": "repeat"},
        tmp_path / "mixed",
        {"sources.a": rows.out},
    )
    expected = {row["question"]: {name: row[name] for name in ("answer", "number", "even")} for row in raw}
    found = sides(mixed)
    assert len(mixed.rows("train.jsonl")) == 100 > len(raw)
    assert {row["messages"][0]["content"] for row in found} == set(expected)
    for row in found:
        assert row["columns"] == expected[row["messages"][0]["content"]]
        assert row["messages"][1]["content"] == row["columns"]["answer"].strip()


def test_carried_columns_change_nothing_in_the_split(tmp_path: Path) -> None:
    raw = "".join(json.dumps({"instruction": f"q{n}", "output": f"a{n}", "level": n}) + "\n" for n in range(200))
    (tmp_path / "a.jsonl").write_text(raw, encoding="utf-8")
    texts = []
    for name, carry in (("with", ["level"]), ("without", [])):
        source = {"kind": "files", "paths": [str(tmp_path / "a.jsonl")], "layout": "alpaca", "carry": carry}
        rows = cleaned(tmp_path / name, source)
        mixed = run_stage(mix.STAGE, {}, tmp_path / f"{name} mixed", {"sources.a": rows.out})
        texts.append([row["messages"] for row in sides(mixed)])
    assert texts[0] == texts[1]


def test_rewards_find_the_answers_of_word_problems(tmp_path: Path) -> None:
    """Each row carries an answer that ends in `#### ` and the sum of the two numbers of its question."""
    lines = [json.dumps(row) + "\n" for row in word_problems(60)]
    (tmp_path / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    source = {
        "kind": "files",
        "paths": [str(tmp_path / "problems.jsonl")],
        "layout": "alpaca",
        "columns": {"instruction": "question", "output": "answer"},
        "carry": ["answer"],
    }
    rows = cleaned(tmp_path / "rows", source, max_rows=50)
    mixed = sides(run_stage(mix.STAGE, {}, tmp_path / "mixed", {"sources.problems": rows.out}))
    assert len(mixed) == 50
    reward = ExactMatchReward(kind="exact_match", column="answer", extract=r"#### (\S+)")
    check_rows([reward], [(index, row["messages"][:1], row) for index, row in enumerate(mixed)])
    samples = [
        Sample(index, row["messages"][:1], Completion(text, num_tokens=1, ended=True), row)
        for index, row in enumerate(mixed)
        for text in (row["messages"][1]["content"], "I do not know.")
    ]
    assert score_programmatic([reward], samples) == [[1.0, 0.0] * 50]
