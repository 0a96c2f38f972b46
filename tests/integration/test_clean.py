"""The stage `clean`: filters and their reasons, normalization, duplicates, samples, the ledger."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.settings.yaml_loader import parse_yaml
from pipeline.store.artifact import Kind
from stages.data.clean import STAGE, CleanParams
from stages.data.mix import MixParams
from stages.lib.curation.filters import FILTERS, Filters, build_judge
from stages.lib.curation.near_duplicates import Buckets, MinHash, choose_buckets
from stages.lib.curation.normalization import Normalization, normalize_text
from stages.lib.sources.layouts import LAYOUTS
from tests.unit.running_stages import REPO_ROOT, Ran, params_of, problems_of, run_stage

LETTERS = "bcdfghklmn"


def words(count: int, first: int = 0) -> list[str]:
    """Different words of five letters."""
    names = ("".join(letters) for letters in itertools.product(LETTERS, "aeiou", LETTERS, "aeiou", LETTERS))
    return list(itertools.islice(names, first, first + count))


def lines(count: int, first: int = 0, per_line: int = 8) -> list[str]:
    """Different lines of eight different words."""
    chosen = words(count * per_line, first)
    return [" ".join(chosen[index * per_line : (index + 1) * per_line]) for index in range(count)]


def clean(
    folder: Path, rows: list[dict[str, Any]], *, format: str = "text", layout: str = "text", **params: Any
) -> Ran:
    """The stage run on these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"kind": "files", "paths": ["rows.jsonl"], "layout": layout, "max_broken_fraction": 1.0}
    return run_stage(STAGE, {"format": format, "source": source, **params}, folder)


def texts(ran: Ran) -> list[str]:
    return [row["text"] for row in ran.rows()]


# Filters: the good text passes all of them, and each other text has one reason to go.

GOOD = "\n".join(f"{line}." for line in lines(20))
EVERYTHING = {
    "min_characters": 20,
    "max_characters": 2_000,
    "max_line_characters": 200,
    "min_alphanumeric_fraction": 0.5,
    "repetition": {},
    "quality": {"min_mean_word_characters": 3.0},
}
UNIQUE = [f"{line}." for line in lines(60, first=200)]
PARAGRAPHS = ["\n".join(UNIQUE[index * 2 : index * 2 + 2]) for index in range(10)]


def phrase_between_words(phrase: str, gap: int, times: int) -> str:
    """The phrase `times` times, with `gap` words between that stand nowhere else."""
    others = words(gap * times, first=1_000)
    return " ".join(" ".join([*others[index * gap : (index + 1) * gap], phrase]) for index in range(times))


