"""Layouts of texts with marked spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import (
    Conversion,
    Dropped,
    is_blank,
    is_whole,
    label_of,
    list_of,
    text_of,
    type_name,
    whole_of,
)
from stages.lib.sources.places import find_part
from stages.lib.sources.span_ends import look_at_ends, span_read_as


def entity_tokens(row: Row, name: str, num_tokens: int) -> tuple[int, int]:
    """Half-open token range of the entity's first mention: FewRel writes [name, id, [[index, ...], ...]]."""
    try:
        mention = list_of(row, name)[2][0]
        start, end = mention[0], mention[-1] + 1
        if end - start != len(mention) or mention != list(range(start, end)):
            # Marks around all of it would make the words between part of the entity.
            raise Dropped("bad_span", f"{name} has tokens that do not follow each other: {mention}")
    except (IndexError, TypeError, KeyError):
        raise Dropped("wrong_type", f"{name} is not [name, id, [[token index, ...]]]") from None
    if not (is_whole(start) and is_whole(end) and 0 <= start < end <= num_tokens):
        raise Dropped("bad_span", name)
    return start, end


# Spans


def spans(row: Row, conversion: Conversion) -> Row:
    """A text and its spans: mappings with start, end and label, or lists [start, end, label]; half-open offsets in
    characters, unless the source's `span_offsets` says otherwise.

    A mapping may hold its `text` as well, which is then what counts: offsets of other tools may count otherwise.
    """
    content = text_of(row, "text")
    found = row.get("spans")
    if found is None:
        raise Dropped("missing_field", "spans")
    if not isinstance(found, list):
        raise Dropped("wrong_type", f"spans is {type_name(found)}, not a list")
    return {"text": content, "spans": [read_span(span, content, conversion) for span in found]}


def read_span(span: Any, content: str, conversion: Conversion) -> Row:
    if isinstance(span, list) and len(span) == 3:
        span = dict(zip(("start", "end", "label"), span, strict=True))
    if not isinstance(span, dict):
        raise Dropped("wrong_type", f"a span is {type_name(span)}")
    missing = [name for name in ("start", "end", "label") if span.get(name) is None]
    if missing:
        raise Dropped("missing_field", f"spans.{missing[0]}")
    start, end = whole_of(span["start"]), whole_of(span["end"])
    if not (is_whole(start) and is_whole(end)):
        raise Dropped("wrong_type", "a span's start and end must be whole numbers")
    said = text_of(span, "text", optional=True)
    for key in sorted(span.keys() - {"id", "start", "end", "label", "text"}):
        if span[key] not in (None, "", [], {}):
            conversion.notice(f"spans have '{key}', which is not read")
    read = span_read_as(content, start, end, conversion.span_offsets)
    if said and (read is None or content[slice(*read)] != said):
        read = find_span(content, said, start if read is None else read[0], conversion)
    if read is None:
        units = f" as {conversion.span_offsets}" if conversion.span_offsets else ""
        raise Dropped("bad_span", f"[{start}, {end}){units} of {len(content)} characters")
    if not said and (odd := look_at_ends(content, start, end, read, conversion.span_ends_in_this_row)):
        conversion.odd_spans_in_this_row.append(odd)
    return {"start": read[0], "end": read[1], "label": label_of(span, "label")}


def find_span(content: str, said: str, start: int, conversion: Conversion) -> tuple[int, int]:
    """The span of a text that does not stand where its offsets say. Raises `Dropped` if it stands nowhere, or who knows where."""
    if start >= 0 and content.startswith(said, start):
        conversion.repair("span_moved")  # only its end is another
        return start, start + len(said)
    place = find_part(content, said, start, conversion, moved="span_moved")
    if place is None:
        raise Dropped("contradictory", f"a span says {said!r}, which stands nowhere in the text")
    return place, place + len(said)


def bio(row: Row, conversion: Conversion) -> Row:
    """Tokens and one tag each (BIO, BIOES, BILOU, BMES, BMEO, BMEWO), as in CoNLL files. The text is the tokens, joined by `token_separator`."""
    tokens, tags = tokens_of(row, "tokens", conversion), list_of(row, "tags")
    if len(tags) != len(tokens):
        raise Dropped("bad_tag", f"{len(tags)} tags for {len(tokens)} tokens")
    found: list[Row] = []
    start, open_label = 0, None
    has_ends, ended = False, 0
    for token, tag in zip(tokens, tags, strict=True):
        prefix, tag_label = read_tag(tag)
        end = start + len(token)
        if prefix == "O":
            open_label = None
        elif prefix in "IE" and open_label == tag_label:
            found[-1]["end"] = end
        else:
            if prefix in "IE":
                conversion.repair("inside_without_begin")
            found.append({"start": start, "end": end, "label": tag_label})
        has_ends, ended = has_ends or prefix in "ES", ended + (prefix in "ES")
        if prefix != "O":
            open_label = None if prefix in "ES" else tag_label
        start = end + len(conversion.token_separator)
    conversion.repair("begin_without_end", len(found) - ended if has_ends else 0)
    return {"text": conversion.token_separator.join(tokens), "spans": found}


TAG_LETTERS = {**{letter: letter for letter in "BIES"}, "M": "I", "L": "E", "U": "S", "W": "S"}
"""Of tags: M for middle is I, L for last is E, U for unit and W for whole are S."""


def read_tag(tag: Any) -> tuple[str, str]:
    """(O, B, I, E or S, label) of a tag, whose letter stands before the label or, as in PER-B, behind it."""
    if tag == "O":
        return "O", ""
    if isinstance(tag, str) and len(tag) > 2:
        if tag[0] in TAG_LETTERS and tag[1] in "-_":
            return TAG_LETTERS[tag[0]], tag[2:]
        if tag[-1] in TAG_LETTERS and tag[-2] in "-_":
            return TAG_LETTERS[tag[-1]], tag[:-2]
    raise Dropped("bad_tag", repr(tag))


def tokens_of(row: Row, name: str, conversion: Conversion) -> list[str]:
    tokens = list_of(row, name)
    if not all(isinstance(token, str) for token in tokens):
        raise Dropped("wrong_type", f"{name} holds something else than texts")
    if not all(tokens):
        raise Dropped("empty_field", f"a token of {name}")
    if not conversion.strip_segment_digit:
        return tokens
    if not all(len(token) > 1 and token[-1] in "0123456789" for token in tokens):
        raise Dropped("wrong_type", "a token carries no segment digit")
    return [token[:-1] for token in tokens]


def pieces(row: Row, conversion: Conversion) -> Row:
    """A text in pieces, some of which have an `entity` (the SNIPS slots)."""
    content, found = "", []
    for piece, entity in read_pieces(row, "pieces"):
        if entity:
            start = len(content) + len(piece) - len(piece.lstrip())
            end = len(content) + len(piece.rstrip())
            if start >= end:
                raise Dropped("bad_span", f"a piece that is a {entity} holds no text")
            found.append({"start": start, "end": end, "label": entity})
        content += piece
    if is_blank(content):
        raise Dropped("empty_field", "pieces")
    return {"text": content, "spans": found}


def read_pieces(row: Row, name: str) -> Iterator[tuple[str, str]]:
    """(text, entity or '') of each piece."""
    for piece in list_of(row, name):
        if not isinstance(piece, dict):
            raise Dropped("wrong_type", f"a piece is {type_name(piece)}, not a mapping")
        if piece.get("text") is None:
            raise Dropped("missing_field", f"{name}.text")
        yield text_of(piece, "text", optional=True), text_of(piece, "entity", optional=True)
