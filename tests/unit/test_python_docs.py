"""Rows made of Python sources: exact rows of a module written here, and properties of real packages."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pipeline.errors import DataError
from stages.lib.sources.params import PythonDocsSource
from stages.lib.sources.python_docs import FORMATS, python_docs_rows
from stages.lib.sources.python_docs.chats import (
    BASES,
    CLASS_PURPOSE,
    FUNCTION_PURPOSE,
    METHODS,
    PARAMETERS,
    RAISES,
    RETURNS,
)
from stages.lib.sources.python_docs.descriptions import description_of
from stages.lib.sources.python_docs.labels import FEWEST_MODULES, MOST_ROWS_PER_LABEL, MOST_ROWS_PER_MODULE
from stages.lib.sources.python_docs.modules import Excerpt, read_modules
from stages.lib.sources.python_docs.preferences import shuffled, truncated
from stages.lib.sources.python_docs.questions import LONGEST_CONTEXT_CHARACTERS
from stages.lib.sources.python_docs.text import LONGEST_DOCUMENT_CHARACTERS

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = ["email", "json"]
LABELLED = ["email", "http", "logging", "wsgiref", "xml"]

HULL = '''#!/usr/bin/env python3
# A license.
"""Hulls of boats.

They keep the water out.
"""

import os

raise SystemExit("nothing here may run")


# How heavy water is.
DENSITY = 1000


class Hull(Shape):
    """Describe the shape of a hull."""

    def __init__(self, length, beam=2):
        self.length = length

    def draft(self, load, *, salt=True) -> float:
        """Return the draft of the hull in metres. It grows with the load."""
        if load < 0:
            raise ValueError(load)
        return load / self.length

    def _private(self):
        pass


def measure(name: str, unit='m', *rest):
    """Measure the boat of that name in a unit."""
    def inner(depth):
        raise LookupError
    try:
        size = float(name)
    except (KeyError, os.error):
        size = f"{int(0)}"
    return size
'''


@pytest.fixture
def boats(tmp_path):
    """A tree with one package, `boats`, of the modules `boats` (empty) and `boats.hull`."""
    return written(tmp_path, {"boats/__init__.py": "", "boats/hull.py": HULL})


def written(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(root: Path, format: str, packages: list[str] | None = None) -> list[dict]:
    return list(python_docs_rows(root, format, packages))


@pytest.fixture(scope="module")
def real():
    """Format -> rows of `email` and `json`; of labels a few packages more."""
    return {format: rows(STDLIB, format, LABELLED if format == "labels" else PACKAGES) for format in FORMATS}


# The module written here


def test_text_is_docs_then_source(boats):
    """The docs have the module's docstring, then entries by line; the source starts below that docstring.

    The shebang and the license stand above the docstring and go. All of it fits one document of each kind.
    """
    docs, source = rows(boats, "text")
    assert docs == {
        "id": "boats.hull#docs-0",
        "text": "boats.hull\n\nHulls of boats.\n\nThey keep the water out.\n\n"
        "boats.hull.Hull\n    Describe the shape of a hull.\n\n"
        "boats.hull.Hull.draft(load, *, salt=True)\n"
        "    Return the draft of the hull in metres. It grows with the load.\n\n"
        "boats.hull.measure(name, unit='m', *rest)\n    Measure the boat of that name in a unit.",
        "group": "boats.hull",
        "source": "python_docs",
    }
    assert source["id"] == "boats.hull#source-0"
    assert source["text"] == HULL[HULL.index("import os") :].rstrip("\n")


def test_chats_whose_answers_are_json_extract_a_call(boats):
    """All functions, described or not; a method's parameters are those without the instance, and stars are no names."""
    found = list(python_docs_rows(boats, "chats", answers="json"))
    assert [row["id"].removeprefix("boats.hull.") for row in found] == [
        "Hull.__init__#json",
        "Hull.draft#json",
        "Hull._private#json",
        "measure#json",
    ]
    asked, said = found[1]["messages"]
    assert asked["content"] == "Extract name and parameters as JSON from `boats.hull.Hull.draft(load, *, salt=True)`."
    assert said == {"role": "assistant", "content": '{"name": "boats.hull.Hull.draft", "parameters": ["load", "salt"]}'}
    assert json.loads(found[3]["messages"][1]["content"])["parameters"] == ["name", "unit", "rest"]
    assert {row["group"] for row in found} == {"boats.hull"}