REASONS: list[tuple[str, dict[str, Any], str]] = [
    ("too_short", {}, "nineteen characters"),
    ("too_long", {}, "\n".join(f"{line}." for line in lines(50))),
    ("long_line", {}, " ".join(lines(6))),
    ("few_letters", {}, "a + b = c * ( d - e ) ; " * 2),
    # 4 of 10 paragraphs stood before; paragraphs are judged before lines
    ("repetition_dup_para_frac", {}, "\n\n".join([*PARAGRAPHS[:6], *[PARAGRAPHS[0]] * 4])),
    # 2 of 9 paragraphs stood before (0.22 < 0.3), a long one: 2 x 489 of 1,771 characters (0.55 > 0.2)
    (
        "repetition_dup_para_char_frac",
        {},
        "\n\n".join([*UNIQUE[:6], *["\n".join(UNIQUE[6:16])] * 3]),
    ),
    # 8 of 20 lines stood before
    ("repetition_dup_line_frac", {}, "\n".join([*UNIQUE[:12], *[UNIQUE[0]] * 8])),
    # 4 of 20 lines stood before (0.2 < 0.3), a long one: 4 x 146 of 824 characters (0.71 > 0.2)
    (
        "repetition_dup_line_char_frac",
        {},
        "\n".join([*words(15, first=3_000), *[" ".join(UNIQUE[:3])] * 5]),
    ),
    # 17 characters after 3 words (18): 17 / 36 > 0.2
    ("repetition_top_2_gram", {"quality": None, "max_line_characters": None}, phrase_between_words("elephant elephant", 3, 20)),
    # 3 words (17 characters with spaces) after 12 others (72): 17 / 90 = 0.189 > 0.18; its pairs 11 / 90 < 0.2
    (
        "repetition_top_3_gram",
        {"max_line_characters": None, "quality": None},
        phrase_between_words("zebra otter tiger", 12, 10),
    ),
    # 23 characters after 18 words (108): 23 / 132 = 0.174 > 0.16; its triples 17 / 132 = 0.13 < 0.18
    (
        "repetition_top_4_gram",
        {"max_line_characters": None, "quality": None},
        phrase_between_words("zebra otter tiger eagle", 18, 10),
    ),
    *(
        # a run of n words stands 10 times, with 5 others between: 9 x 5n of 60 (n + 5) characters, 0.375 and more
        (
            f"repetition_duplicated_{n}_n_grams",
            {
                "max_line_characters": None,
                "quality": None,
                "repetition": {
                    "max_top_ngram_fractions": None,
                    "max_duplicate_ngram_fractions": [*[1.0] * (n - 5), 0.1],
                },
            },
            phrase_between_words(" ".join(words(n, first=4_000)), 5, 10),
        )
        for n in range(5, 11)
    ),
    ("quality_no_words", {"min_alphanumeric_fraction": None}, "!?.,;: () -- // !! ?? .. ,,"),
    ("quality_short_doc", {}, " ".join(words(20))),
    ("quality_long_doc", {"quality": {"max_words": 100}}, GOOD),
    ("quality_below_avg_threshold", {}, "\n".join(" ".join(f"{a}{b}" for b in LETTERS) for a in LETTERS)),
    ("quality_above_avg_threshold", {"repetition": None}, "\n".join(first + second + third for first, second, third in zip(words(60), words(60, 60), words(60, 120), strict=True))),
    ("quality_too_many_hashes", {}, "\n".join(f"# {line} # #" for line in lines(10))),
    ("quality_too_many_ellipsis", {}, "\n".join(f"{a}\u2026 {b}\u2026 {c}\u2026 {d}" for a, b, c, d in zip(*[iter(words(80))] * 4, strict=True))),
    ("quality_too_many_bullets", {"min_alphanumeric_fraction": None}, "\n".join(f"- {line}" for line in lines(20))),
    ("quality_too_many_end_ellipsis", {}, "\n".join(f"{line}..." for line in lines(20))),
    ("quality_below_alpha_threshold", {}, "\n".join(f"{line} {index} , {index + 7} ; {index * 31}" for index, line in enumerate(lines(10)))),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "changes", "text"), REASONS, ids=[case[0] for case in REASONS])
def test_one_text_per_reason(reason: str, changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    judge = build_judge(params_of(Filters, {**EVERYTHING, **changes}, tmp_path))
    assert judge(text) == reason


def test_the_good_text_passes(tmp_path: Path) -> None:
    assert build_judge(params_of(Filters, EVERYTHING, tmp_path))(GOOD) is None


def test_every_filter_can_be_turned_off(tmp_path: Path) -> None:
    off = params_of(Filters, {"min_characters": None}, tmp_path)
    assert [build(off) for build in FILTERS.values()] == [None] * len(FILTERS)
    assert build_judge(off)("") is None


def test_short_texts_are_not_judged_for_repetition(tmp_path: Path) -> None:
    """In a text of two words the one pair of words is all of it."""
    assert build_judge(params_of(Filters, {"repetition": {}}, tmp_path))("hello world") is None
    assert (
        build_judge(params_of(Filters, {"repetition": {"min_words": 1}}, tmp_path))("hello world")
        == "repetition_top_2_gram"
    )


def test_chinese_prose_passes_and_chinese_repetition_does_not(tmp_path: Path) -> None:
    judge = build_judge(params_of(Filters, {"repetition": {}, "quality": {}}, tmp_path))
    generator = random.Random(0)
    prose = "\n".join("".join(chr(generator.randrange(0x4E00, 0x9FA5)) for _ in range(30)) + "。" for _ in range(10))
    assert judge(prose) is None
    # four words of two characters, each pair of words in a quarter of the text
    assert judge("天地玄黄宇宙洪荒" * 20) == "repetition_top_2_gram"


def test_filters_drop_tables(tmp_path: Path) -> None:
    judge = build_judge(params_of(Filters, {"repetition": {}, "quality": {}}, tmp_path))
    assert judge("\n".join(f"{a} | {a * a} | {a**3}" for a in range(100))) == "quality_below_alpha_threshold"


def test_filters_keep_novels(shared_data: Path, tmp_path: Path) -> None:
    judge = build_judge(params_of(Filters, {"repetition": {}, "quality": {}}, tmp_path))
    with gzip.open(shared_data / "text" / "litbank_20_novels.jsonl.gz", "rt", encoding="utf-8") as file:
        novel = json.loads(next(file))["text"][:20_000]
    assert judge(novel) is None


# Normalization


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ({}, "a\r\nb\rc", "a\nb\nc"),
        ({"newlines": False}, "a\r\nb", "a\r\nb"),
        ({}, "cafe\u0301", "caf\u00e9"),
        ({"unicode": None}, "cafe\u0301", "cafe\u0301"),
        ({"unicode": "NFKC"}, "\uff21\u2460", "A1"),
        ({}, "\uff21", "\uff21"),
        ({}, "\ufeffa\x00b\x1bc\x0cd\x85e\tf", "abcde\tf"),
        ({"control_characters": False}, "a\x00b", "a\x00b"),
        ({}, "\n\n  a  \n\tb\t\n\u3000\n\nc \n\n", "  a\n\tb\n\n\nc"),
        ({"trailing_whitespace": False}, "a \n", "a \n"),
    ],
)
def test_normalization(how: dict[str, Any], text: str, expected: str, tmp_path: Path) -> None:
    assert normalize_text(text, params_of(Normalization, how, tmp_path)) == expected


