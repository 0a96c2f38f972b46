"""Numbers in what is written and shown: finite, refused by name, or called what they are."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.figures import headline, number, real, seconds, size
from pipeline.running.progress import Progress
from pipeline.stage import Result
from pipeline.store.artifact import Facts
from pipeline.store.durable import write_json
from pipeline.store.journal import Journal, read_event, read_journal
from pipeline.store.numbers import json_text, require_finite

NAN, INF = math.nan, math.inf


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def strictly(text: str) -> Any:
    return json.loads(text, parse_constant=refuse_constant)


# JSON


def test_json_is_what_every_program_reads() -> None:
    assert strictly(json_text({"a": [1, 0.5, None, "\u00e9"]}, "x")) == {"a": [1, 0.5, None, "\u00e9"]}
    assert json_text({"a": "\u00e9"}, "x") == '{"a": "\u00e9"}'


def test_all_numbers_that_are_none_are_named_at_once() -> None:
    with pytest.raises(DataError) as caught:
        json_text({"loss": NAN, "scores": [1.0, {"b": -INF}], "fine": 1.0}, "report.json")
    assert str(caught.value).splitlines() == ["report.json: loss is nan.", "report.json: scores.1.b is -inf."]


def test_half_a_character_is_spelled() -> None:
    """A file's name can hold one; UTF-8 cannot."""
    text = json_text({"name": "a\udc80"}, "x")
    assert text.encode() and json.loads(text) == {"name": "a\udc80"}


def test_a_file_is_not_written_with_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"outcome\.json: value is inf"):
        write_json(tmp_path / "outcome.json", {"value": INF})
    assert list(tmp_path.iterdir()) == []


# Metrics


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None, "0.5", True, [1.0], 10**400])
def test_a_metric_that_is_no_finite_number_is_named(bad: Any) -> None:
    with pytest.raises(DataError, match=r"evaluate: heldout_loss is ") as caught:
        require_finite({"heldout_accuracy": 0.5, "rows": 3, "heldout_loss": bad}, "evaluate", "Look.")
    assert len(caught.value.problems) == 1 and str(caught.value).endswith("Look.")


def test_numbers_of_any_kind_are_metrics() -> None:
    require_finite({"a": 0, "b": -0.0, "c": 1e308}, "x")


def test_a_stage_cannot_hand_one_over() -> None:
    with pytest.raises(DataError, match="metrics: heldout_f1 is nan"):
        Result({"heldout_f1": NAN})
    with pytest.raises(DataError, match="fixed_prompt_scores: good is inf"):
        Result({}, Facts(fixed_prompt_scores={"good": INF}))


# The journal


