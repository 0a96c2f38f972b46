"""Layouts of texts, alone or with a label."""

from __future__ import annotations

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, class_of, text_of
from stages.lib.sources.layouts_spans import entity_tokens, read_pieces, tokens_of


def text(row: Row, conversion: Conversion) -> Row:
    return {"text": text_of(row, "text")}


# Labels


def label(row: Row, conversion: Conversion) -> Row:
    """A text (or a list of pieces of one), or a pair of texts, and its label.

    A row is a pair where it has a `text_pair`; where `columns` names one, every row must.
    """
    if isinstance(row.get("text"), list):
        row = {**row, "text": "".join(piece for piece, _ in read_pieces(row, "text"))}
    texts = {"text": text_of(row, "text")}
    if "text_pair" in conversion.declared or row.get("text_pair") not in (None, ""):
        texts["text_pair"] = text_of(row, "text_pair")
    if not conversion.unlabelled:
        return {**texts, "label": class_of(row, "label", conversion)}
    if row.get("label") is not None:
        conversion.notice("the label is left out, as unlabelled says")
    return {**texts, "label": None}


def relation(row: Row, conversion: Conversion) -> Row:
    """A sentence in tokens with a head and a tail entity, and their relation as the label (FewRel).

    The entities are marked in the text, as in Baldini Soares et al. 2019 (arXiv:1906.03158): `[E1] Jobs [/E1] founded [E2] Apple [/E2]`.
    """
    tokens = tokens_of(row, "tokens", conversion)
    head, tail = entity_tokens(row, "head", len(tokens)), entity_tokens(row, "tail", len(tokens))
    if head[0] < tail[1] and tail[0] < head[1]:
        raise Dropped("overlapping_entities")
    marked = []
    for index, token in enumerate(tokens):
        marked += [mark for (start, _), mark in ((head, "[E1]"), (tail, "[E2]")) if index == start]
        marked.append(token)
        marked += [mark for (_, end), mark in ((head, "[/E1]"), (tail, "[/E2]")) if index + 1 == end]
    return {"text": conversion.token_separator.join(marked), "label": class_of(row, "label", conversion)}