def test_every_message_is_normalized_and_empty_ones_drop_the_chat(tmp_path: Path) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    ran = clean(tmp_path, [chat("a \r\n", "b\x00 "), chat("c", "\x00")], format="chats", layout="messages")
    assert ran.rows() == [chat("a", "b")]
    assert ran.result.facts.dropped_rows == {"empty_field": 1}


def test_spans_and_questions_are_never_rewritten(tmp_path: Path) -> None:
    row = {"text": "a\r\nBo \x00", "spans": [{"start": 3, "end": 5, "label": "P"}]}
    assert clean(tmp_path, [row], format="spans", layout="spans").rows() == [row]
    params = {"format": "spans", "source": {"kind": "files", "paths": ["rows.jsonl"], "layout": "spans"}}
    told = problems_of(CleanParams, {**params, "normalization": {"unicode": "NFKC"}}, tmp_path)
    assert "normalization: spans are never rewritten, because their offsets would move" in told
    assert params_of(CleanParams, {**params, "normalization": None}, tmp_path).normalization is None


# Duplicates and samples


def test_exact_duplicates_are_found_after_normalization(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "one"}, {"id": "2", "text": "one\r\n"}, {"id": "3", "text": "two"}]
    ran = clean(tmp_path / "a", rows)
    assert ran.rows() == [rows[0], rows[2]]
    assert ran.json("ledger.json")["dropped"] == {"exact_duplicate": {"count": 1, "examples": ["rows.jsonl:2: one"]}}
    assert texts(clean(tmp_path / "b", rows, drop_exact_duplicates=False)) == ["one", "one", "two"]


def test_rows_with_another_label_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "x"}, {"text": "one", "label": "y"}, {"text": "one", "label": "x"}]
    assert clean(tmp_path, rows, format="labels", layout="label").rows() == rows[:2]


def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "q", "chosen": chosen, "rejected": rejected, **more}


QUESTION = {"context": "one two", "question": "which?"}

