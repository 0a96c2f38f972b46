"""YAML 1.2 scalars, and equal keys."""

from __future__ import annotations

import itertools
import random
import resource
import time
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.settings import yaml_loader
from pipeline.settings.yaml_loader import MOST_BYTES, MOST_LEVELS, MOST_VALUES, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1.5E3", 1500.0),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("012", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("2026-11-22", "2026-11-22"),
        ('"2e-5"', "2e-5"),
        ("~", None),
        ("", None),
        ("-7", -7),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    document, problems = parse_yaml(f"x: {text}", "recipe.yaml")
    assert document == {"x": value}
    assert type(document["x"]) is type(value)
    assert problems == []


def test_equal_keys_are_reported_with_both_lines_and_the_first_is_kept() -> None:
    document, problems = parse_yaml("a: 1\nb:\n  c: 2\n  c: 3\na: 4\n", "recipe.yaml")
    assert document == {"a": 1, "b": {"c": 2}}
    assert sorted(str(problem) for problem in problems) == [
        "recipe.yaml:4: the key 'c' stands here a second time (first on line 3). Remove one.",
        "recipe.yaml:5: the key 'a' stands here a second time (first on line 1). Remove one.",
    ]


def test_a_key_that_is_no_string_is_reported() -> None:
    document, problems = parse_yaml("1: x", "recipe.yaml")
    assert document == {"1": "x"}
    assert [problem.what for problem in problems] == ["the key 1 is not a string"]


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "a: !!python/object:os.system x"])
def test_what_is_not_plain_yaml_is_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError, match="is not YAML"):
        parse_yaml(text, "recipe.yaml")


def test_bytes_that_are_not_utf8_are_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        parse_yaml(b"a: \xff\xfe\xff", "recipe.yaml")


NAMES = "abcdefghijklm"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise(NAMES)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n" for before, name in itertools.pairwise(NAMES)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LAUGHS, "with its aliases written out it has more than 50,000 values"),
        (MERGES, "with its aliases written out it has more than 50,000 values"),
        ("a: &a '" + "x" * 100_000 + "'\nb: [" + "*a," * 100 + "]", "its values have more than 4,194,304 characters"),
        ("a: &a [*a]", "*a stands within what it means"),
        ("a: &a {<<: *a}", "*a stands within what it means"),
        ("a: *b", "*b means nothing that stands before it"),
        ("[" * 300_000, "more than 64 lists and mappings within each other"),
        ("{a: " * 300_000, "more than 64 lists and mappings within each other"),
        ("- " * 300_000, "more than 64 lists and mappings within each other"),
        ("? " * 300_000, "has a list or a mapping as a key"),
        ("a: " + "[" * 900 + "]" * 900, "more than 64 lists and mappings within each other"),
        ("[a]: 1", "has a list or a mapping as a key"),
        ("? {a: b}\n: c", "has a list or a mapping as a key"),
        ("a: &a [1]\n*a : 1", "has a list or a mapping as a key"),
        ("a: !!bool x", "'x' is no !!bool"),
        ("a: !!float abc", "'abc' is no !!float"),
        ("a: !!timestamp 2026-01-01", "it has the tag !!timestamp"),
        ("a: !!binary aaaa", "it has the tag !!binary"),
        ("!!set {a, b}", "it has the tag !!set"),
        ("!!omap [a: 1]", "it has the tag !!omap"),
        ("a: !!str [1]", "it has the tag !!str"),
        ("a: !mine x", "it has the tag !mine"),
        ("a: 1e999999", "the number '1e999999' is too large for a float"),
        ("a: 1e-999999", "the number '1e-999999' is too close to 0 for a float"),
        ("a: -.inf", "the number '-.inf' is not finite"),
        ("a: .nan", "the number '.nan' is not finite"),
        ("a: " + "1" * 100_000, "has 100,000 digits, and 100 are the most"),
        ("a: 0x" + "f" * 100_000, "has 100,002 digits, and 100 are the most"),
        ("a: b\nc: \x01", "it holds the character U+0001"),
        ('a: "\\ud800"', "found invalid Unicode character escape code"),
        ("a: \udcff", "is not text in UTF-8"),
        ("a: 1\n---\nb: 2", "begins a second document"),
        ("b: {<<: 3}", "<< takes a mapping, or a list of mappings"),
        ("%TAG !a! x\n" * 200 + "--- a", "has more than 100 lines that begin with %"),
        ("\r".join(f"%TAG !a{i}! x" for i in range(70_000)) + "\r--- a", "has more than 100 lines that begin with %"),
        ("\n".join("a: 1" for _ in range(20_000)), "More was not looked for."),
    ],
    ids=lambda value: value[:20],
)
def test_what_would_outgrow_memory_or_time_is_a_sentence_within_a_second(text: str, what: str) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "recipe.yaml")
    assert what in str(caught.value)
    assert "recipe.yaml" in str(caught.value)
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_problem_names_the_line(tmp_path: Path) -> None:
    for text in ("a: 1\nb: !!bool x", "a: 1\nb: 1e999", "a: 1\nb: *c", "a: 1\nb: \x01", "a: 1\nb: }"):
        with pytest.raises(RecipeError, match=r"recipe\.yaml:2: "):
            parse_yaml(text, "recipe.yaml")


