"""What converters of raw rows share: why a row is not used, what may be mended in it, and how its fields are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from stages.lib.rows.blank import is_blank
from stages.lib.rows.canonical import Row
from stages.lib.rows.ledger import MAX_EXAMPLES


@dataclass(frozen=True)
class Reason:
    """Why a row is not used, or what was mended in it."""

    meaning: str
    broken: bool = True
    """Whether it speaks against the source: too large a share of broken rows stops the stage."""


REASONS: dict[str, Reason] = {
    # found by readers
    "bad_json": Reason("is not JSON"),
    "repeated_key": Reason("has a key twice in one mapping, which says two things"),
    "not_a_record": Reason("is JSON, but neither a mapping nor a list"),
    "not_utf8": Reason("is not UTF-8 text, or holds half of a surrogate pair"),
    "row_too_long": Reason("has more than max_row_bytes; it was not parsed"),
    "empty_row": Reason("holds nothing"),
    "bad_csv_row": Reason("has unbalanced quotes, or more or fewer fields than the header"),
    "repeated_header": Reason("is the header once more, as where files were put one behind another", broken=False),
    "bad_conll_row": Reason("has a line without the token or the tag column"),
    "damaged_file": Reason("the file ends early or cannot be read from here on; its other rows are lost"),
    # found by converters
    "missing_field": Reason("lacks a field that the layout needs"),
    "wrong_type": Reason("has a field of another type than the layout needs"),
    "empty_field": Reason("has an empty text where there must be one"),
    "unknown_role": Reason("has a turn whose role is none of user, assistant, system, tool or their synonyms"),
    "bad_turn_order": Reason("does not alternate between user and assistant"),
    "no_assistant_turn": Reason(
        "has no assistant turn to learn from (for what a policy is asked there is format: prompts)"
    ),
    "bad_history": Reason("has a history pair with other than two texts, or only one of them empty"),
    "pair_differs_early": Reason("has chosen and rejected that differ before the last assistant turn"),
    "several_answers_differ": Reason(
        "has chosen and rejected with the same questions and several answers that differ", broken=False
    ),
    "identical_pair": Reason("has the same chosen and rejected answer", broken=False),
    "one_answer": Reason("has fewer than two answers to prefer among", broken=False),
    "bad_tag": Reason(
        "has a tag that is neither O nor one of B-, I-, M-, E-, L-, S-, U- and a label, or other than one per token"
    ),
    "bad_span": Reason("has a span outside its text, or an empty one"),
    "overlapping_entities": Reason("has a head and a tail entity that overlap"),
    "answer_not_in_context": Reason("has answers, and none of them stands in the context"),
    "ambiguous_place": Reason("has a span or an answer whose text stands several times, and not at its offset"),
    "not_text": Reason("has parts that are no text, such as images", broken=False),
    "rated_bad": Reason("was rated bad, so it is nothing to learn from", broken=False),
    "contradictory": Reason("says one thing in two places, and they differ"),
    "partial_weight": Reason(
        "has an assistant turn that is to be trained on in part, or by a weight other than 0 and 1; chats cannot express it"
    ),
    "not_trained_on": Reason("has no assistant turn that is to be trained on", broken=False),
    "tie": Reason("prefers neither of two answers", broken=False),
    "unrated": Reason("has neither a rating nor the label of a step", broken=False),
    "bad_steps": Reason("has steps that do not go together with their labels, or none"),
    "nothing_in_it": Reason("is a list of articles, paragraphs, questions or instances that is empty", broken=False),
    "no_label": Reason(
        "has a label that stands for none, such as - or -1 (set no_label: [] where each label is a class)", broken=False
    ),
}


REPAIRS: dict[str, str] = {
    "empty_history_pair": "a history pair of two empty texts, used as padding, was left out",
    "opening_assistant_turn": "an assistant turn before the first user turn was left out",
    "empty_system_turn": "a system message that says nothing was left out",
    "answers_between_best_and_worst": "of several ranked answers, those between the first and the last were left out",
    "inside_without_begin": "an I- tag that continues nothing began a new span",
    "begin_without_end": "a span without its E- (or S-) tag, in a row that has such, ended with its last token",
    "span_moved": "a span's offsets were moved to the one place where its own text stands",
    "plausible_answers_left_out": "an answer to a question that says of itself to have none was left out",
    "answer_moved": "an answer's offset was moved to the one place where its text stands",
    "offset_in_utf16": "an offset of a text that stands several times counts UTF-16 units, and was read so",
    "offset_in_utf8": "an offset of a text that stands several times counts bytes of UTF-8, and was read so",
    "steps_not_chosen_left_out": "a completion of a step was left out that was not the one chosen",
    "neutral_steps_called_right": "a step that was rated neutral counts as right",
    "reference_left_out": "one of several reference answers was left out: it does not stand in the context, or several times and not at its offset",
}


class Dropped(Exception):
    """This row is not used. `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


NO_LABEL = ("-", "-1")
"""Labels that stand for none: of SNLI, where annotators did not agree, and of `datasets`, where nobody may know."""


class Unusable(NamedTuple):
    """A part of a record that gives no row, and why: the parts beside it are read all the same."""

    raw: Any
    reason: Dropped


@dataclass
class Conversion:
    """What a converter may consult besides the row: the source's options. It counts what it repairs in rows it keeps."""

    token_separator: str = " "
    strip_segment_digit: bool = False
    turns_in_text: str | None = None
    unlabelled: bool = False
    first_answer: float | None = None
    second_answer: float | None = None
    no_label: tuple[str, ...] = NO_LABEL
    span_offsets: str | None = None
    rating_columns: tuple[str, ...] = ()
    declared: frozenset[str] = frozenset()
    """Our names of the columns that the source's `columns` names."""
    repaired: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    """What the user should know of rows that are kept as they are, in words -> how many rows."""
    preferred: Counter[str] = field(default_factory=Counter)
    """Of rows whose source does not say from which number answers are counted: 0, 1, `above 1` or `between` -> how many."""
    in_this_row: Counter[str] = field(default_factory=Counter)
    noticed_in_this_row: set[str] = field(default_factory=set)
    span_ends: Counter[str] = field(default_factory=Counter)
    """Of the spans of rows that are kept: what `look_at_ends` counts, and `rows` with an odd one."""
    span_ends_in_this_row: Counter[str] = field(default_factory=Counter)
    odd_spans: list[str] = field(default_factory=list)
    """How the first of the odd ones look."""
    odd_spans_in_this_row: list[str] = field(default_factory=list)

    def repair(self, name: str, count: int = 1) -> None:
        assert name in REPAIRS, name
        if count:
            self.in_this_row[name] += count

    def notice(self, what: str) -> None:
        self.noticed_in_this_row.add(what)

    def apart(self) -> Conversion:
        """One of the same options, whose counts nobody reads."""
        return replace(
            self,
            repaired=Counter(),
            noticed=Counter(),
            preferred=Counter(),
            in_this_row=Counter(),
            noticed_in_this_row=set(),
        )

    def begin_row(self) -> None:
        self.in_this_row.clear()
        self.noticed_in_this_row.clear()
        self.span_ends_in_this_row.clear()
        self.odd_spans_in_this_row.clear()

    def finish_row(self) -> None:
        self.repaired.update(self.in_this_row)
        self.noticed.update(self.noticed_in_this_row)
        self.span_ends.update(self.span_ends_in_this_row)
        self.span_ends["rows"] += bool(self.odd_spans_in_this_row)
        self.odd_spans = (self.odd_spans + self.odd_spans_in_this_row)[:MAX_EXAMPLES]


def text_of(row: Row, name: str, *, optional: bool = False) -> str:
    """The text in a field. Optional ones may be missing, null or empty, and are '' then."""
    value = row.get(name)
    if value is None:
        if optional:
            return ""
        raise Dropped("missing_field", name)
    if not isinstance(value, str):
        raise Dropped("wrong_type", f"{name} is {type_name(value)}, not a text")
    if not optional and is_blank(value):
        raise Dropped("empty_field", name)
    return value


def items_of(record: Row, name: str) -> Iterator[Row | Unusable]:
    """The mappings in a list; what stands there instead of one, and a list that is none or empty, as unusable."""
    value = record.get(name)
    if not isinstance(value, list):
        what = Dropped("missing_field", name)
        yield Unusable(
            record, what if value is None else Dropped("wrong_type", f"{name} is {type_name(value)}, not a list")
        )
    elif not value:
        yield Unusable(record, Dropped("nothing_in_it", name))
    else:
        for item in value:
            if isinstance(item, dict):
                yield item
            else:
                yield Unusable(item, Dropped("wrong_type", f"{name} holds {type_name(item)}, not a mapping"))


def list_of(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if value is None:
        raise Dropped("missing_field", name)
    if not isinstance(value, list):
        raise Dropped("wrong_type", f"{name} is {type_name(value)}, not a list")
    if not value:
        raise Dropped("empty_field", name)
    return value


TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def truth_of(row: Row, name: str, words: Mapping[str, bool] = TRUTHS) -> bool | None:
    """A truth value, also where it is written as a number (0, 1) or a text (`words`, in any case); None where none is given.

    Raises `Dropped` for anything else: what is no truth value must not be read as a no.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and is_blank(value)):
        return None
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise Dropped("wrong_type", f"{name} is {value!r}, neither true nor false")
    return bool(value)


def class_of(row: Row, name: str, conversion: Conversion) -> str:
    """`label_of`, unless it is what the source's `no_label` names: - (SNLI) or -1 (`datasets`), which are no classes."""
    label = label_of(row, name)
    if label in conversion.no_label:
        raise Dropped("no_label", f"{name} is {label}, which no_label names")
    if label.lower() in NO_VALUE:
        conversion.notice(
            f"a label is {label!r}, which others write for none, and stays a class: name it in no_label where it is none"
        )
    if isinstance(row.get(name), str) and POINT_AND_ZERO.fullmatch(label):
        conversion.notice(
            "labels are texts such as 1.0 and stay so: 1, as other rows or files may have it, is another label"
        )
    return label


NO_VALUE = frozenset({"nan", "none", "null", "nil", "n/a", "na", "<na>", "#n/a", "undefined"})
"""What programs write into tables where there is no value. Each may be a class as well."""

POINT_AND_ZERO = re.compile(r"[+-]?\d+\.0+")
"""How pandas writes whole numbers into CSV files where one is missing."""


def label_of(row: Row, name: str) -> str:
    """A label: a text, or a whole number or truth value written as one. pandas writes whole numbers as 1.0 beside gaps."""
    value = row.get(name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return text_of(row, name).strip()


def type_name(value: Any) -> str:
    names = {
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), type(value).__name__)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole_of(value: Any) -> Any:
    """The number as a whole one where it is one: a column of offsets in which some are missing comes as 20.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def one_of(turn: Row, keys: tuple[str, ...], meaning: Callable[[Any], Any] = lambda value: value) -> Any:
    """What stands under the first of the keys that the turn has. Raises `Dropped` if another says something else, that is,
    has another `meaning`.
    """
    given = [turn[key] for key in keys if turn.get(key) is not None]
    if any(meaning(value) != meaning(given[0]) for value in given[1:]):
        raise Dropped("contradictory", " and ".join(key for key in keys if turn.get(key) is not None))
    return given[0] if given else None