CONTRADICTING: dict[str, tuple[str, str, list[dict[str, Any]], dict[str, int]]] = {
    "labels": (
        "labels",
        "label",
        [{"text": "one", "label": label} for label in "xyx"] + [{"text": "two", "label": "x"}],
        {"exact_duplicate": 1},
    ),
    "pairs of texts": (
        "labels",
        "label",
        [{"text": "a", "text_pair": second, "label": label} for second, label in ("bx", "by", "cx")],
        {},
    ),
    "spans": (
        "spans",
        "spans",
        [{"text": "one two", "spans": spans} for spans in ([], [[0, 3, "X"]])] + [{"text": "two", "spans": []}],
        {},
    ),
    "answers": (
        "questions",
        "squad",
        [{**QUESTION, "answers": answers} for answers in ([], [{"text": "one", "answer_start": 0}])]
        + [{**QUESTION, "question": "what?", "answers": []}],
        {},
    ),
    "preferences both ways round": (
        "preferences",
        "preference_chat",
        [pair("a", "b"), pair("b", "a"), pair("a", "c")],
        {},
    ),
    "answers that are desirable and are not": (
        "unpaired_preferences",
        "unpaired_preference",
        [
            {"prompt": "q", "completion": said, "label": label}
            for said, label in (("a", True), ("a", False), ("b", True))
        ],
        {},
    ),
    "margins": (
        "preferences",
        "preference_chat",
        [pair("a", "b", margin=0), pair("a", "b", margin=1), pair("a", "b", margin=0), pair("a", "c", margin=0)],
        {"exact_duplicate": 1, "contradicts_earlier_row": 1},
    ),
    "answers that a reward compares with": (
        "prompts",
        "prompts",
        [{"prompt": "q", "answer": answer} for answer in "010"] + [{"prompt": "p", "answer": "0"}],
        {"exact_duplicate": 1, "contradicts_earlier_row": 1},
    ),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_rows_that_contradict_each_other_are_told_or_dropped(case: str, tmp_path: Path) -> None:
    """The last row contradicts none. The first two do; a third says what the first says. Of two rows with the same content
    one has to go, and is counted as what it is; others stay, and both are told. Asked to, all of them go."""
    format, layout, rows, dropped = CONTRADICTING[case]
    carry = ["answer"] if format == "prompts" else []

    def cleaned(name: str, **params: Any) -> Ran:
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"kind": "files", "paths": ["rows.jsonl"], "layout": layout, "carry": carry}
        return run_stage(STAGE, {"format": format, "source": source, **params}, tmp_path / name)

    ran = cleaned("told")
    assert ran.result.facts.dropped_rows == dropped
    contradicting = 1 if "contradicts_earlier_row" in dropped else 2
    assert ran.result.metrics["rows_contradicting"] == contradicting
    ledger = ran.json("ledger.json")
    (told,) = ledger["noticed"]
    assert told.startswith("say what another row says, and are to teach something else")
    assert len(ledger["noticed_examples"][told]) == contradicting
    assert ledger["noticed_examples"][told][0].startswith("rows.jsonl:1: {")
    assert any(f"{contradicting} rows: {told} (for example rows.jsonl:1: " in note for note in ran.notes)
    if "contradicts_earlier_row" in dropped:
        (example,) = ledger["dropped"]["contradicts_earlier_row"]["examples"]
        assert example.startswith("rows.jsonl:2: {") and "1" in example

    rest = cleaned("dropped", drop_contradicting=True)
    assert rest.rows() == ran.rows()[-1:]
    assert rest.result.facts.dropped_rows == {"contradicting": len(rows) - 1}
    assert "rows_contradicting" not in rest.result.metrics and "noticed" not in rest.json("ledger.json")

    every = cleaned("all", drop_exact_duplicates=False)
    assert (len(every.rows()), every.result.metrics["rows_contradicting"]) == (len(rows), len(rows) - 1)


def test_different_answers_to_one_prompt_and_texts_with_other_columns_contradict_nothing(tmp_path: Path) -> None:
    """Chats may answer one prompt in many ways. A text that carries another address goes, under a name of its own."""
    chats = [{"instruction": "q", "output": output} for output in "ab"]
    ran = clean(tmp_path / "chats", chats, format="chats", layout="alpaca")
    assert (len(ran.rows()), "rows_contradicting" in ran.result.metrics) == (2, False)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "one", "url": "a"}\n{"text": "one", "url": "b"}\n')
    source = {"kind": "files", "paths": ["a.jsonl"], "layout": "text", "carry": ["url"]}
    ran = run_stage(STAGE, {"format": "text", "source": source, "drop_contradicting": True}, tmp_path / "texts")
    assert ran.result.facts.dropped_rows == {"contradicts_earlier_row": 1}
    assert "rows_contradicting" not in ran.result.metrics


def test_a_near_duplicate_with_another_label_counts_as_what_contradicts_it(tmp_path: Path) -> None:
    text = " ".join(words(100))
    rows = [{"text": text, "label": "x"}, {"text": text, "label": "y"}]
    ran = clean(tmp_path, rows, format="labels", layout="label", minhash={})
    assert ran.rows() == rows[:1]
    assert ran.result.facts.dropped_rows == {"contradicts_earlier_row": 1}
    assert ran.json("ledger.json")["dropped"]["contradicts_earlier_row"]["examples"][0].startswith(
        'rows.jsonl:2: {"label":"y"}: '
    )


