"""Preferences, in pairs or not, ratings and labels of steps: a function's own description against another's, a truncated one, or a shuffled one."""

from __future__ import annotations

from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import Function, Module, choice

QUESTION = "What does `{}` do?"
FEWEST_WORDS = 5
MIXTURE = ("other",) * 2 + ("truncated",) * 4 + ("shuffled",) * 3
"""The share of each corruption. Where one is impossible the first possible one of `FALLBACK` takes its place, if any."""
FALLBACK = ("truncated", "shuffled")
FEWEST_WORDS_TO_SHUFFLE = 8
"""Of fewer words another order often reads as well as theirs."""


def preference_rows(module: Module) -> Iterator[Row]:
    """Preference rows: one per function with a description of some length, `corruption` saying how the rejected answer was made."""
    described = [function for function in module.functions if len(function.description.split()) >= FEWEST_WORDS]
    for function in described:
        first = MIXTURE[choice(f"{function.name} corruption", len(MIXTURE))]
        for corruption in dict.fromkeys((first, *FALLBACK)):
            if rejected := corrupted(function, corruption, described):
                yield {
                    "id": f"{function.name}#{corruption}",
                    "prompt": [{"role": "user", "content": QUESTION.format(function.call)}],
                    "chosen": [{"role": "assistant", "content": function.description}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "corruption": corruption,
                }
                break


def judged_rows(module: Module) -> Iterator[Row]:
    """Unpaired preference rows: of each pair one answer, whichever the function's name decides, and whether it is its own."""
    for row in preference_rows(module):
        side = ("chosen", "rejected")[choice(f"{row['id']} judged", 2)]
        yield {"id": row["id"], "prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


RATINGS_OF = {"other": (0, 4, 4), "truncated": (4, 1, 3), "shuffled": (4, 4, 0)}
"""Corruption -> relevance, completeness and fluency of such an answer, from 0 to 4; the right one has 4 of each."""


def rated_rows(module: Module) -> Iterator[Row]:
    """Rating rows: the same answers, each rated by how it was made; of every fifth, completeness is not rated."""
    for row in preference_rows(module):
        side = ("chosen", "rejected")[choice(f"{row['id']} judged", 2)]
        relevance, completeness, fluency = (4, 4, 4) if side == "chosen" else RATINGS_OF[row["corruption"]]
        known = choice(f"{row['id']} rated", 5) > 0
        ratings = {"relevance": relevance, "completeness": completeness if known else None, "fluency": fluency}
        yield {"id": row["id"], "prompt": row["prompt"], "completion": row[side], "ratings": ratings}


WORDS_OF_A_STEP = 4


def step_rows(module: Module) -> Iterator[Row]:
    """Step label rows: a description a few words at a time, some steps with their words in another order, which is wrong."""
    for row in preference_rows(module):
        words, steps, labels = row["chosen"][0]["content"].split(), [], []
        for start in range(0, len(words), WORDS_OF_A_STEP):
            said = words[start : start + WORDS_OF_A_STEP]
            right = len(set(said)) < 2 or choice(f"{row['id']} {start}", 3) > 0
            steps.append({"role": "assistant", "content": " ".join(said if right else said[1:] + said[:1])})
            labels.append(right)
        yield {"id": row["id"], "prompt": row["prompt"], "steps": steps, "labels": labels}


def corrupted(function: Function, corruption: str, described: list[Function]) -> str:
    """The rejected answer, or an empty string where this corruption is impossible."""
    if corruption == "truncated":
        return truncated(function.description, function.name)
    if corruption == "shuffled":
        return shuffled(function.description, function.name)
    return description_of_another(function, described)


def description_of_another(function: Function, described: list[Function]) -> str:
    """Another function's description, of the same module: one of a module that is held out must not be in training."""
    others = [other.description for other in described if other.description != function.description]
    return others[choice(f"{function.name} other", len(others))] if others else ""


def truncated(description: str, key: str) -> str:
    """The first third to two thirds of the words, ending inside a sentence.

    Only of a description that ends like a sentence: without that mark a cut one is not recognizably cut.
    """
    words = description.split()
    if not description.endswith((".", "!", "?")):
        return ""
    shortest, longest = max(2, len(words) // 3), len(words) * 2 // 3
    inside = [count for count in range(shortest, longest + 1) if words[count - 1][-1] not in ".!?:;)'\"`"]
    if not inside:
        return ""
    return " ".join(words[: inside[choice(f"{key} cut", len(inside))]]).rstrip(",-")


def shuffled(description: str, key: str) -> str:
    """The same words in another order, of a description that is long enough for the order to matter."""
    words = description.split()
    order = sorted(range(len(words)), key=lambda index: choice(f"{key} word {index}", 2**64))
    permuted = [words[index] for index in order]
    return " ".join(permuted) if permuted != words and len(words) >= FEWEST_WORDS_TO_SHUFFLE else ""
