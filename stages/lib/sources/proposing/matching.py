"""Which columns of a sample may be a layout's, by what they hold and by what they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.lib.sources.proposing.columns import Column
from stages.lib.sources.proposing.forms import IDENTITIES, Form, Matched, Slot, plain_name
from stages.lib.sources.proposing.scores import number_in

OWN_NAME, KNOWN_NAME, ONLY_ONE, BY_POSITION = 1.0, 0.9, 0.45, 0.4
"""How sure a column is: it has our name; one of the names that others use, less for each before it; none, and no other
column holds such; none, and columns have no names at all.
"""
LESS_PER_NAME = 0.01
LONGEST_LABEL_CHARACTERS = 60
FEW_ROWS = 20
SHORTEST_SAYING_CHARACTERS = 5
MOST_UNLIKE = 3.0


def match(form: Form, columns: Sequence[Column], given: Mapping[str, str], num_rows: int) -> Matched:
    """The columns that the form would read. `given` are those that somebody has decided: our name -> theirs."""
    taken = {column.name for column in columns if column.name in given.values()}
    found = dict(given)
    strengths = []
    missing = []
    for slot in sorted(form.slots, key=lambda slot: slot.optional):
        if slot.ours in found:
            strengths.append(OWN_NAME)
            continue
        free = [column for column in columns if column.name not in taken]
        column, strength = best_column(slot, free, num_rows, len(columns))
        if column is None:
            missing += [] if slot.optional else [slot]
            continue
        found[slot.ours] = column.name
        taken.add(column.name)
        if not slot.optional:
            strengths.append(strength)
    missing += unlike_pair(form, columns, found)
    return Matched(form, found, sum(strengths) / max(len(strengths), 1), tuple(missing))


def unlike_pair(form: Form, columns: Sequence[Column], found: Mapping[str, str]) -> list[Slot]:
    """The second text of a pair that is told by position alone, where the first is much longer or shorter: a title, say."""
    by_name = {column.name: column for column in columns}
    pair = [
        slot for slot in form.slots if slot.in_order and found.get(slot.ours) in by_name and found[slot.ours].isdigit()
    ]
    lengths = sorted(by_name[found[slot.ours]].mean_characters for slot in pair)
    return pair[1:] if len(pair) == 2 and lengths[1] > MOST_UNLIKE * lengths[0] else []


def best_column(slot: Slot, columns: Sequence[Column], num_rows: int, num_columns: int) -> tuple[Column | None, float]:
    """The column that fits the slot best, and how sure that is; of the `num_columns`, these are free."""
    fitting = [column for column in columns if slot_takes(slot, column, num_rows)]
    for own in slot.likeliest or (slot.ours, *slot.also):
        for column in fitting:
            if column.name == own:
                return column, OWN_NAME
    if slot.fixed:
        return None, 0.0
    for position, name in enumerate((slot.ours, *slot.names)):
        for column in fitting:
            if plain_name(column.name) == name:
                return column, KNOWN_NAME - LESS_PER_NAME * position
    if slot.optional:
        return None, 0.0
    fitting = [column for column in fitting if column.name not in IDENTITIES]
    if slot.by_position and all(column.name.isdigit() for column in columns):
        any_of_them = slot.few_values or (slot.ours == "text" and not slot.in_order)
        said = [
            column
            for column in fitting
            if any_of_them or ((slot.in_order or num_columns == 2) and says_something(column))
        ]
        return (by_content(slot, said), BY_POSITION) if said else (None, 0.0)
    if len(fitting) != 1 or slot.few_values:
        return None, 0.0
    alone = slot.ours == "text" and not any(column.is_structure for column in columns)
    return (fitting[0], ONLY_ONE) if fitting[0].is_structure or alone else (None, 0.0)


def slot_takes(slot: Slot, column: Column, num_rows: int) -> bool:
    """Whether the column holds what the slot takes; what names classes has few values, or short ones in a small sample."""
    if column.kind not in slot.holds:
        return False
    if not slot.few_values or column.name == slot.ours:
        return True
    short = column.mean_characters <= LONGEST_LABEL_CHARACTERS
    return short and (num_rows < FEW_ROWS or column.distinct <= max(num_rows / 2, 2))


def says_something(column: Column) -> bool:
    """Whether its values differ and are longer than a mark: a question or an answer, and no class."""
    return column.distinct > column.filled / 2 and column.mean_characters > SHORTEST_SAYING_CHARACTERS


def by_content(slot: Slot, columns: Sequence[Column]) -> Column:
    """Of columns without names: the one of the fewest and shortest values for classes, the longest text, or the first."""
    if slot.few_values:
        filled = max(column.filled for column in columns)
        return min(
            columns,
            key=lambda column: (column.filled < filled, column.distinct < 2, column.distinct, column.mean_characters),
        )
    if slot.ours == "text" and not slot.in_order:
        return max(columns, key=lambda column: column.mean_characters)
    return columns[0]


def renames(matched: Matched, names: Sequence[str]) -> dict[str, str]:
    """What `columns` must say where the data has these names: our names whose columns the layout would not read by itself."""
    slots = {slot.ours: slot for slot in matched.form.slots}
    found = {}
    for ours, theirs in matched.columns.items():
        own = (ours, *slots[ours].also) if ours in slots else (ours,)
        if theirs != next((name for name in own if name in names), ours):
            found[ours] = theirs
    return found


def answers_both_ways(
    matched: Matched, columns: Sequence[Column], given: Mapping[str, Any]
) -> list[tuple[Matched, dict[str, Any], list[str]]]:
    """(columns, options, why) of each way in which a preference among two answers may be meant: both, where it is only ever 0
    or 1, or on both sides of 0, since nothing in the data says which answer a 1 prefers. Otherwise the one way that there is.
    """
    name = matched.columns.get("preference")
    values = next((column.values for column in columns if column.name == name), ())
    if "first_answer" in given:
        return [(matched, {}, [])]
    first, second = matched.columns.get("output_1", ""), matched.columns.get("output_2", "")
    numbers = [number_in(value) for value in values]
    if (known := [each for each in numbers if each is not None]) and len(known) == len(numbers) and min(known) < 0:
        end = max(map(abs, known))
        return [
            (
                matched,
                {"first_answer": -sign * end, "second_answer": sign * end},
                [f"if {end:g} in '{name}' prefers '{better}', which no value says: look at some rows"],
            )
            for sign, better in ((1, second), (-1, first))
        ]
    if {str(value).strip().removesuffix(".0") for value in values} != {"0", "1"}:
        return [(matched, {}, [])]
    exchanged = replace(matched, columns={**matched.columns, "output_1": second, "output_2": first})
    return [
        (way, {"first_answer": 0}, [f"if 1 in '{name}' prefers '{better}', which no value says: look at some rows"])
        for way, better in ((matched, second), (exchanged, first))
    ]


def unnamed(columns: Sequence[Column]) -> Iterator[Column]:
    """Columns that hold something which says more than which row it is."""
    for column in columns:
        if column.kind != "nothing" and plain_name(column.name) not in IDENTITIES and column.name not in IDENTITIES:
            yield column