def test_spans_that_end_inside_words_are_told_with_an_example(tmp_path: Path) -> None:
    rows = [{"text": f"Alice met Bob {n}", "spans": [[0, 4, "P"]]} for n in range(3)]
    ran = clean(tmp_path, rows, format="spans", layout="spans")
    told = "3 of 3 spans begin or end inside a word or with a space; with span_offsets: inclusive it would be 0"
    assert ran.json("ledger.json")["noticed"] == {told: 3}
    assert f"3 rows: {told} (for example [Alic]e met Bob 0)" in ran.notes


def test_minhash_finds_near_duplicates_and_keeps_the_first(tmp_path: Path) -> None:
    """Of 200 words one is changed: of 196 runs of five words 5 differ, so the similarity is 191 / 201 = 0.95, and
    1 - (1 - 0.95^8)^14 is 1 - 10^-7. The other texts share no run."""
    first = words(200)
    changed = [*first[:100], "changed", *first[101:]]
    other = words(200, first=1_000)
    short = ["four", "words", "are", "few"]
    rows = [{"text": " ".join(text)} for text in (other, first, changed, short, [*short[:3], "many"])]
    kept = [rows[index]["text"] for index in (0, 1, 3, 4)]
    ran = clean(tmp_path / "a", rows, minhash={})
    assert texts(ran) == kept
    assert ran.result.facts.dropped_rows == {"near_duplicate": 1}
    assert any("14 buckets of 8 hashes" in note for note in ran.notes)
    assert texts(clean(tmp_path / "b", rows)) == [row["text"] for row in rows]
    assert [path.name for path in (tmp_path / "a" / "clean").rglob("*")] == []


def test_minhash_finds_near_duplicates_in_chinese(tmp_path: Path) -> None:
    generator = random.Random(0)
    poem = [chr(generator.randrange(0x4E00, 0x9FA5)) for _ in range(200)]
    other = [chr(generator.randrange(0x4E00, 0x9FA5)) for _ in range(200)]
    rows = [{"text": "".join(text)} for text in (poem, other, [*poem[:100], "变", *poem[101:]])]
    assert texts(clean(tmp_path, rows, minhash={})) == [row["text"] for row in rows[:2]]


def test_minhash_of_chats_looks_at_all_messages(tmp_path: Path) -> None:
    def chat(content: list[str]) -> dict[str, Any]:
        half = len(content) // 2
        roles = ("user", content[:half]), ("assistant", content[half:])
        return {"messages": [{"role": role, "content": " ".join(part)} for role, part in roles]}

    first = words(200)
    rows = [chat(first), chat([*first[:150], "changed", *first[151:]]), chat([*first[:100], *words(100, first=1_000)])]
    assert clean(tmp_path, rows, format="chats", layout="messages", minhash={}).rows() == [rows[0], rows[2]]


def test_rows_that_share_a_context_are_told_apart_by_what_they_ask(tmp_path: Path) -> None:
    """The paragraph is most of the text; only the last question says the same as another."""
    context = " ".join(words(200))
    asked = [
        "when was it built ?",
        "who lives in the old house now ?",
        "how many rooms does it have ?",
        "When was it built?",
    ]
    rows = [{"id": str(i), "context": context, "question": q, "answers": []} for i, q in enumerate(asked)]
    ran = clean(tmp_path / "questions", rows, format="questions", layout="squad", minhash={})
    assert [row["id"] for row in ran.rows()] == ["0", "1", "2"]
    elsewhere = " ".join(words(200, first=1_000))
    other = [rows[0], {**rows[0], "id": "other", "context": elsewhere}]
    assert len(clean(tmp_path / "contexts", other, format="questions", layout="squad", minhash={}).rows()) == 2


def test_prompts_with_other_answers_are_no_near_duplicates(tmp_path: Path) -> None:
    """A passage with a question behind it: what a reward compares completions with tells them apart."""
    passage = " ".join(words(200))
    asked = [("What is it about?", "a city"), ("Who built it?", "a duke"), ("Who built it then?", "a duke")]
    rows = [{"prompt": f"{passage} {question}", "answer": answer} for question, answer in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "paths": ["rows.jsonl"], "layout": "prompts", "carry": ["answer"]}
    ran = run_stage(STAGE, {"format": "prompts", "source": source, "minhash": {}}, tmp_path)
    assert [row["columns"]["answer"] for row in ran.rows()] == ["a city", "a duke"]
    assert ran.result.facts.dropped_rows == {"near_duplicate": 1}


