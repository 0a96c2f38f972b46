"""Entities as a conversation of three questions: which types, which mentions of one, where they stand.

Of a text with marked spans there is a chat per type, in the order in which the types occur:

    which types of entity does the text have?     PER.NAM$GPE.NAM, or NOTHING
    which are of the type PER.NAM?                a$b
    where do they stand?                          [0,2)$[7,9)

A type is named once, however many entities it has; each mention has its own place, half-open and in characters.
`entities` reads such answers back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from stages.lib.rows.canonical import Row
from stages.lib.text.chat_template import Messages

BETWEEN = "$"
NOTHING = "无"
WHICH_TYPES = "请你帮我判断一下文本存在那些类别。文本为：{}"
WHICH_MENTIONS = "名词类别为'{}'有哪些名词？"
WHERE = "起始位置和终止位置分别是什么？"
PLACE = re.compile(r"\[(\d+),(\d+)\)")


class Entity(NamedTuple):
    """A mention of a type. `start` and `end` are half-open, in characters."""

    label: str
    start: int
    end: int


def entities_of(row: Row) -> set[Entity]:
    """The entities of a row of the format spans."""
    return {Entity(span["label"], span["start"], span["end"]) for span in row["spans"]}


def dialogues(row: Row) -> Iterator[Messages]:
    """A chat per type of the row's entities, or the one of a row that has none. Row: of the format spans."""
    text = row["text"]
    found = sorted(entities_of(row), key=lambda entity: (entity.start, entity.end))
    types = list(dict.fromkeys(entity.label for entity in found))
    opening = [said("user", WHICH_TYPES.format(text)), said("assistant", BETWEEN.join(types) or NOTHING)]
    if not types:
        yield opening
    for label in types:
        own = [entity for entity in found if entity.label == label]
        yield [
            *opening,
            said("user", WHICH_MENTIONS.format(label)),
            said("assistant", BETWEEN.join(text[each.start : each.end] for each in own)),
            said("user", WHERE),
            said("assistant", BETWEEN.join(f"[{each.start},{each.end})" for each in own)),
        ]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def parts(answer: str) -> list[str]:
    """What an answer lists."""
    return [part for part in answer.strip().split(BETWEEN) if part and part != NOTHING]


def entities(text: str, label: str, mentions: str, places: str) -> set[Entity]:
    """The entities that the answers about one type say. One counts where its place is in the text and holds its mention."""
    found = set()
    for mention, place in zip(parts(mentions), parts(places), strict=False):
        if (read := PLACE.fullmatch(place)) and text[int(read[1]) : int(read[2])] == mention:
            found.add(Entity(label, int(read[1]), int(read[2])))
    return found


def mentions_of(text: str, found: Iterable[Entity]) -> set[tuple[str, str]]:
    """(type, mention) of each entity, wherever it stands."""
    return {(entity.label, text[entity.start : entity.end]) for entity in found}


class Said(NamedTuple):
    """What a model says of a text."""

    entities: set[Entity]
    mentions: set[tuple[str, str]]


def ask(texts: Sequence[str], answer: Callable[[list[Messages]], list[str]], most_types: int = 8) -> list[Said]:
    """The entities of each text, out of the model's own answers: `answer` gives the next turn of each of many chats.

    Of the types that an answer lists, the first `most_types` different ones are asked for.
    """
    opened = [[said("user", WHICH_TYPES.format(text))] for text in texts]
    first = answer(opened)
    asked: list[tuple[int, str, Messages]] = []
    for index, (chat, types) in enumerate(zip(opened, first, strict=True)):
        for label in list(dict.fromkeys(parts(types)))[:most_types]:
            question = said("user", WHICH_MENTIONS.format(label))
            asked.append((index, label, [*chat, said("assistant", types), question]))
    second = answer([chat for _, _, chat in asked])
    located = [
        [*chat, said("assistant", mentions), said("user", WHERE)]
        for (_, _, chat), mentions in zip(asked, second, strict=True)
    ]
    third = answer(located)
    found = [Said(set(), set()) for _ in texts]
    for (index, label, _), mentions, places in zip(asked, second, third, strict=True):
        found[index].entities.update(entities(texts[index], label, mentions, places))
        found[index].mentions.update((label, mention) for mention in parts(mentions))
    return found


def f1(found: Sequence[set[object]], expected: Sequence[set[object]]) -> float:
    """2 TP / (found + expected) over all rows together; 0 where there is neither."""
    hits = sum(len(each & right) for each, right in zip(found, expected, strict=True))
    total = sum(map(len, found)) + sum(map(len, expected))
    return 2 * hits / total if total else 0.0
