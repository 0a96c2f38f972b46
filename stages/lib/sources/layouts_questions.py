"""Layouts of questions about a context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import (
    Conversion,
    Dropped,
    Unusable,
    is_blank,
    is_whole,
    items_of,
    text_of,
    truth_of,
    type_name,
    whole_of,
)
from stages.lib.sources.places import find_part

# Questions


def squad_rows(record: Row) -> Iterator[Row | Unusable]:
    """One raw row per question of a SQuAD document, article or paragraph, or the row itself where it is one already."""
    nested = [name for name in ("data", "paragraphs", "qas") if name in record]
    outer = next((name for name in nested if record[name] is not None), next(iter(nested), None))
    if outer is None or (record[outer] is None and record.get("question") is not None):
        yield record
        return
    for part in items_of(record, outer):
        if isinstance(part, Unusable):
            yield part
        elif outer == "qas":
            yield {**part, "context": record.get("context")}
        else:
            yield from squad_rows(part)


def mapping(value: Any, name: str) -> Row:
    if not isinstance(value, dict):
        raise Dropped("wrong_type", f"{name} holds {type_name(value)}, not a mapping")
    return value


def squad(row: Row, conversion: Conversion) -> Row:
    """A question on a context; answers with their offsets, as nested documents have them or as the hub's columns do."""
    context, question = text_of(row, "context"), text_of(row, "question")
    impossible = None if conversion.unlabelled else says_impossible(row)
    given = [] if conversion.unlabelled else list(read_answers(row, impossible))
    for key in sorted(unread_of_answers(row.get("answers"))):
        conversion.notice(f"answers have '{key}', which is not read")
    if conversion.unlabelled:
        if any(row.get(name) not in (None, [], {}) for name in ("answers", *IMPOSSIBLE, *ANSWERABLE)):
            conversion.notice("the answers are left out, as unlabelled says")
    elif impossible:
        conversion.repair("plausible_answers_left_out", len(given))
        given = []
    elif impossible is False and not given:
        said = next(name for name in (*IMPOSSIBLE, *ANSWERABLE) if truth_of(row, name) is not None)
        raise Dropped("contradictory", f"{said} is {str(said in ANSWERABLE).lower()}, and there is no answer")
    found = [find_answer(context, start, answer, conversion) for start, answer in given]
    answers = [answer for answer in found if isinstance(answer, dict)]
    if given and not answers:
        ambiguous = next((reason for reason in found if isinstance(reason, Dropped)), None)
        raise ambiguous or Dropped("answer_not_in_context", given[0][1])
    conversion.repair("reference_left_out", len(given) - len(answers))
    identity = row.get("id")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        identity = hashlib.sha256(f"{context}\0{question}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    known = None if conversion.unlabelled else answers
    return {"id": str(identity), "context": context, "question": question, "answers": known}


IMPOSSIBLE = (
    *("is_impossible", "impossible", "isImpossible", "unanswerable", "is_unanswerable", "isUnanswerable"),
    *("no_answer", "noAnswer", "not_answerable"),
)
ANSWERABLE = ("answerable", "is_answerable", "isAnswerable", "has_answer", "hasAnswer")
"""How data sets say that a question has no answer in its context, and that it has one."""


def says_impossible(row: Row) -> bool | None:
    """Whether the row says that its question has no answer; None where it says nothing. Raises `Dropped` if it says both."""
    said = {name: truth_of(row, name) for name in (*IMPOSSIBLE, *ANSWERABLE)}
    found = {name: value is (name in IMPOSSIBLE) for name, value in said.items() if value is not None}
    if len(set(found.values())) > 1:
        raise Dropped("contradictory", " and ".join(found))
    return next(iter(found.values()), None)


def read_answers(row: Row, impossible: bool | None) -> Iterator[tuple[int, str]]:
    """(offset, text) of each reference: a list of mappings, or the hub's mapping of two lists. Where there is none (it is
    `impossible`), an empty text is how some data sets write that.
    """
    answers = row.get("answers")
    if answers is None:
        if impossible:
            return
        raise Dropped("missing_field", "answers")
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise Dropped("wrong_type", "answers has no lists text and answer_start of one length")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise Dropped("wrong_type", f"answers is {type_name(answers)}, not a list")
    for answer in answers:
        answer = mapping(answer, "answers")
        if impossible and is_blank(text_of(answer, "text", optional=True)):
            continue
        start = whole_of(answer.get("answer_start", answer.get("start")))
        if start is None:
            raise Dropped("missing_field", "answers.answer_start")
        if not is_whole(start):
            what = f"{start:g}" if isinstance(start, float) else type_name(start)
            raise Dropped("wrong_type", f"answer_start is {what}, not a whole number")
        yield start, text_of(answer, "text")


READ_OF_ANSWERS = frozenset({"text", "answer_start", "start"})


def unread_of_answers(answers: Any) -> set[str]:
    """The keys of references that nothing is done with."""
    each = answers if isinstance(answers, list) else [answers]
    return {str(key) for answer in each if isinstance(answer, dict) for key in answer} - READ_OF_ANSWERS


def find_answer(context: str, start: int, answer: str, conversion: Conversion) -> Row | Dropped | None:
    """The answer at its offset, or else where its text is found; why it cannot be told where; None where it stands nowhere."""
    place: int | None = start
    if start < 0 or not context.startswith(answer, start):
        try:
            place = find_part(context, answer, start, conversion, moved="answer_moved")
        except Dropped as ambiguous:
            return ambiguous
    return None if place is None else {"start": place, "text": answer}