def test_prompts_on_one_passage_are_told_apart_by_what_they_ask(tmp_path: Path) -> None:
    """Nothing but the question differs, also of chats that are all answered alike; one that asks nearly the same is one."""
    passage = " ".join(words(200))
    asked = ["Where does the river end?", "Which town lies on it?", "Which town lies on it now?"]
    rows = [{"instruction": question, "input": passage, "output": "Yes."} for question in asked]
    for format, layout in (("prompts", "prompts"), ("chats", "alpaca")):
        folder = tmp_path / format
        folder.mkdir()
        given = [{name: row[name] for name in row if name != "output" or format == "chats"} for row in rows]
        ran = clean(folder, given, format=format, layout=layout, minhash={})
        assert len(ran.rows()) == 2 and ran.result.facts.dropped_rows == {"near_duplicate": 1}, format


def test_control_characters_are_told_and_those_of_another_encoding_are_named(tmp_path: Path) -> None:
    """cp1252 read as ISO-8859-1: quotes and dashes become characters that normalization takes out."""
    source = {"kind": "files", "paths": ["a.txt"], "layout": "text", "encoding": "latin-1"}
    for name, said in (("declared", "latin-1"), ("right", "cp1252")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes("\u201ccaf\u00e9\u201d \u2013 5\u20ac\nplain\n".encode("cp1252"))
        ran = run_stage(STAGE, {"format": "text", "source": {**source, "encoding": said}}, tmp_path / name)
        noticed = ran.json("ledger.json").get("noticed", {})
        if name == "right":
            assert noticed == {} and ran.rows()[0]["text"].startswith("\u201ccaf\u00e9\u201d \u2013 5\u20ac")
        else:
            ((what, count),) = noticed.items()
            assert "Set `encoding: cp1252` in the source" in what and count == 1
            assert any("U+0093 before 'caf" in note for note in ran.notes)
    rows = [{"text": "a\u0007b c"}, {"text": "d e\u0085f"}, {"text": "g\th\r\ni"}]
    told = "control characters were taken out (normalization.control_characters)"
    ran = clean(tmp_path / "bell", rows)
    assert ran.json("ledger.json")["noticed"] == {told: 2} and texts(ran)[0] == "ab c"
    ran = clean(tmp_path / "kept", rows, normalization={"control_characters": False})
    assert "noticed" not in ran.json("ledger.json") and texts(ran)[0] == "a\u0007b c"


def test_labels_that_differ_in_form_alone_are_told(tmp_path: Path) -> None:
    labels = ["True", "true", "a\u200b", "a", "b", "b c", "b  c"]
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    ran = clean(tmp_path, rows, format="labels", layout="label")
    assert [row["label"] for row in ran.rows()] == labels
    told = [what.partition(": ")[2] for what in ran.json("ledger.json")["noticed"]]
    assert sorted(told) == ["'True' (1), 'true' (1)", "'a' (1), 'a\\u200b' (1)", "'b  c' (1), 'b c' (1)"]


def test_chats_and_pairs_that_share_most_of_their_text_are_told_apart(tmp_path: Path) -> None:
    shared = " ".join(words(200))
    system = {"role": "system", "content": shared}
    said = [words(8, first=index * 100 + 2_000) for index in range(4)]
    chats = [
        {"messages": [system, {"role": "user", "content": " ".join(q)}, {"role": "assistant", "content": " ".join(a)}]}
        for q, a in ((said[0], said[1]), (said[0], said[2]), (said[3], said[1]), ([*said[0], "again"], said[1]))
    ]
    kept = clean(tmp_path / "chats", chats, format="chats", layout="messages", minhash={}).rows()
    assert kept == chats[:3]
    pairs = [
        {"prompt": shared, "chosen": " ".join(a), "rejected": " ".join(b)}
        for a, b in ((said[0], said[1]), (said[1], said[0]), (said[2], said[3]), ([*said[0], "again"], said[1]))
    ]
    kept = clean(tmp_path / "pairs", pairs, format="preferences", layout="preference_chat", minhash={}).rows()
    assert [row["chosen"][0]["content"] for row in kept] == [pair["chosen"] for pair in pairs[:3]]


def test_buckets_follow_the_wanted_similarity() -> None:
    """1 - (1 - 0.5^5)^22 = 0.503 and 1 - (1 - 0.9^28)^4 = 0.195, against 1 - (1 - 0.9^22)^5 = 0.407."""
    assert choose_buckets(MinHash(similarity=0.5)) == Buckets(count=22, hashes=5)
    assert Buckets(22, 5).chance(0.5) == pytest.approx(0.5027, abs=1e-3)
    assert Buckets(14, 8).chance(1.0) == 1.0
    chosen = choose_buckets(MinHash(similarity=0.9, hashes=112))
    assert chosen.count * chosen.hashes <= 112
    assert abs(chosen.chance(0.9) - 0.5) <= abs(Buckets(5, 22).chance(0.9) - 0.5)


def test_max_rows_is_a_sample_that_the_order_does_not_change(tmp_path: Path) -> None:
    rows = [{"text": f"row {index}"} for index in range(100)]
    ran = clean(tmp_path / "a", rows, max_rows=30)
    again = clean(tmp_path / "b", rows[::-1], max_rows=30)
    smaller = clean(tmp_path / "c", rows, max_rows=10)
    assert len(texts(ran)) == 30
    assert texts(ran) == texts(again)[::-1]
    assert set(texts(smaller)) < set(texts(ran))
    assert texts(ran) != [row["text"] for row in rows[:30]]
    assert ran.result.facts.dropped_rows == {"over_max_rows": 70}


# The artifact


def test_ledger_and_metrics_account_for_every_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b", "history": [["", ""]]},
        {"instruction": "a", "output": "b"},
        {"instruction": "a"},
        {"instruction": "a", "output": 5},
        {"instruction": "a", "output": "long enough to be dropped"},
    ]
    ran = clean(tmp_path, rows, format="chats", layout="alpaca", filters={"max_characters": 20})
    ledger = ran.json("ledger.json")
    assert ledger == {
        "read": 5,
        "kept": 1,
        "dropped": {
            "exact_duplicate": {"count": 1, "examples": ["rows.jsonl:2: a\n\nb"]},
            "missing_field": {"count": 1, "examples": ["rows.jsonl:3: output: {'instruction': 'a'}"]},
            "too_long": {"count": 1, "examples": ["rows.jsonl:5: a\n\nlong enough to be dropped"]},
            "wrong_type": {
                "count": 1,
                "examples": ["rows.jsonl:4: output is a number, not a text: {'instruction': 'a', 'output': 5}"],
            },
        },
        "repaired": {"empty_history_pair": 1},
    }
    assert ran.result.metrics == {
        "rows_read": 5,
        "rows_kept": 1,
        "dropped_exact_duplicate": 1,
        "dropped_missing_field": 1,
        "dropped_too_long": 1,
        "dropped_wrong_type": 1,
        "repaired_empty_history_pair": 1,
        "characters_kept": len("a\n\nb"),
    }
    assert "kept 1 of 5 rows (20.0%)" in ran.notes