def test_what_stays_below_the_limits_is_read() -> None:
    assert parse_yaml("a: " + "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1), "r")[1] == []
    numbers = ["1"] * (MOST_VALUES - 3)
    document, problems = parse_yaml(f"a: [{','.join(numbers)}]", "r")
    assert (len(document["a"]), problems) == (MOST_VALUES - 3, [])
    with pytest.raises(RecipeError, match="more than 50,000 values"):
        parse_yaml(f"a: [1,1,{','.join(numbers)}]", "r")


def test_levels_of_what_an_alias_stands_for_count_where_it_stands() -> None:
    """Two thirds of the levels, within two thirds of the levels."""
    levels = MOST_LEVELS * 2 // 3
    text = f"a: &a {'[' * levels}{']' * levels}\nb: {'[' * levels}*a{']' * levels}"
    with pytest.raises(RecipeError, match="more than 64 lists and mappings within each other"):
        parse_yaml(text, "r")


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("", None),
        ("# nothing", None),
        ("[1, a]", [1, "a"]),
        ("a", "a"),
        ("a: !!float 3", {"a": 3.0}),
        ("a: !!str 3", {"a": "3"}),
        ("a: ! 3", {"a": "3"}),
        ("a: !!map {b: !!seq [1]}", {"a": {"b": [1]}}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a: 0e9", {"a": 0.0}),
        ("a: 1" + "0" * 80, {"a": 10**80}),
        ("a: &x {p: 1, q: 2}\nb: {q: 3, <<: *x}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: &x {p: 1}\nb: &y {p: 2, q: 2}\nc: {<<: [*x, *y]}", {"a": {"p": 1}, "b": {"p": 2, "q": 2}, "c": {"p": 1, "q": 2}}),
        ("a: &x 5\nb: [*x, *x]", {"a": 5, "b": [5, 5]}),
        ("a: <<", {"a": "<<"}),
        ("'<<': 1", {"<<": 1}),
        ("%YAML 1.2\n---\na: 1\n...\n", {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)  # fmt: skip
def test_honest_documents_are_read_as_they_are_meant(text: str, document: object) -> None:
    for form in (text, text.encode(), text.removeprefix("\ufeff").encode("utf-16")):
        assert parse_yaml(form, "r") == (document, [])


def test_two_aliases_of_one_block_are_two_blocks() -> None:
    document, _ = parse_yaml("a: &a {b: [1]}\nc: *a\nd: {<<: *a}", "r")
    document["c"]["b"].append(2)
    document["d"]["b"].append(3)
    assert document == {"a": {"b": [1]}, "c": {"b": [1, 2]}, "d": {"b": [1, 3]}}


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Five gigabytes of zeros that take no room; to read them would take seconds and all memory."""
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(5 << 30)
    started = time.process_time()
    with pytest.raises(RecipeError, match=f"has 5,368,709,120 bytes, and {MOST_BYTES:,} are the most"):
        load_yaml(tmp_path / "big.yaml")
    with pytest.raises(RecipeError, match="are the most that is read"):
        parse_yaml("#" * (MOST_BYTES + 1), "--set a.b")
    assert time.process_time() - started < 1


class Documents:
    """Makes YAML at random: nesting, anchors, aliases, merges, tags, odd scalars and keys, and breaks some of it."""

    SCALARS = (
        "a", "1", "2e-5", "-", "~", "''", "'x", '"\\0"', '"\\ud800"', "<<", "!!bool x", "!!int 3", "!x y", "!!set {}", "1e999",
        "9" * 300, "*", "&", "|", ">", "%", "@", "\x00", "\x85", "\u2028", "\ufeff", "\udc80", ": ", "#", "? ", ".nan", "0x",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.anchors = 0

    def text(self) -> str:
        blocks = [f"k{i}: {self.node(0)}" for i in range(self.random.randint(1, 12))]
        text = self.random.choice(["", "", "", "--- ", "%YAML 1.2\n---\n", "!!map\n"]) + "\n".join(blocks)
        if self.random.random() < 0.3:
            cut = self.random.randrange(len(text))
            text = (
                text[:cut]
                + self.random.choice("[]{}:,&*!|>'\"%@#\n\t-? ") * self.random.choice([1, 2, 300])
                + text[cut:]
            )
        return text

    def node(self, level: int) -> str:
        """A value, half of them with an anchor, which only what stands after it refers to."""
        value = self.value(level)
        if value.startswith(("*", "&")) or self.random.random() < 0.5:
            return value
        self.anchors += 1
        return f"&n{self.anchors} {value}"

    def value(self, level: int) -> str:
        kind = self.random.random()
        if level > 6 or kind < 0.25:
            ordinary = self.random.random() < 0.95
            return self.random.choice(("a", "1", "2e-5", "true", "~", "'x'", "b c") if ordinary else self.SCALARS)
        if kind < 0.5 and self.anchors:
            count = self.random.choice([1, 1, 1, 9, 200])
            names = [f"*n{self.random.randint(1, self.anchors)}" for _ in range(count)]
            return names[0] if count == 1 else f"[{', '.join(names)}]"
        inner = [self.node(level + 1) for _ in range(self.random.randint(0, 4))]
        if kind < 0.7:
            return f"[{', '.join(inner)}]"
        odd = ["<<", "<<", "1", "? [x]", "*n1 ", "&k q"]
        keys = [f"a{i}" if self.random.random() < 0.95 else self.random.choice(odd) for i in range(len(inner))]
        return "{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, inner, strict=True)) + "}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_documents_at_random_are_read_or_refused_and_nothing_else(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 documents a seed. A tenth of the limit makes more of them meet it."""
    monkeypatch.setattr(yaml_loader, "MOST_VALUES", MOST_VALUES // 10)
    ends = []
    for number in range(150):
        text = Documents(1000 * seed + number).text()
        for form in (text, text.encode("utf-8", "surrogatepass")):
            try:
                document, _ = parse_yaml(form, "r")
            except RecipeError as error:
                ends.append(str(error).partition(":")[0])
                continue
            assert len(repr(document)) < 100 * yaml_loader.MOST_VALUES, text
            ends.append("read")
    assert set(ends) == {"read", "r"}, "each was read, or refused with a sentence that names the file"