def test_a_journal_names_what_was_not_finite(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", writes=True)
    journal.write("step", step=1, loss=NAN, deep={"list": [1.0, -INF]}, norm=2.0)
    (line,) = (tmp_path / "journal.jsonl").read_text().splitlines()
    event = strictly(line)
    assert (event["loss"], event["deep"], event["norm"]) == (None, {"list": [1.0, None]}, 2.0)
    assert event["not_finite"] == {"loss": "nan", "deep.list.1": "-inf"}


def test_what_is_written_after_a_torn_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n{"event": "st')
    journal = Journal(path, writes=True)
    journal.write("step", step=2)
    journal.write("step", step=3)
    assert [event["step"] for event in read_journal(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 4


ODD_LINES = [
    b"",
    b"\n",
    b"null",
    b"17",
    b"[]",
    b"{}",
    b'"note"',
    b'{"event": null}',
    b'{"event": ["note"]}',
    b"\xff\xfe\x00binary\x80",
    b"\x00" * 50,
    b'{"event": "step", "step"',
    b"[" * 100_000,
    b'{"a": ' * 900 + b"1" + b"}" * 900,
    b'{"event": "note", "text": ' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("line", ODD_LINES)
def test_a_damaged_line_is_passed_over(tmp_path: Path, line: bytes) -> None:
    assert read_event(line) is None
    path = tmp_path / "journal.jsonl"
    path.write_bytes(
        b'{"event": "step", "step": 1}\n' + line + b'\n{"event": "step", "step": "2"}\n{"event": "step", "step": 3}\n'
    )
    journal = Journal(path, writes=True)
    assert [event["step"] for event in journal.events("step")] == [1, "2", 3]
    journal.rewind(1)
    assert [event["step"] for event in journal.events()] == [1, "2"]


def test_old_journals_with_nan_are_read() -> None:
    assert read_event(b'{"event": "step", "loss": NaN, "norm": 1e999}') == {"event": "step", "loss": None, "norm": None}


# The console


ODD_VALUES = [
    None, "", "much", "\udcff\x1b[2J", True, NAN, INF, -INF, 1e308, -1e308, 10**400, -(10**5000), 0, -1, 5e-324, [], [1], {}, {"a": NAN},
]  # fmt: skip
FIELDS = {
    "note": ("text",),
    "step": ("step", "total_steps", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds_per_step", "not_finite"),
    "rollout": ("rollout", "total_rollouts", "reward", "kl", "ended", "not_finite"),
    "heldout": ("step", "heldout_loss", "heldout_accuracy"),
    "progress": ("what", "done", "total"),
    "resume": ("step",),
    "unheard of": ("x",),
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("kind", FIELDS)
def test_the_console_survives_whatever_a_journal_holds(kind: str, stream: type[io.StringIO]) -> None:
    """Each field with each odd value beside fields that are as they should be, and without any of them."""
    progress = Progress(stream())
    progress.event("base", {"event": kind})
    for name in FIELDS[kind]:
        for odd in ODD_VALUES:
            for fine in (5, 0):
                progress.event("base", {"event": kind, **dict.fromkeys(FIELDS[kind], fine), name: odd})
    shown = progress.stream.getvalue()  # type: ignore[attr-defined]
    assert "\udcff" not in shown and "\x1b[2J" not in shown
    shown.encode()


def test_a_terminal_without_an_encoding_for_it_gets_it_spelled() -> None:
    raw = io.BytesIO()
    progress = Progress(io.TextIOWrapper(raw, encoding="ascii"))
    progress.event("base", {"event": "note", "text": "caf\u00e9 \udc80"})
    progress.stream.flush()
    assert raw.getvalue() == b"  caf\\xe9 \\udc80\n"


def test_the_console_says_which_number_was_none() -> None:
    stream = io.StringIO()
    line = {"event": "step", "step": 3, "total_steps": 10, "loss": None, "not_finite": {"loss": "nan"}}
    Progress(stream).event("base", line)
    assert stream.getvalue() == "  step 3/10  loss nan\n"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1234567, "1,234,567"),
        (1234.56, "1,234.6"),
        (0.123456, "0.1235"),
        (NAN, "nan"),
        (-INF, "-inf"),
        (10**400, "1e+400"),
        (None, "?"),
        ("7", "?"),
        (True, "?"),
    ],
)
def test_figures(value: Any, said: str) -> None:
    assert number(value) == said
    assert real(value) == (value if said[0].isdigit() and "e" not in said else None)
    assert headline({"heldout_loss": value}, ()) == f"loss {said}"


def test_a_number_that_python_does_not_write() -> None:
    """It refuses to write whole numbers of more than 4,300 digits."""
    assert number(-(10**5000)) == "-1e+5000"
    with pytest.raises(DataError, match=r"x: rows is 1e\+5000"):
        require_finite({"rows": 10**5000}, "x")


@pytest.mark.parametrize("value", [NAN, INF, 10**400, None])
def test_durations_and_sizes_of_what_is_no_number(value: Any) -> None:
    assert seconds(value) == f"{number(value)} s"
    assert size(value) == f"{number(value)} B"