def test_a_damaged_file_stops_the_stage_unless_that_is_allowed(tmp_path: Path) -> None:
    """Of 5,000 rows one is broken, and some 2,500 that nobody can count are lost."""
    packed = gzip.compress(b"".join(b'{"text": "row %d"}\n' % index for index in range(5_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    source = {"kind": "files", "paths": ["a.jsonl.gz"], "layout": "text"}
    expected = (
        r"a.jsonl.gz: 1 files break off, .*\(after a.jsonl.gz:\d+\)\. Get them whole, or set allow_damaged_files: true"
    )
    with pytest.raises(DataError, match=expected):
        run_stage(STAGE, {"format": "text", "source": source}, tmp_path)
    shutil.rmtree(tmp_path / "out")
    ran = run_stage(STAGE, {"format": "text", "source": {**source, "allow_damaged_files": True}}, tmp_path)
    assert any(note.startswith("1 files break off, and what stood after is lost") for note in ran.notes)
    assert len(ran.rows()) > 1_000


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source: no row of 2 is left \(too_short 2\). Look at the source"):
        clean(tmp_path, [{"text": "a"}, {"text": "b"}], filters={"min_characters": 5})


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"text": " ".join(words(30, first=index * 7))} for index in range(50)]
    ran = [clean(tmp_path / name, rows, minhash={}, max_rows=40) for name in ("a", "b")]
    for name in ("rows.jsonl", "ledger.json"):
        assert (ran[0].out / name).read_bytes() == (ran[1].out / name).read_bytes()


def test_an_earlier_run_that_was_cut_off_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "clean" / "minhash" / "signatures").mkdir(parents=True)
    (tmp_path / "clean" / "minhash" / "signatures" / "left").write_bytes(b"over")
    (tmp_path / "clean" / "candidates.jsonl").write_bytes(b'["x", {"text": "left over"}]\n')
    assert texts(clean(tmp_path, [{"text": " ".join(words(10))}], minhash={})) == [" ".join(words(10))]