def test_answers_in_json_are_chats_and_nothing_else():
    """The default is no part of what a source is, so that what was made of it before is not made anew."""
    source = TypeAdapter(PythonDocsSource).validate_python({"kind": "python_docs", "answers": "json"})
    assert source.given_format == "chats"
    plain = TypeAdapter(PythonDocsSource).validate_python({"kind": "python_docs"})
    assert plain.given_format is None and "answers" not in plain.model_dump()


def test_chats_ask_what_the_source_answers(boats):
    """`draft` has four turns: described, two parameters, a sentence that starts with Return, one raised class.

    `measure` has two: no sentence or annotation says what it returns, and the raise is its inner function's.
    `Hull` derives from Shape, takes what `__init__` takes, and has one public method; `__init__` has no docstring.
    """
    found = {row["id"]: row for row in rows(boats, "chats")}
    draft = (
        "boats.hull.Hull.draft(load, *, salt=True)",
        (FUNCTION_PURPOSE, "Return the draft of the hull in metres. It grows with the load."),
        (PARAMETERS, "It takes `load` and `salt` (`True` by default)."),
        (RETURNS, "It returns the draft of the hull in metres."),
        (RAISES, "It raises `ValueError`."),
    )
    measure = (
        "boats.hull.measure(name, unit='m', *rest)",
        (FUNCTION_PURPOSE, "Measure the boat of that name in a unit."),
        (PARAMETERS, "It takes `name`, `unit` (`'m'` by default) and `*rest`."),
    )
    hull = (
        "boats.hull.Hull",
        (CLASS_PURPOSE, "Describe the shape of a hull."),
        (BASES, "It derives from `Shape`."),
        (PARAMETERS, "It takes `length` and `beam` (`2` by default)."),
        (METHODS, "It has `draft`."),
    )
    expected = {"boats.hull.Hull.draft": draft, "boats.hull.measure": measure, "boats.hull.Hull": hull}
    assert list(found) == [f"{name}#chat" for name in expected]
    for name, (call, *turns) in expected.items():
        messages = found[f"{name}#chat"]["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(turns)
        assert [message["content"] for message in messages[1::2]] == [answer for _, answer in turns]
        for message, (wordings, _) in zip(messages[::2], turns, strict=True):
            assert message["content"] in [wording.format(call) for wording in wordings]


def test_preferences_keep_to_their_module(boats):
    """Two functions have descriptions: each is the only other of the other."""
    described = {
        "boats.hull.Hull.draft(load, *, salt=True)": "Return the draft of the hull in metres. It grows with the load.",
        "boats.hull.measure(name, unit='m', *rest)": "Measure the boat of that name in a unit.",
    }
    found = rows(boats, "preferences")
    assert len(found) == 2
    for row, (call, description) in zip(found, described.items(), strict=True):
        assert row["prompt"] == [{"role": "user", "content": f"What does `{call}` do?"}]
        assert row["chosen"] == [{"role": "assistant", "content": description}]
        rejected = row["rejected"][0]["content"]
        assert row["id"].partition("#")[2] == row["corruption"]
        checks = {
            "other": rejected != description and rejected in described.values(),
            "truncated": description.startswith(rejected) and not rejected.endswith("."),
            "shuffled": rejected != description and Counter(rejected.split()) == Counter(description.split()),
        }
        assert checks[row["corruption"]]


def test_truncated_ends_inside_a_sentence():
    """Ten words: a third to two thirds are 3 to 6. After word 5 a sentence ends, and word 4 closes a quotation.

    So 3 or 6 words are left; over many keys both happen. Without a final stop nothing shows that words are missing.
    """
    description = "Read all 'the bytes'. Then close it, and return them."
    cuts = {truncated(description, f"key {number}") for number in range(50)}
    assert cuts == {"Read all 'the", "Read all 'the bytes'. Then", "Read all 'the bytes'. Then close"}
    assert truncated("Read all the bytes and then close it", "key") == ""


def test_shuffled_permutes_words():
    words = "Write the rows to a file and close it."
    orders = {shuffled(words, f"key {number}") for number in range(50)}
    assert len(orders) > 40  # nine different words have 362,880 orders
    assert {tuple(sorted(order.split())) for order in orders} == {tuple(sorted(words.split()))}
    assert words not in orders
    assert shuffled("so so so so so", "key") == ""


def test_spans_stand_where_the_text_says(boats):
    """`self` is no parameter to find; a type in an f-string has no exact position before Python 3.12.

    The name in `raise LookupError` of the inner function counts: it stands in the text. So does its parameter.
    """
    expected = {
        "boats.hull.Hull.draft": [
            ("load", "parameter"),
            ("salt", "parameter"),
            ("float", "type"),
            ("ValueError", "exception"),
        ],
        "boats.hull.Hull.__init__": [("length", "parameter"), ("beam", "parameter")],
        "boats.hull.measure": [
            ("name", "parameter"),
            ("str", "type"),
            ("unit", "parameter"),
            ("rest", "parameter"),
            ("depth", "parameter"),
            ("LookupError", "exception"),
            ("float", "type"),
            ("KeyError", "exception"),
            ("os.error", "exception"),
        ],
    }
    found = {row["id"].partition("#")[0]: row for row in rows(boats, "spans")}
    assert found.keys() == expected.keys()
    for name, spans in expected.items():
        row = found[name]
        text, cursor, placed = row["text"], text_of_call(row["text"]), []
        for word, label in spans:
            start = text.index(word, cursor)
            cursor = start + len(word)
            placed.append({"start": start, "end": cursor, "label": label})
        assert row["spans"] == placed


def text_of_call(text: str) -> int:
    """Where the parameters begin: the name of the function itself may hold the name of one of them."""
    return text.index("(")


def test_builtin_names_with_another_use_are_no_types(tmp_path):
    """`list` is a parameter and `int` is assigned here, so only `dict` is a type of this function."""
    source = "def merge(list, other):\n    int = len(list)\n    return dict(other, size=int)\n"
    (row,) = rows(written(tmp_path, {"merge.py": source}), "spans")
    assert [(row["text"][span["start"] : span["end"]], span["label"]) for span in row["spans"]] == [
        ("list", "parameter"),
        ("other", "parameter"),
        ("dict", "type"),
    ]


def test_types_are_in_annotations_and_isinstance(tmp_path):
    source = (
        "def check(a: t.Any, b: Sequence[Row | None]):\n"
        "    c: Path = a\n"
        "    return isinstance(b, (Table, io.Raw)) and issubclass(a, Base) and c\n"
    )
    (row,) = rows(written(tmp_path, {"check.py": source}), "spans")
    types = [row["text"][span["start"] : span["end"]] for span in row["spans"] if span["label"] == "type"]
    assert types == ["t.Any", "Sequence", "Row", "Path", "Table", "io.Raw", "Base"]


def test_raised_variables_are_no_exceptions(tmp_path):
    source = (
        "def act(error):\n"
        "    try:\n        raise zlib.error\n"
        "    except self.Problems as problem:\n        raise problem from None\n"
        "    except Exception:\n        raise\n"
        "    raise self.Failed(error)\n"
    )
    (row,) = rows(written(tmp_path, {"act.py": source}), "spans")
    exceptions = [row["text"][span["start"] : span["end"]] for span in row["spans"] if span["label"] == "exception"]
    assert exceptions == ["zlib.error", "Exception"]


def test_questions_are_answered_by_the_context(boats):
    """`draft` raises one class, `measure` none of its own (the raise is its inner function's)."""
    found = {row["id"]: row for row in rows(boats, "questions")}
    draft, measure = "boats.hull.Hull.draft", "boats.hull.measure"
    texts = {
        f"{draft}#raise": ("Which exception does `draft` raise?", "raise ", "ValueError"),
        f"{draft}#default": ("What is the default value of `salt` in `draft`?", "salt=", "True"),
        f"{draft}#first": ("What is the first parameter of `draft`?", "self, ", "load"),
        f"{draft}#last": ("What is the last parameter of `draft`?", "*, ", "salt"),
        f"{draft}#return": ("What does `draft` return?", "return ", "load / self.length"),
        f"{measure}#default": ("What is the default value of `unit` in `measure`?", "unit=", "'m'"),
        f"{measure}#first": ("What is the first parameter of `measure`?", "measure(", "name"),
        f"{measure}#last": ("What is the last parameter of `measure`?", "*", "rest"),
        f"{measure}#return": ("What does `measure` return?", "return ", "size"),
        "boats.hull.Hull.__init__#default": ("What is the default value of `beam` in `__init__`?", "beam=", "2"),
        "boats.hull.Hull.__init__#first": ("What is the first parameter of `__init__`?", "self, ", "length"),
        "boats.hull.Hull.__init__#last": ("What is the last parameter of `__init__`?", "length, ", "beam"),
    }
    for row_id, row in found.items():
        question, before, answer = texts[row_id]
        assert row["question"] == question
        assert row["answers"] == [{"start": row["context"].index(before + answer) + len(before), "text": answer}]
    # What it raises and one default of each function, and one question of the rest.
    assert Counter(row_id.partition("#")[0] for row_id in found) == {
        draft: 3,
        measure: 2,
        "boats.hull.Hull.__init__": 2,
    }
    assert {f"{draft}#raise", f"{draft}#default", f"{measure}#default"} < set(found)


def test_a_generator_has_no_return_question(tmp_path):
    source = "def count():\n    yield 1\n    return 2\n\n\ndef total():\n    return 3\n"
    assert [row["id"] for row in rows(written(tmp_path, {"count.py": source}), "questions")] == ["count.total#return"]


def test_labels_are_large_packages_capped(tmp_path):
    """Three modules of `ships` with 70 functions each: 60 of each are kept, of a function that says ships none.

    `tugs` has as many in two modules, one too few. `rafts` has three modules with one function each.
    """

    def module(word: str, count: int) -> str:
        function = (
            "def {0}_{1}(sails):\n    if sails == {1}:\n        raise {0}Error(sails)\n    return sails * {1} + 1\n"
        )
        padding = "    # " + "x" * 80 + "\n"
        return "".join(function.format(word, number) + padding + "    pass\n" for number in range(count))

    files = {f"ships/part{part}.py": module(f"Part{part}", 70) for part in range(3)}
    files["ships/part0.py"] = (
        "def f(deck):\n" + "    # all Ships have one\n" * 8 + "    return 1\n" + files["ships/part0.py"]
    )
    files |= {f"tugs/part{part}.py": module(f"Tow{part}", 70) for part in range(FEWEST_MODULES - 1)}
    files |= {f"rafts/part{part}.py": module(f"Log{part}", 1) for part in range(3)}
    found = rows(written(tmp_path, files), "labels")
    assert Counter(row["label"] for row in found) == {"ships": 3 * MOST_ROWS_PER_MODULE, "rafts": 3}
    assert Counter(row["group"] for row in found)["ships.part0"] == MOST_ROWS_PER_MODULE
    assert not [row for row in found if "ships" in row["text"].lower()]


def test_labels_are_the_ten_largest_packages(tmp_path):
    """Packages 1 to 12 have three modules with as many functions as their number: 3 to 12 are the ten largest."""
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    function = 'def {0}(sail):\n    """{1}"""\n    return sail\n'
    files = {
        f"p{package}x/m{part}.py": "".join(
            function.format(f"f{number}", f"{words[package]} {part} {number} " * 12) for number in range(package)
        )
        for package in range(1, 13)
        for part in range(3)
    }
    counts = Counter(row["label"] for row in rows(written(tmp_path, files), "labels"))
    assert counts == {f"p{package}x": 3 * package for package in range(3, 13)}


# Files that are not as one would wish


def test_unreadable_files_and_tests_are_left_out(tmp_path):
    function = "def f{}(a, b):\n    return a\n"
    root = written(
        tmp_path,
        {
            "good.py": function.format(1),
            "package/marked.py": b"\xef\xbb\xbf" + function.format(2).encode(),
            "package/windows.py": function.format(3).replace("\n", "\r\n"),
            "wrong.py": "def f(:\n",
            "latin.py": b"# caf\xe9\ndef f(a, b): pass\n",
            "null.py": b"a = '\0'\n",
            "test/support.py": function.format(4),
            "package/tests/cases.py": function.format(5),
            "site-packages/other.py": function.format(6),
            "config-3.11/python-config.py": function.format(7),
            "_sysconfigdata_linux.py": function.format(8),
        },
    )
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    assert [module.name for module in read_modules(root)] == ["good", "package.marked", "package.windows"]
    assert all("\r" not in row["context"] for row in rows(root, "questions"))


def test_columns_are_counted_in_bytes_and_text_in_characters(tmp_path):
    source = "class Cafe:\n    def order(self, name='\u00e9\u4e2d', size=1):\n        return size\n"
    found = rows(written(tmp_path, {"cafe.py": source}), "questions")
    for row in found:
        (answer,) = row["answers"]
        assert row["context"][answer["start"] :].startswith(answer["text"])
    (row,) = rows(tmp_path, "spans")
    assert [row["text"][span["start"] : span["end"]] for span in row["spans"]] == ["name", "size"]


def test_excerpt_ends_at_a_line_and_knows_what_it_holds():
    """The dedented lines have 8, 9 and 10 characters: the first two with their newline make 18, all three 29."""
    lines = ["class A:", "    def f():", "        a = b", "        cc = d"]
    node = ast.parse("\n".join(lines)).body[0].body[0]
    first, second = (statement.targets[0] for statement in node.body)
    for most, text, places in (
        (29, "def f():\n    a = b\n    cc = d", [(13, 14), (23, 25)]),
        (28, None, [(13, 14), None]),
    ):
        excerpt = Excerpt(lines, node, most)
        assert excerpt.text == (text or "def f():\n    a = b")
        assert excerpt.is_whole == (text is not None)
        assert [excerpt.span(target) for target in (first, second)] == places


def test_a_function_copied_between_modules_is_one_row(tmp_path):
    function = "def copied(a, b):\n    '''Copy from a to b and return b.'''\n    return b\n"
    root = written(tmp_path, {"first.py": function, "second.py": function})
    for format in ("chats", "preferences", "spans"):
        assert [row["group"] for row in rows(root, format)] == ["first"], format


def test_long_classes_are_cut_between_methods_and_tables_dropped(tmp_path):
    """A method has 60 characters per line and 31 lines: 1,860 and a bit. Two fit in a document of 4,000, three do not."""
    line = " " * 8 + "x = " + "1" * 47 + "\n"
    methods = [f"    def method_{number}(self):\n" + line * 30 for number in range(5)]
    table = "TABLE = {\n" + "".join(f"    {number}: 'entry',\n" for number in range(400)) + "}\n"
    source = "import os\n" + table + "\n\nclass Long:\n" + "\n".join(methods)
    texts = [row["text"] for row in rows(written(tmp_path, {"long.py": source}), "text")]
    assert len(texts) == 3
    assert all(len(text) <= LONGEST_DOCUMENT_CHARACTERS for text in texts)
    assert "TABLE" not in "".join(texts)
    assert texts[0].startswith("import os\n\n\nclass Long:\n    def method_0")
    assert [text.count("def method") for text in texts] == [2, 2, 1]


@pytest.mark.parametrize(
    ("docstring", "description"),
    [
        ("Open the file.\n\nMore.", "Open the file."),
        ("Open the file\nfor reading.", "Open the file for reading."),
        ("open(path) -> file\n\nOpen the file.", "Open the file."),
        ("open(path) -> file -- Open the file.", "Open the file."),
        ("Open the file with these:\n    path: where it is", ""),
        ("Open it.", ""),
        (">>> open(path) is a file", ""),
        ("", ""),
        ("The first sentence. " + "The second " + "very " * 70 + "long one.", "The first sentence."),
        ("The only " + "very " * 70 + "long one.", ""),
    ],
)
def test_descriptions_are_whole_sentences(docstring, description):
    assert description_of(docstring) == description


def test_wrong_names_are_told_at_once(tmp_path, boats):
    with pytest.raises(DataError, match=r"no format 'chat'\. Did you mean 'chats'"):
        python_docs_rows(boats, "chat")
    with pytest.raises(DataError, match=r"no package or module 'boots'\. Did you mean 'boats'") as error:
        python_docs_rows(boats, "text", ["boots", "trains"])
    assert len(error.value.problems) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Python modules"):
        python_docs_rows(tmp_path / "empty", "text")


# Real packages


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_real_rows_have_ids_groups_and_content(real, format):
    found = real[format]
    assert len({row["id"] for row in found}) == len(found) > 50
    contents = [FORMATS[format].content(row) for row in found]
    assert len(set(contents)) == len(contents)
    for row in found:
        assert row["source"] == "python_docs"
        assert row["id"].startswith((f"{row['group']}.", f"{row['group']}#"))


@pytest.mark.slow
def test_real_groups_are_modules_in_every_format(real):
    modules = {module.name for module in read_modules(STDLIB, PACKAGES)}
    assert {"json", "json.decoder", "email.message"} < modules
    for format in FORMATS:
        groups = {row["group"] for row in real[format] if row["group"].partition(".")[0] in PACKAGES}
        assert groups <= modules
        assert format == "labels" or {"json.decoder", "email.message"} <= groups, format


def test_real_source_keeps_every_line(real):
    """`json` has no table too long for a document: below the module's docstring every line with text is there once."""
    for module in read_modules(STDLIB, ["json"]):
        body = module.tree.body
        start = body[0].end_lineno if ast.get_docstring(module.tree) else 0
        expected = [line.rstrip() for line in module.lines[start : body[-1].end_lineno] if line.strip()]
        texts = [row["text"] for row in real["text"] if row["id"].startswith(f"{module.name}#source")]
        assert [line for text in texts for line in text.split("\n") if line.strip()] == expected


def test_real_text_fits(real):
    lengths = [len(row["text"]) for row in real["text"]]
    assert min(lengths) > 0
    assert max(lengths) <= LONGEST_DOCUMENT_CHARACTERS


def test_real_chats_alternate_and_mostly_have_two_turns(real):
    turns = []
    for row in real["chats"]:
        turns.append(len(row["messages"]) // 2)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * turns[-1]
        assert all(message["content"].strip() for message in row["messages"])
    assert sum(count >= 2 for count in turns) > 0.9 * len(turns)


def test_real_preferences_differ_and_mix(real):
    shares = Counter(row["corruption"] for row in real["preferences"])
    assert shares.keys() == {"other", "truncated", "shuffled"}
    assert min(shares.values()) > 0.15 * shares.total()
    for row in real["preferences"]:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert rejected.strip()
        assert chosen != rejected


def test_real_labels_are_balanced_and_unspoken(real):
    counts = Counter(row["label"] for row in real["labels"])
    assert set(counts) == set(LABELLED)
    assert max(counts.values()) <= MOST_ROWS_PER_LABEL
    assert max(Counter(row["group"] for row in real["labels"]).values()) <= MOST_ROWS_PER_MODULE
    assert all(row["label"].lower() not in row["text"].lower() for row in real["labels"])


BEFORE = {"parameter": r"[(,]\s*\**$", "exception": r"\b(raise|except) [^:]*$"}
"""What stands before a span of these labels, as an oracle for it."""


def test_real_spans_are_ordered_names(real):
    labels = Counter()
    for row in real["spans"]:
        end = 0
        for span in row["spans"]:
            assert end <= span["start"] < span["end"] <= len(row["text"])
            end = span["end"]
            name = row["text"][span["start"] : end]
            assert all(part.isidentifier() for part in name.split("."))
            if before := BEFORE.get(span["label"]):
                assert re.search(before, row["text"][: span["start"]])
            labels[span["label"]] += 1
    assert min(labels[label] for label in ("parameter", "type", "exception")) >= 5


def test_real_answers_follow_what_was_asked_for(real):
    """What stands before an answer in the context is an oracle for it: `raise`, `return`, or the parameter's name."""
    kinds = Counter()
    for row in real["questions"]:
        ((answer,), context) = row["answers"], row["context"]
        before = context[: answer["start"]]
        assert context[answer["start"] :].startswith(answer["text"])
        assert answer["text"].strip() == answer["text"] != ""
        assert len(context) <= LONGEST_CONTEXT_CHARACTERS
        kind = row["id"].rpartition("#")[2]
        kinds[kind] += 1
        if kind in ("raise", "return"):
            assert before.rstrip(" (").endswith(kind)
        elif kind == "default":
            parameter = row["question"].split("`")[1]
            assert parameter in before
            assert before.rstrip(" (").endswith("=")
        else:
            assert before.rstrip(" \n*").endswith(("(", ","))
    assert min(kinds[kind] for kind in ("raise", "default", "first", "last", "return")) > 20


@pytest.mark.slow
def test_rows_do_not_depend_on_the_process():
    """Two processes that hash strings differently write the same bytes, and neither loads torch or what it reads."""
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom stages.lib.sources.python_docs import FORMATS, python_docs_rows\n"
        "for name in FORMATS:\n"
        "    for row in python_docs_rows(Path(sys.argv[1]), name, ['wsgiref', 'json']):\n"
        "        print(json.dumps(row))\n"
        "assert not {'torch', 'wsgiref', 'numpy'} & set(sys.modules)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, str(STDLIB)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) > 200
    assert json.loads(outputs[0].splitlines()[0])["group"] == "json"
