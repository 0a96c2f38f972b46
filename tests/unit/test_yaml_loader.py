"""YAML 1.2 scalars, and equal keys."""

from __future__ import annotations

import pytest

from pipeline.errors import RecipeError
from pipeline.settings.yaml_loader import parse_yaml


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