def test_params_may_stand_in_files(tmp_path: Path) -> None:
    recipes = tmp_path / "data_recipes"
    recipes.mkdir()
    (recipes / "rows.jsonl").write_text('{"txt": "one  "}\n{"txt": "x"}\n', encoding="utf-8")
    (recipes / "source.yaml").write_text(
        "kind: files\npaths: [rows.jsonl]\nlayout: text\ncolumns: {text: txt}\n", encoding="utf-8"
    )
    (recipes / "filters.yaml").write_text("min_characters: 2\n", encoding="utf-8")
    params = {"format": "text", "source": "data_recipes/source.yaml", "filters": "data_recipes/filters.yaml"}
    assert texts(run_stage(STAGE, params, tmp_path)) == ["one"]


def test_a_layout_of_another_format_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    source = {"kind": "files", "paths": ["a.jsonl"], "layout": "alpaca"}
    told = problems_of(CleanParams, {"format": "text", "source": source}, tmp_path)
    assert (
        "source: the layout alpaca gives chats, and format is text. Set format: chats, or a layout that gives text: text."
        in told
    )
    source["layout"] = "messages"
    told = problems_of(CleanParams, {"format": "prompts", "source": source}, tmp_path)
    assert told.endswith("Set format: chats, or a layout that gives prompts: prompts.")
    told = problems_of(CleanParams, {"format": "labels", "source": source}, tmp_path)
    assert told.endswith("or a layout that gives labels: label, relation.")
    assert "expected tags: 'python_docs', 'files', 'dataset', 'hub'" in problems_of(
        CleanParams, {"format": "text", "source": {"kind": "file"}}, tmp_path
    )


@pytest.mark.parametrize("format", ["text", "chats", "preferences", "labels", "spans", "questions"])
def test_python_docs_give_every_format(format: str, tmp_path: Path) -> None:
    params = {"format": format, "source": {"kind": "python_docs", "packages": ["json", "argparse"]}}
    ran = run_stage(STAGE, params, tmp_path)
    assert STAGE.output_kind(params_of(CleanParams, params, tmp_path), {}) is Kind(f"{format.removesuffix('s')}_rows")
    assert {"json"} <= {row["group"].split(".")[0] for row in ran.rows()} <= {"json", "argparse"}


README = REPO_ROOT / "data_recipes" / "README.md"


def blocks_of_readme() -> list[dict[str, Any]]:
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    documents = [parse_yaml(block, README.name) for block in blocks]
    assert [problems for _, problems in documents] == [[]] * len(documents)
    return [document for document, _ in documents]


def make_files(source: Any, folder: Path) -> None:
    """Empty files where the example's paths point to."""
    if isinstance(source, str):
        source_path = folder / source
        source_path.parent.mkdir(parents=True, exist_ok=True)
        source_path.write_text("kind: python_docs\n", encoding="utf-8")
        return
    for name in [*source.get("paths", []), *([source["path"]] if "path" in source else [])]:
        path = folder / (name.replace("*", "some") if "." in name else f"{name}/some.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_example_of_the_readme_is_valid(tmp_path: Path) -> None:
    """Sources, and the params of the stages; every kind of source and every layout is shown."""
    kinds, layouts = set(), set()
    for block in blocks_of_readme():
        sources = [block] if "kind" in block else []
        for stage in block.get("stages", {}).values():
            if stage["kind"] == "mix":
                params_of(MixParams, stage.get("params", {}), tmp_path)
            else:
                make_files(stage["params"]["source"], tmp_path)
                params_of(CleanParams, stage["params"], tmp_path)
        for source in sources:
            make_files(source, tmp_path)
            format = LAYOUTS[source["layout"]].format if "layout" in source else "text"
            params_of(CleanParams, {"format": format, "source": source}, tmp_path)
            kinds.add(source["kind"])
            layouts.add(source.get("layout"))
    assert kinds == {"python_docs", "files", "dataset", "hub"}
    assert layouts - {None} == set(LAYOUTS)
