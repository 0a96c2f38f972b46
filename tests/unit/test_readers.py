"""Broken rows in every input format: each is dropped with its reason, each good one is kept, nothing crashes."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.settings.resources import Resources
from pipeline.settings.strict import Reading, content_of, validate
from pipeline.stage import Forecast
from pipeline.store.digests import Digests
from stages.data.clean import STAGE, CleanParams
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.encodings import likely_encoding
from stages.lib.sources.params import DatasetSource, FilesSource, HubSource, PythonDocsSource
from stages.lib.sources.read import read_source
from tests.unit.running_stages import params_of, problems_of, read_files

TEN_MEGABYTES = 10_000_000
LONG = "x" * TEN_MEGABYTES
LINES_OF_LONG_FIELD = 50_000
ANY_BROKEN = {"max_broken_fraction": 1.0}
ANY_DAMAGED = {**ANY_BROKEN, "allow_damaged_files": True}


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compress(content)
    return content


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def read(folder: Path, name: str, content: bytes, **how: Any) -> tuple[list[str], dict[str, int], Ledger]:
    """(texts that were kept, reason -> count, ledger) of a file with this content."""
    (folder / name).write_bytes(content)
    rows, ledger = read_files(folder, paths=[name], layout="text", **{**ANY_DAMAGED, **how})
    assert ledger.read == len(rows) + sum(ledger.dropped.values())
    return texts(rows), dict(ledger.dropped), ledger


JSON_ROWS = [
    (b'{"text": "one"}', None),
    (b'{"text": "unfinished', "bad_json"),
    (b'{"text": "extra"} }', "bad_json"),
    (b'{"text": "first", "text": "second"}', "repeated_key"),
    (b'{"text": "a", "more": [{"a": 1, "b": 2, "a": 1}]}', "repeated_key"),
    (b"[" * 100_000, "bad_json"),
    (b'{"number": ' + b"1" * 5000 + b"}", "bad_json"),
    (b'{"txt": "two"}', "missing_field"),
    (b'{"text": 5}', "wrong_type"),
    (b'{"text": ""}', "empty_field"),
    (b"", "empty_row"),
    (b"{}", "empty_row"),
    (b'"text"', "not_a_record"),
    (b"null", "not_a_record"),
    (b'{"text": "\xff\xfe"}', "not_utf8"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b'{"text": "' + LONG.encode() + b'"}', "row_too_long"),
    (b'{"text": "two"}', None),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_broken_json_lines(suffix: str, tmp_path: Path) -> None:
    content = b"\n".join(row for row, _ in JSON_ROWS) + b"\n"
    kept, dropped, ledger = read(tmp_path, f"rows.jsonl{suffix}", compress(content, suffix))
    expected: dict[str, int] = {}
    for _, reason in JSON_ROWS:
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    assert kept == ["one", "two"]
    assert dropped == expected
    for line, (row, reason) in enumerate(JSON_ROWS, start=1):
        if reason:
            examples = ledger.examples[reason]
            assert any(example.startswith(f"rows.jsonl{suffix}:{line}: ") or not row for example in examples)
    assert all(len(example) <= 200 for examples in ledger.examples.values() for example in examples)


def test_a_last_line_without_end_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')[:2] == (["one", "two"], {})


def test_a_list_is_a_row_of_numbered_columns(tmp_path: Path) -> None:
    kept, dropped, _ = read(tmp_path, "a.jsonl", b'["one", "x"]\n["two"]\n', columns={"text": "0"})
    assert (kept, dropped) == (["one", "two"], {})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_broken_elements_of_a_json_list(suffix: str, tmp_path: Path) -> None:
    """One element per line. An unfinished string would swallow the rest of the file; it spoils only its own line."""
    broken = {
        b'{"text": "extra" "x"}': "bad_json",
        b'{"text": "unfinished}': "bad_json",
        b'{"txt": "two"}': "missing_field",
        b'{"text": [1, {"a": "],["}]}': "wrong_type",
        b'{"text": ""}': "empty_field",
        b"{}": "empty_row",
        b"17": "not_a_record",
        b'{"text": "\xff"}': "not_utf8",
        b'{"text": "' + LONG.encode() + b'"}': "row_too_long",
    }
    elements = [b'{"text": "one"}', *broken, b'{"text": "two \\" ] } , {"}']
    content = b"[\n" + b",\n".join(elements) + b"\n]\n"
    kept, dropped, ledger = read(tmp_path, f"rows.json{suffix}", compress(content, suffix))
    assert kept == ["one", 'two " ] } , {']
    assert dropped == {"bad_json": 2} | {reason: 1 for reason in broken.values() if reason != "bad_json"}
    assert ledger.examples["row_too_long"][0].startswith(f"rows.json{suffix}:11: ")


def test_a_json_list_may_be_indented_or_not(tmp_path: Path) -> None:
    rows = [{"text": f"row {index}", "more": {"deep": [index, [{}], "x,]}"]}} for index in range(50)]
    for indent in (None, 0, 2):
        kept, dropped, _ = read(tmp_path, f"{indent}.json", json.dumps(rows, indent=indent).encode())
        assert (kept, dropped) == ([row["text"] for row in rows], {})


def test_an_indented_element_without_brace_spoils_no_other(tmp_path: Path) -> None:
    content = json.dumps([{"text": f"row {index}"} for index in range(20)], indent=2)
    broken = content.replace('    "text": "row 7"\n  },', '    "text": "row 7"\n  ')
    kept, dropped, _ = read(tmp_path, "a.json", broken.encode())
    assert kept == [f"row {index}" for index in range(20) if index != 7]
    assert dropped == {"bad_json": 1, "damaged_file": 1}


def test_an_indented_element_with_an_unfinished_string_spoils_no_other(tmp_path: Path) -> None:
    content = json.dumps([{"text": f"row {index}", "n": "x"} for index in range(20)], indent=2)
    kept, dropped, _ = read(tmp_path, "a.json", content.replace('"row 7",', '"row 7,').encode())
    assert kept == [f"row {index}" for index in range(20) if index != 7]
    assert dropped == {"bad_json": 1}


def test_a_json_list_that_ends_early(tmp_path: Path) -> None:
    kept, dropped, _ = read(tmp_path, "a.json", b'[{"text": "one"}, {"text": "two"}, {"text": "th')
    assert (kept, dropped) == (["one", "two"], {"bad_json": 1, "damaged_file": 1})


def test_an_empty_json_list_holds_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path, "a.json", b"[]")


def test_json_elements_at_every_block_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scanner's answer must not depend on where the file is cut into blocks."""
    rows = [{"text": 'a "quoted" \\ text'}, {"text": "[{,"}, {"text": "\u00e9\n\t"}]
    content = b"[" + b" ,".join(json.dumps(row, ensure_ascii=False).encode() for row in rows) + b" ] "
    for block_bytes in (1, 2, 3, 7):
        monkeypatch.setattr("stages.lib.sources.lines.BLOCK_BYTES", block_bytes)
        kept, dropped, _ = read(tmp_path, "a.json", content)
        assert (kept, dropped) == (texts(rows), {})


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b'{"data": [', "bad_json", "Expecting value"),
        (b'{"text": "one"}\n{"text": "two"}\n', "bad_json", "set file_type: jsonl"),
        (b'{"text": "\xff"}', "not_utf8", "byte 10"),
    ],
)
def test_a_broken_json_document(content: bytes, reason: str, detail: str, tmp_path: Path) -> None:
    kept, dropped, ledger = read(tmp_path, "a.json", content)
    assert (kept, dropped) == ([], {reason: 1})
    assert detail in ledger.examples[reason][0]


def test_records_name_the_rows_of_a_document(tmp_path: Path) -> None:
    document = {"train": {"a": [["one", 1]], "b": [["two", 2], 5]}, "test": []}
    (tmp_path / "a.json").write_text(json.dumps(document), encoding="utf-8")
    how = {"paths": ["a.json"], "layout": "text", "columns": {"text": "0"}, **ANY_BROKEN}
    rows, ledger = read_files(tmp_path, records="train.*", **how)
    assert (texts(rows), dict(ledger.dropped)) == (["one", "two"], {"not_a_record": 1})
    assert ledger.examples["not_a_record"] == ["a.json:train:b[1]: 5"]
    with pytest.raises(DataError, match=r"has no 'dev', which `records` names\. It has: train, test"):
        read_files(tmp_path, records="dev", **how)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_broken_csv_rows(suffix: str, tmp_path: Path) -> None:
    lines = [
        b"text,label",
        b'"one, with comma",x',
        b'"two\nlines",x',
        b"three",  # too few fields
        b"four,x,y",  # too many
        b'"five"z,x',  # text after the closing quote
        b"",  # nothing
        b" ,x",  # an empty text
        b"caf\xe9,x",  # Latin-1
        LONG.encode() + b",x",
        b'"' + (b"many words " * 20 + b"\n") * LINES_OF_LONG_FIELD + b'",x',  # 10 MB over many lines, within quotes
        b"six,x",
        b'"seven,x',  # an unclosed quote, which reaches to the end of the file
        b"eight,x",
    ]
    kept, dropped, ledger = read(tmp_path, f"rows.csv{suffix}", compress(b"\n".join(lines), suffix))
    assert kept == ["one, with comma", "two\nlines", "six", "eight"]
    assert dropped == {"bad_csv_row": 4, "empty_row": 1, "empty_field": 1, "not_utf8": 1, "row_too_long": 2}
    assert [example.split(": ")[0] for example in ledger.examples["bad_csv_row"]] == [
        f"rows.csv{suffix}:{line}" for line in (5, 6, 7, LINES_OF_LONG_FIELD + 14)
    ]


def test_a_quote_that_is_never_closed_loses_one_row(tmp_path: Path) -> None:
    """It swallows more than max_row_bytes, and the rest of the file; or it seems to be closed by the next quote."""
    rows = [f"row {index},x" for index in range(1_000)]
    rows[3] = '"row 3,x'
    content = "\n".join(["text,label", *rows]).encode()
    expected = [f"row {index}" for index in range(1_000) if index != 3]
    assert read(tmp_path, "a.csv", content, max_row_bytes=200)[:2] == (expected, {"row_too_long": 1})
    assert read(tmp_path, "a.csv", content)[:2] == (expected, {"bad_csv_row": 1})
    rows[5] = '"row 5",x'
    content = "\n".join(["text,label", *rows]).encode()
    assert read(tmp_path, "a.csv", content)[:2] == (expected, {"bad_csv_row": 1})


def test_a_csv_file_of_one_column_misses_the_other(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", b"txt\none\n")[:2] == ([], {"missing_field": 1})


def test_tabs_need_no_quotes_and_columns_no_header(tmp_path: Path) -> None:
    kept, dropped, _ = read(tmp_path, "a.tsv", b'x\t"one\ny\ttwo\n', has_header=False, columns={"text": "1"})
    assert (kept, dropped) == (['"one', "two"], {})


def test_text_as_file_paragraphs_or_lines(tmp_path: Path) -> None:
    content = b"\n\none\ntwo\n \n\nthree\xff\n\n" + LONG.encode() + b"\n\nfour"
    assert read(tmp_path, "a.txt", content, split_text="paragraph")[:2] == (
        ["one\ntwo", "four"],
        {"not_utf8": 1, "row_too_long": 1},
    )
    assert read(tmp_path, "a.txt", content, split_text="line")[:2] == (
        ["one", "two", "four"],
        {"not_utf8": 1, "row_too_long": 1},
    )
    assert read(tmp_path, "a.txt", content)[:2] == ([], {"row_too_long": 1})
    assert read(tmp_path, "a.txt", b"one\n\ntwo\n")[:2] == (["one\n\ntwo"], {})
    assert read(tmp_path, "a.txt", b"")[:2] == ([], {"empty_row": 1})


def test_broken_conll_sentences(tmp_path: Path) -> None:
    content = b"-DOCSTART- O\n\nAnn\tB-P\n\t\nmet\n\nBo B-P\ncaf\xe9 O\n\nCy\tNN\tB-P\nran\tVB\tO\n"
    (tmp_path / "a.conll").write_bytes(content)
    rows, ledger = read_files(tmp_path, paths=["a.conll"], layout="bio", **ANY_BROKEN)
    assert [row["text"] for row in rows] == ["Ann", "Cy ran"]
    assert dict(ledger.dropped) == {"bad_conll_row": 1, "not_utf8": 1}
    assert ledger.examples["bad_conll_row"] == ["a.conll:5: 'met': met"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_damaged_compressed_file(suffix: str, damage: str, tmp_path: Path) -> None:
    """What comes before the damage is kept. zstandard's own reader takes a cut file for a whole one."""
    generator = random.Random(0)
    written = [generator.randbytes(200).hex() for _ in range(5_000)]
    packed = compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in written), suffix)
    half = len(packed) // 2
    content = packed[:half] if damage == "cut" else packed[:half] + b"\xff\x00" * 500 + packed[half + 1000 :]
    kept, dropped, ledger = read(tmp_path, f"rows.jsonl{suffix}", content)
    assert dropped.pop("damaged_file") == 1
    assert kept[:2_000] == written[:2_000]
    assert "after rows.jsonl" in ledger.examples["damaged_file"][0]


def test_a_file_that_is_not_compressed_at_all(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        assert read(tmp_path, f"a.jsonl{suffix}", b'{"text": "one"}\n')[:2] == ([], {"damaged_file": 1})


def test_zstd_frames_one_after_the_other(tmp_path: Path) -> None:
    frame = compress(b'{"text": "one"}\n', ".zst")
    assert read(tmp_path, "a.jsonl.zst", frame + frame)[:2] == (["one", "one"], {})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_broken_parquet_rows(suffix: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = [b"one", b"caf\xe9", None, b"", LONG.encode(), b"two"]
    column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    with pyarrow.BufferOutputStream() as buffer:
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(6)}), buffer)
        content = buffer.getvalue().to_pybytes()
    kept, dropped, ledger = read(tmp_path, f"rows.parquet{suffix}", compress(content, suffix))
    assert kept == ["one", "two"]
    assert dropped == {"not_utf8": 1, "missing_field": 1, "empty_field": 1, "row_too_long": 1}
    assert ledger.examples["not_utf8"][0].startswith(f"rows.parquet{suffix}:2: ")


def test_a_parquet_row_of_nothing_and_a_column_of_another_type(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [[1], None]}), tmp_path / "a.parquet")
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="text", **ANY_BROKEN)
    assert (rows, dict(ledger.dropped)) == ([], {"wrong_type": 1, "empty_row": 1})


def test_a_parquet_file_that_is_cut(tmp_path: Path) -> None:
    assert read(tmp_path, "a.parquet", b"PAR1 and no more")[:2] == ([], {"damaged_file": 1})


def save_dataset(folder: Path, columns: dict[str, Any], **features: Any) -> None:
    import datasets

    data = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    data.save_to_disk(folder)


def read_dataset(folder: Path, **how: Any) -> tuple[list[dict[str, Any]], Ledger]:
    block = {"kind": "dataset", "path": "saved", "layout": "text", **ANY_BROKEN, **how}
    source = params_of(DatasetSource, block, folder)
    ledger = Ledger()
    return [row for _, row in read_source(source, source.given_format, ledger)], ledger


def test_broken_rows_of_a_datasets_folder(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", {"text": ["one", None, "", LONG, "two"]})
    rows, ledger = read_dataset(tmp_path)
    assert texts(rows) == ["one", "two"]
    assert dict(ledger.dropped) == {"empty_row": 1, "empty_field": 1, "row_too_long": 1}


def test_class_labels_become_their_names(tmp_path: Path) -> None:
    import datasets

    save_dataset(
        tmp_path / "saved", {"text": ["a", "b"], "label": [1, 0]}, label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows, _ = read_dataset(tmp_path, layout="label")
    assert [row["label"] for row in rows] == ["yes", "no"]


def test_a_datasets_folder_that_selects_rows_and_has_splits(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["zero", "one", "two"]}).select([2, 0])
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved")
    assert texts(read_dataset(tmp_path, split="train")[0]) == ["two", "zero"]
    with pytest.raises(DataError, match="has several splits: train, test"):
        read_dataset(tmp_path)
    with pytest.raises(DataError, match=r"has no split 'dev'\. It has: train, test"):
        read_dataset(tmp_path, split="dev")


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    with pytest.raises(
        DataError, match=r"saved: cannot be opened: .* Name a folder that `datasets`' save_to_disk wrote"
    ):
        read_dataset(tmp_path)


HUB = {"kind": "hub", "dataset": "someone/something", "revision": "a" * 40, "layout": "text"}


def test_the_hub_is_asked_for_exactly_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: Any, **how: Any) -> datasets.Dataset:
        asked.append((names, how))
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = params_of(HubSource, {**HUB, "config": "en"}, tmp_path)
    assert [row for _, row in read_source(source, "text", Ledger())] == [{"text": "one"}]
    assert asked == [(("someone/something", "en"), {"split": "train", "revision": "a" * 40})]


def test_a_hub_data_set_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*names: Any, **how: Any) -> datasets.Dataset:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = params_of(HubSource, HUB, tmp_path)
    with pytest.raises(DataError, match=rf"someone/something@{'a' * 40}: cannot be loaded: no route. Check the id"):
        list(read_source(source, "text", Ledger()))


def test_a_branch_is_no_revision(tmp_path: Path) -> None:
    assert "revision: string should match" in problems_of(HubSource, {**HUB, "revision": "main"}, tmp_path)


# Memory, shares, and what a recipe's author is told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda long: b'{"text": "' + long + b'"}\n{"text": "one"}\n'),
        ("a.json", lambda long: b'[{"text": "' + long + b'"}, {"text": "one"}]'),
        ("a.csv", lambda long: b"text\n" + long + b"\none\n"),
        ("a.txt", lambda long: long + b"\none\n"),
    ],
)
def test_a_long_row_is_not_held_in_memory(name: str, write: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """A row of 60 MB with a limit of 1 MB: blocks are 1 MiB, so a few MB are enough."""
    (tmp_path / name).write_bytes(write(b"x" * 60_000_000))
    how = {"split_text": "line"} if name == "a.txt" else {}
    tracemalloc.start()
    rows, ledger = read_files(tmp_path, paths=[name], layout="text", max_row_bytes=1_000_000, **ANY_BROKEN, **how)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts(rows), dict(ledger.dropped)) == (["one"], {"row_too_long": 1})
    assert peak < 12_000_000


def test_too_many_broken_rows_stop_the_stage(tmp_path: Path) -> None:
    """6 of 100 rows are broken: more than the default share of 0.05. 5 of 100 are not more."""
    good = [json.dumps({"text": f"row {index}"}) for index in range(95)]
    (tmp_path / "a.jsonl").write_text("\n".join(["{", "{", '{"txt": 1}', "{", "{", *good]), encoding="utf-8")
    rows, ledger = read_files(tmp_path, paths=["a.jsonl"], layout="text")
    assert (len(rows), sum(ledger.dropped.values())) == (95, 5)
    (tmp_path / "a.jsonl").write_text("\n".join(["{", "{", '{"txt": 1}', "{", "{", "{", *good[1:]]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_files(tmp_path, paths=["a.jsonl"], layout="text")
    first, *rest = str(caught.value).split("\n")
    assert "6 of 100 rows are broken (6.0%), and max_broken_fraction is 5.0%" in first
    assert rest[0].startswith("bad_json: 5 rows: is not JSON. For example a.jsonl:1: ")
    assert rest[1].startswith("missing_field: 1 rows: lacks a field that the layout needs. For example a.jsonl:3: text")


def test_rows_that_are_merely_unwanted_do_not_stop_it(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": False}
    ] * 9
    (tmp_path / "a.json").write_text(json.dumps([*chats, {**chats[0], "label": True}]), encoding="utf-8")
    rows, ledger = read_files(tmp_path, paths=["a.json"], layout="rated_chat")
    assert (len(rows), dict(ledger.dropped)) == (1, {"rated_bad": 9})


def test_folders_are_read_whole_and_in_order(tmp_path: Path) -> None:
    for name in (
        "data/b.jsonl",
        "data/a.jsonl.gz",
        "data/deep/c.jsonl",
        "data/.hidden.jsonl",
        "data/__pycache__/d.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compress(json.dumps({"text": name}).encode(), path.suffix))
    rows, _ = read_files(tmp_path, paths=["data"], layout="text")
    assert texts(rows) == ["data/a.jsonl.gz", "data/b.jsonl", "data/deep/c.jsonl"]
    (tmp_path / "data" / "README.md").write_text("read me", encoding="utf-8")
    assert "holds files of several types: jsonl, text" in told({"paths": ["data"]}, tmp_path)
    assert len(read_files(tmp_path, paths=["data"], layout="text", file_type="jsonl")[0]) == 3
    rows, _ = read_files(tmp_path, paths=["data/*.jsonl*"], layout="text")
    assert texts(rows) == ["data/a.jsonl.gz", "data/b.jsonl"]


def told(block: dict[str, Any], folder: Path) -> str:
    """What a plan says of this source of files, which must be wrong."""
    block = {"kind": "files", "paths": ["a.jsonl"], "layout": "text", **block}
    params, problems = validate(CleanParams, {"format": "text", "source": block}, "params", Reading([folder]))
    if params is not None:
        problems = STAGE.check(Forecast(params, Resources(), {}))
    assert problems
    return "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"paths": ["no.jsonl"]}, "paths.0: no such file or folder: no.jsonl"),
        ({"paths": ["no*.jsonl"]}, "paths: no such file or folder: no*.jsonl"),
        ({"paths": ["a.dat"]}, "has no suffix that says what it is. Set file_type, or rename it"),
        ({"layout": "alpca"}, "layout: there is no 'alpca' (Did you mean 'alpaca'?)"),
        ({"layout": "alpaca", "columns": {"outptu": "o"}}, "columns: the layout alpaca has no 'outptu' (Did you mean 'output'?)"),
        ({"strip_segment_digit": True}, "strip_segment_digit: the layout text does not use it. Layouts that do: bio"),
        ({"split_text": "line"}, "split_text: is for text files, and none of the files is one"),
        ({"has_header": False}, "has_header: is for csv and tsv files, and none of the files is one"),
        ({"paths": "a.jsonl"}, "paths: must be a list, not the string 'a.jsonl'"),
        ({"max_broken_fraction": 2.0}, "max_broken_fraction: input should be less than or equal to 1"),
        ({"max_rwo_bytes": 5}, "max_rwo_bytes: unknown field. Did you mean 'max_row_bytes'?"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(block: dict[str, Any], problem: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.dat"):
        (tmp_path / name).write_bytes(b'{"text": "a"}\n')
    assert problem in told(block, tmp_path)


def test_a_link_that_leads_nowhere_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to("gone.jsonl")
    assert "a.jsonl: is a link that leads nowhere. Mend the link" in told({"paths": ["data"]}, tmp_path)


def test_reading_params_looks_into_no_folder(tmp_path: Path) -> None:
    """The worker reads them again in each process; what is in the folder is told from the plan, and when it is read."""
    (tmp_path / "data").mkdir()
    params_of(FilesSource, {"kind": "files", "paths": ["data"], "layout": "text"}, tmp_path)
    assert "holds no data file" in told({"paths": ["data"]}, tmp_path)
    with pytest.raises(DataError, match="holds no data file"):
        read_files(tmp_path, paths=["data"], layout="text")


def test_python_docs_read_the_running_python_by_default(tmp_path: Path) -> None:
    source = params_of(PythonDocsSource, {"kind": "python_docs", "packages": ["json"]}, tmp_path)
    assert (source.root / "json" / "__init__.py").is_file()
    rows = [row for _, row in read_source(source, "text", Ledger())]
    assert rows
    assert {row["group"].split(".")[0] for row in rows} == {"json"}


def test_an_identity_holds_what_only_the_names_of_files_say(tmp_path: Path) -> None:
    """The same bytes under another suffix are other rows; under another name with the same suffix they are the same."""
    (tmp_path / "folder").mkdir()
    names = ("a.jsonl", "b.jsonl", "a.txt", "a.csv", "a.tsv", "a.jsonl.gz", "a.jsonl.zst", "folder")
    for name in (*names[:-1], "folder/a.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "one"}\n')

    def identity(*paths: str, **how: Any) -> str:
        block = {"kind": "files", "paths": list(paths), "layout": "text", **how}
        return json.dumps(content_of(params_of(FilesSource, block, tmp_path), Digests(tmp_path / "cache").of))

    assert identity("a.jsonl") == identity("b.jsonl") == identity("a.jsonl", file_type="jsonl")
    assert len({identity(name) for name in names if name != "b.jsonl"}) == len(names) - 1
    assert identity("a.txt", file_type="jsonl") == identity("a.jsonl")
    assert identity("a.jsonl.gz", file_type="text") != identity("a.txt")
    assert identity("a.jsonl", "a.txt") != identity("a.txt", "a.jsonl")


def test_class_labels_become_their_names_in_lists_and_in_parquet(tmp_path: Path) -> None:
    """The usual form of data for named entities on the hub, as `datasets` saves it and as it writes Parquet."""
    import datasets

    tags = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    columns = {"tokens": [["Ann", "Lee", "ran"], ["No", "one"]], "ner_tags": [[1, 2, 0], [0, 0]]}
    data = datasets.Dataset.from_dict(columns).cast_column("ner_tags", datasets.Sequence(tags))
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    rows, _ = read_dataset(tmp_path, layout="bio", columns={"tags": "ner_tags"})
    assert [row["spans"] for row in rows] == [[{"start": 0, "end": 7, "label": "PER"}], []]
    again, _ = read_files(tmp_path, paths=["a.parquet"], layout="bio", columns={"tags": "ner_tags"})
    assert again == rows


def test_what_arrow_fills_up_is_no_data(tmp_path: Path) -> None:
    import datasets

    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}]},
    ]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "a.parquet")
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="messages")
    assert [message["tool_calls"] for message in rows[0]["messages"] if message["role"] == "assistant"] == [
        [{"name": "f", "arguments": {"x": 1}}],
        [{"name": "g", "arguments": {"y": 2}}],
    ]
    assert not ledger.noticed


@pytest.mark.parametrize(
    ("encoding", "looks", "words"),
    [
        ("latin-1", "cp1252", ["café au lait", "naïve", "déjà vu"]),
        ("gb18030", "gb18030", ["今天天气很好，我们去公园。", "机器学习", "你好"]),
        ("utf-16", "utf-16", ["one", "zwei", "três"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz"])
def test_other_encodings(encoding: str, looks: str, words: list[str], suffix: str, tmp_path: Path) -> None:
    """Named, they are read; else the message names what the file looks like, and that works."""
    rows = [{"text": word} for word in words]
    contents = {
        ".json": json.dumps(rows, ensure_ascii=False),
        ".csv": "\n".join(["text", *words]),
        ".tsv": "\n".join(["text", *words]),
        ".txt": "\n".join(words),
    }
    content = contents.get(suffix, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode(encoding)
    how = {"split_text": "line"} if suffix == ".txt" else {}
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    for said in (encoding, looks):
        found, _ = read_files(tmp_path, paths=[f"a{suffix}"], layout="text", encoding=said, **how)
        assert texts(found) == words
    if encoding != "utf-16":
        with pytest.raises(DataError, match=rf"rows are broken .* Or set encoding: {looks}\."):
            read_files(tmp_path, paths=[f"a{suffix}"], layout="text", **how)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp932", "①株式会社～㈱の表示が速いです髙橋"),
        ("shift_jis", "株式会社の表示が速いです"),
        ("cp949", "배송이 빠르고 품질이 똠방아요"),
        ("euc_kr", "배송이 빠르고 품질이 좋아요"),
        ("iso8859-2", "Książka była świetna, żałuję że się skończyła"),
        ("cp1250", "Książka była świetna, żałuję że się skończyła"),
        ("cp1251", "Это хорошая книга"),
        ("iso8859-5", "Это хорошая книга, и в ней говорится о погоде"),
        ("cp866", "Это хорошая книга, и в ней говорится о погоде"),
        ("koi8-r", "Это хорошая книга"),
        ("iso8859-6", "هذا نص عادي باللغة العربية يتحدث عن الطقس"),
        ("big5", "這是一個普通的中文文本，講的是天氣"),
        ("gb18030", "这是一个普通的中文文本，讲的是天气"),
        ("utf-16-le", "功能許多，成功出貨，蓋子很好"),
        ("utf-16-be", "功能許多，成功出貨，蓋子很好"),
        ("utf-32", "功能許多"),
    ],
)
def test_the_encoding_that_is_proposed_reads_the_text(encoding: str, text: str, tmp_path: Path) -> None:
    """Of encodings that hold each other the narrowest that reads it; of those that are alike the one with more letters."""
    path = tmp_path / "a.csv"
    path.write_bytes(("label,text\n" + "".join(f"{n % 2},{text}{n}\n" for n in range(20))).encode(encoding))
    assert likely_encoding(path) == encoding


def test_an_encoding_that_is_none_and_one_for_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    block = {"kind": "files", "paths": ["a.jsonl"], "layout": "text"}
    for name in ("klingon", "base64", "a\0"):
        assert "there is no text encoding" in problems_of(FilesSource, {**block, "encoding": name}, tmp_path)
    (tmp_path / "a.parquet").touch()
    source = params_of(FilesSource, {**block, "paths": ["a.parquet"], "encoding": "latin-1"}, tmp_path)
    with pytest.raises(DataError, match=r"encoding: is for .* files, and none of the files is one"):
        source.files()


def test_bytes_that_the_encoding_cannot_read_spoil_only_their_row(tmp_path: Path) -> None:
    content = b"\n".join(['{"text": "好"}'.encode("gb18030"), b'{"text": "\xff"}', b'{"text": "b"}'])
    kept, dropped, _ = read(tmp_path, "a.jsonl", content, encoding="gb18030")
    assert (kept, dropped) == (["好", "b"], {"not_utf8": 1})


def test_a_few_rows_in_another_encoding_are_said(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n' * 99 + '{"text": "é"}\n'.encode("latin-1")
    kept, dropped, ledger = read(tmp_path, "a.jsonl", content, max_broken_fraction=0.05)
    assert (len(kept), dropped) == (99, {"not_utf8": 1})
    assert ledger.noticed == {"dropped because they are no UTF-8: the file looks like encoding: cp1252": 1}


def test_fields_stand_apart_by_what_the_source_says(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text|label\n"a|b, c"|x\n')
    rows, _ = read_files(tmp_path, paths=["a.csv"], layout="label", delimiter="|")
    assert rows == [{"text": "a|b, c", "label": "x"}]


def test_a_line_may_be_a_label_and_a_text(tmp_path: Path) -> None:
    """The second line has no text, and no field is lost of the first."""
    (tmp_path / "a.txt").write_text("NUM:date When  was he born ?\nNUM:date\n")
    how = {"file_type": "tsv", "has_header": False, "delimiter": " ", "max_fields": 2, "max_broken_fraction": 1.0}
    rows, ledger = read_files(tmp_path, paths=["a.txt"], layout="label", columns={"label": "0", "text": "1"}, **how)
    assert rows == [{"text": "When  was he born ?", "label": "NUM:date"}]
    assert ledger.dropped == {"missing_field": 1}


def test_comments_of_conll_files_are_no_tokens(tmp_path: Path) -> None:
    """A token that is a hash sign alone has a tab behind it, and stays."""
    (tmp_path / "a.conll").write_text("# text = Mira #\nMira\tB-PER\n#\tO\n\n# the end\n")
    rows, _ = read_files(tmp_path, paths=["a.conll"], layout="bio", comment_prefix="# ")
    assert rows == [{"text": "Mira #", "spans": [{"start": 0, "end": 4, "label": "PER"}]}]


@pytest.mark.parametrize(
    ("option", "value"), [("delimiter", ";"), ("max_fields", 2), ("comment_prefix", "#")], ids=lambda value: str(value)
)
def test_options_of_other_file_types_are_refused(option: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=f"{option}: is for .* files, and none of the files is one"):
        read_files(tmp_path, paths=["a.jsonl"], layout="text", **{option: value})


@pytest.mark.parametrize("between", [b"\n", b"", b",\n", b"\n\n \n", b"\n\xef\xbb\xbf"])
def test_json_lists_one_after_the_other_are_read(
    between: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files put one behind another: the second list holds rows too, wherever the file is cut into blocks."""
    lists = [json.dumps([{"text": f"{name} {index}"} for index in range(3)]).encode() for name in ("a", "b", "c")]
    expected = [f"{name} {index}" for name in ("a", "b", "c") for index in range(3)]
    for block_bytes in (1, 3, 1 << 20):
        monkeypatch.setattr("stages.lib.sources.lines.BLOCK_BYTES", block_bytes)
        assert read(tmp_path, "a.json", between.join(lists) + b"\n")[:2] == (expected, {})


def test_what_stands_outside_json_lists_is_counted(tmp_path: Path) -> None:
    """Rows in = rows out + dropped: two mappings, a text and a closing bracket too many are no part of a list."""
    content = (
        b'[{"text": "a"}]\n, {"text": "lost, [here]"}, {"text": "lost {too}"}\n"lost"\n[{"text": "b"}]]\n[]\n'
        b'[{"text": "c"}'
    )
    kept, dropped, ledger = read(tmp_path, "a.json", content)
    assert kept == ["a", "b", "c"]
    assert dropped == {"bad_json": 4, "damaged_file": 1}
    assert [example.partition(": ")[0] for example in ledger.examples["bad_json"]] == [
        f"a.json:{line}" for line in (2, 2, 3, 4)
    ]
    assert all("stands outside the list: put it into the list, or" in each for each in ledger.examples["bad_json"])


def test_the_way_out_of_several_json_values_is_one_that_works(tmp_path: Path) -> None:
    """Values over several lines cannot be read as JSON lines, so that is not said of them."""
    values = [json.dumps({"text": text}, indent=1) for text in ("a", "b")]
    _, dropped, ledger = read(tmp_path, "a.json", "\n".join(values).encode())
    assert dropped == {"bad_json": 1}
    assert "write its values as one list" in ledger.examples["bad_json"][0]
    assert read(tmp_path, "a.json", f"[{','.join(values)}]".encode())[:2] == (["a", "b"], {})


def test_lines_that_are_lists_of_texts_are_told_in_a_json_file(tmp_path: Path) -> None:
    content = b'["one", "x"]\n["two", "y"]\n'
    _, dropped, ledger = read(tmp_path, "a.json", content)
    assert dropped == {"not_a_record": 4}
    assert "set file_type: jsonl" in ledger.examples["not_a_record"][0]
    kept, dropped, _ = read(tmp_path, "a.json", content, file_type="jsonl", columns={"text": "0"})
    assert (kept, dropped) == (["one", "two"], {})
    assert "file_type" not in read(tmp_path, "a.json", b'["one",\n"two"]')[2].examples["not_a_record"][0]


def test_a_key_twice_or_a_bad_byte_in_a_document_spoils_only_its_row(tmp_path: Path) -> None:
    rows = b'{"text": "a"}, {"text": "b", "text": "c"}, {"text": "d", "x": [{"\xff": 1}]}, {"text": "e", "x": [{"k": 1, "k": 2}]}, {"text": "f"}'
    kept, dropped, ledger = read(tmp_path, "a.json", b'{"data": [' + rows + b"]}", records="data")
    assert (kept, dropped) == (["a", "f"], {"repeated_key": 2, "not_utf8": 1})
    assert [each.partition(": {")[0] for each in ledger.examples["repeated_key"]] == [
        "a.json:data[1]: 'text'",
        "a.json:data[3]: 'k' in x[0]",
    ]
    assert ledger.examples["not_utf8"][0].startswith("a.json:data[2]: in x[0]: {")
    kept, dropped, _ = read(tmp_path, "a.json", b'{"x": {"text": "a"}, "y": {"text": "b", "text": "c"}}', records="*")
    assert (kept, dropped) == (["a"], {"repeated_key": 1})
    content = b'{"a": "\xff", "b": {"c": 1, "c": 2}, "data": [{"text": "a"}], "data": []}'
    kept, dropped, ledger = read(tmp_path, "a.json", content, records="data")
    assert (kept, dropped) == ([], {"repeated_key": 1})
    assert "'data' in the mapping that holds the rows" in ledger.examples["repeated_key"][0]


def test_a_fault_in_a_document_that_is_one_row_is_placed(tmp_path: Path) -> None:
    """The way out that is named, `records`, keeps the other articles."""
    articles = [
        {"paragraphs": [{"context": f"Number {n}.", "qas": [{"id": f"q{n}", "question": "What?", "answers": []}]}]}
        for n in range(3)
    ]
    content = json.dumps({"data": articles}).replace('"id": "q1"', '"id": "q1", "id": "q2"')
    (tmp_path / "a.json").write_text(content)
    how: dict[str, Any] = {"paths": ["a.json"], "layout": "squad", **ANY_BROKEN}
    rows, ledger = read_files(tmp_path, **how)
    assert (rows, dict(ledger.dropped)) == ([], {"repeated_key": 1})
    said = ledger.examples["repeated_key"][0]
    assert "'id' in data[1].paragraphs[0].qas[0]; with records: data only the row that holds it is dropped" in said
    rows, ledger = read_files(tmp_path, records="data", **how)
    assert ([row["id"] for row in rows], dict(ledger.dropped)) == (["q0", "q2"], {"repeated_key": 1})


def test_a_header_that_names_two_columns_alike_is_refused(tmp_path: Path) -> None:
    content = "id,text,label,label\n0,one,x,1\n1,two,y,0\n"
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=r"a\.csv:1: has a header that names more than one column 'label'\. Give each"):
        read_files(tmp_path, paths=["a.csv"], layout="label")
    (tmp_path / "a.csv").write_text(content.replace("label,label", "label,rating"))
    rows, _ = read_files(tmp_path, paths=["a.csv"], layout="label")
    assert [row["label"] for row in rows] == ["x", "y"]
    (tmp_path / "a.csv").write_text("yes,yes\nno,no\n")
    rows, _ = read_files(tmp_path, paths=["a.csv"], layout="text", columns={"text": "0"}, has_header=False)
    assert texts(rows) == ["yes", "no"]


def test_two_columns_of_a_parquet_file_with_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(["one"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    for names in (["text", "label", "label"], ["text", "label", "rating"]):
        pyarrow.parquet.write_table(pyarrow.table(columns, names=names), tmp_path / f"{names[-1]}.parquet")
    with pytest.raises(DataError, match=r"label\.parquet: has more than one column 'label'\. Write it again"):
        read_files(tmp_path, paths=["label.parquet"], layout="label")
    assert read_files(tmp_path, paths=["rating.parquet"], layout="label")[0] == [{"text": "one", "label": "x"}]


def test_columns_without_a_name_go_by_their_positions(tmp_path: Path) -> None:
    """Spreadsheets write empty columns after the last one; what stands in one is not lost without a word."""
    kept, dropped, ledger = read(tmp_path, "a.csv", b"text,,\none,,\ntwo,,note\n")
    assert (kept, dropped) == (["one", "two"], {})
    assert ledger.noticed == {"column '2' is not read": 1}


def test_a_header_once_more_is_no_row(tmp_path: Path) -> None:
    content = b'text,label\none,x\ntext,label\n"text",y\n\xef\xbb\xbftext,label\n'
    kept, dropped, ledger = read(tmp_path, "a.csv", content, max_broken_fraction=0.0)
    assert (kept, dropped) == (["one", "text"], {"repeated_header": 2})
    assert ledger.examples["repeated_header"][0].startswith("a.csv:3: ")
    assert read(tmp_path, "a.csv", b"text\none\ntext\n")[:2] == (["one", "text"], {})  # a word may be called so


def test_fields_between_quotes_in_tsv_are_said(tmp_path: Path) -> None:
    """The way out that is named reads them, also one that goes on in the next line."""
    content = b'text\tlabel\nplain\tx\n"She said ""no"""\ty\n"over\ntwo lines"\tx\nsaid "so" here\ty\n'
    kept, dropped, ledger = read(tmp_path, "a.tsv", content)
    assert kept == ["plain", '"She said ""no"""', 'two lines"', 'said "so" here']
    assert dropped == {"bad_csv_row": 1}
    way = 'set file_type: csv and delimiter: "\\t"'
    assert way in ledger.examples["bad_csv_row"][0]
    assert [count for what, count in ledger.noticed.items() if way in what] == [1]
    kept, dropped, ledger = read(tmp_path, "a.tsv", content, file_type="csv", delimiter="\t")
    assert (kept, dropped) == (["plain", 'She said "no"', "over\ntwo lines", 'said "so" here'], {})
    assert list(ledger.noticed) == ["column 'label' is not read"]


def test_a_field_of_many_lines_is_said(tmp_path: Path) -> None:
    """10 lines are none too many; of 11 a quote that was never closed may be the reason."""
    for lines, times in ((10, 0), (11, 1)):
        content = 'text\n"' + "\n".join(["word"] * lines) + '"\nend\n'
        kept, _, ledger = read(tmp_path, "a.csv", content.encode())
        assert len(kept) == 2
        assert sum(count for what, count in ledger.noticed.items() if "more than 10 lines" in what) == times


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_that_end_as_on_old_macs(suffix: str, tmp_path: Path) -> None:
    """A carriage return alone ends a line where no line feed does; where line feeds do, it is a part of a text."""
    contents = {
        "a.csv": (b'text,label\rone,x\r"two\rlines",y\r', ["one", "two\nlines"], {}),
        "a.tsv": (b"text\tlabel\rone\tx\rtwo\ty", ["one", "two"], {}),
        "a.jsonl": (b'{"text": "one"}\r{"text": "two"}\r', ["one", "two"], {}),
        "a.txt": (b"one\rtwo\r", ["one", "two"], {"split_text": "line"}),
        "b.csv": (b'text,label\n"one\rmore",x\n', ["one\rmore"], {}),
    }
    for name, (content, expected, how) in contents.items():
        kept, dropped, _ = read(tmp_path, name + suffix, compress(content, suffix), **how)
        assert (kept, dropped) == (expected, {})


def test_what_stands_before_damage_is_read_where_no_line_ends(tmp_path: Path) -> None:
    numbers = [str(random.Random(index).random()) for index in range(1000)]
    packed = gzip.compress(b"".join(b'{"text": "%s"}\r' % number.encode() for number in numbers), mtime=0)
    kept, dropped, _ = read(tmp_path, "a.jsonl.gz", packed[: len(packed) // 2])
    assert len(kept) > 100
    assert kept == numbers[: len(kept)]
    assert dropped["damaged_file"] == 1


def test_only_spaces_and_tabs_part_the_columns_of_conll_files(tmp_path: Path) -> None:
    content = "Tokyo\u3000Tower  B-LOC\nhas O\n10\u00a0000 B-NUM\n steps\tO\r\n"
    (tmp_path / "a.conll").write_bytes(content.encode())
    rows, ledger = read_files(tmp_path, paths=["a.conll"], layout="bio")
    assert [row["text"] for row in rows] == ["Tokyo\u3000Tower has 10\u00a0000  steps"]
    assert [rows[0]["text"][span["start"] : span["end"]] for span in rows[0]["spans"]] == [
        "Tokyo\u3000Tower",
        "10\u00a0000",
    ]
    assert not ledger.dropped


def write_parquet(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    """With `features` in the form in which the `datasets` library describes them."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(columns)
    if features:
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pyarrow.parquet.write_table(table, path)


CLASSES = {"_type": "ClassLabel", "names": ["neg", "pos"]}


def test_a_number_of_no_class_drops_its_row(tmp_path: Path) -> None:
    """-1 says that there is no label; numbers may be floats, as pandas writes them beside gaps."""
    import datasets

    labels = [0, 5, 1, -1, -2]
    write_parquet(tmp_path / "a.parquet", {"text": list("abcde"), "label": labels}, {"label": CLASSES})
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="label", **ANY_BROKEN)
    assert [row["label"] for row in rows] == ["neg", "pos"]
    assert ledger.dropped == {"wrong_type": 2, "no_label": 1}
    assert ledger.examples["wrong_type"][0] == "a.parquet:2: label: there is no class 5 among 2"
    write_parquet(tmp_path / "a.parquet", {"text": list("abc"), "label": [1.0, None, 0.5]}, {"label": CLASSES})
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="label", **ANY_BROKEN)
    assert ([row["label"] for row in rows], ledger.dropped) == (["pos"], {"missing_field": 1, "wrong_type": 1})
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    data = datasets.Dataset.from_dict({"tokens": [["a"], ["b"]], "tags": [[0], [1]]}).cast_column("tags", tags)
    data.to_parquet(tmp_path / "b.parquet")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "b.parquet")
    pyarrow.parquet.write_table(table.set_column(1, "tags", pyarrow.array([[0], [7]])), tmp_path / "b.parquet")
    rows, ledger = read_files(tmp_path, paths=["b.parquet"], layout="bio", **ANY_BROKEN)
    assert (len(rows), ledger.dropped) == (1, {"wrong_type": 1})


def test_a_feature_that_datasets_does_not_know_costs_no_other_column(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "label": [1, 0], "xs": [[1], [2]]}
    write_parquet(tmp_path / "a.parquet", columns, {"label": CLASSES, "xs": {"_type": "NewKind"}, "gone": CLASSES})
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="label")
    assert [row["label"] for row in rows] == ["pos", "neg"]
    what = "column 'xs' is read as it stands: the installed `datasets` does not know its feature (Feature type 'NewKind' not found)"
    assert ledger.noticed == {what: 2, "column 'xs' is not read": 2}
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": "ClassLabel: {"})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="label")
    assert [row["label"] for row in rows] == ["1", "0"]
    assert ledger.noticed["the file's description of its features cannot be read: numbers of classes stay numbers"] == 2


def test_bytes_that_no_column_of_the_layout_needs_are_left_alone(tmp_path: Path) -> None:
    """Where they are needed, no encoding is advised, which Parquet does not take; another column of text is, and works."""
    jpeg = b"\xff\xd8\xff\xe0"
    columns = {"text": ["a", "b"], "image": [jpeg, jpeg], "more": [{"bytes": jpeg}, {"bytes": jpeg}]}
    write_parquet(tmp_path / "a.parquet", columns)
    rows, ledger = read_files(tmp_path, paths=["a.parquet"], layout="text")
    assert (texts(rows), ledger.dropped) == (["a", "b"], {})
    assert ledger.noticed == {"column 'image' is not read": 2, "column 'more' is not read": 2}
    save_dataset(tmp_path / "saved", columns)
    rows, ledger = read_dataset(tmp_path)
    assert (texts(rows), ledger.dropped) == (["a", "b"], {})
    for how in ({"columns": {"text": "image"}}, {"columns": {"text": "more"}}, {"carry": ["image"]}):
        with pytest.raises(DataError, match="2 of 2 rows are broken") as caught:
            read_files(tmp_path, paths=["a.parquet"], layout="text", **how)
        assert "encoding" not in str(caught.value)
        assert "holds bytes that are no text: name a column of text in `columns`" in str(caught.value)


@pytest.mark.parametrize("text", ["café", "plain"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_text_in_two_bytes_a_character_is_told_without_its_mark(encoding: str, text: str, tmp_path: Path) -> None:
    """ASCII in it is UTF-8 too, with nulls between; what is advised works."""
    content = "text,label\n" + "".join(f"{text} words {n},x\n" for n in range(20))
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    with pytest.raises(DataError, match=rf"Or set encoding: {encoding}\."):
        read_files(tmp_path, paths=["a.csv"], layout="text")
    rows, ledger = read_files(tmp_path, paths=["a.csv"], layout="text", encoding=encoding)
    assert (len(rows), ledger.dropped) == (20, {})


def test_files_that_no_reader_reads_are_told_with_a_way_out(tmp_path: Path) -> None:
    """The same sentences as `inspect` has; what they advise is done here."""
    import bz2
    import lzma

    content = b'{"text": "one"}\n'
    how: dict[str, Any] = {"layout": "text"}

    def refusal(name: str, written: bytes, **more: Any) -> str:
        (tmp_path / name).write_bytes(written)
        with pytest.raises(DataError) as caught:
            read_files(tmp_path, paths=[name], **how, **more)
        return str(caught.value)

    assert "Rename it to a.jsonl.gz." in refusal("a.jsonl", gzip.compress(content))
    assert "Rename it to a.jsonl.zst." in refusal("a.jsonl.gz", compress(content, ".zst"))
    (tmp_path / "a.jsonl").rename(tmp_path / "a.jsonl.gz")
    assert texts(read_files(tmp_path, paths=["a.jsonl.gz"], **how)[0]) == ["one"]
    for name, packed, called in (
        ("a.jsonl.xz", lzma.compress(content), "xz"),
        ("a.jsonl.bz2", bz2.compress(content), "bzip2"),
    ):
        expected = f"is compressed with {called}, which is not read. Decompress it, or pack it as .gz or .zst."
        assert expected in refusal(name, packed)
        assert expected in refusal(name, packed, file_type="jsonl")
        assert expected in refusal("b.jsonl", packed)
    write_parquet(tmp_path / "c.parquet", {"text": ["one"]})
    assert "Set file_type: parquet." in refusal("c.jsonl", (tmp_path / "c.parquet").read_bytes())
    assert texts(read_files(tmp_path, paths=["c.jsonl"], file_type="parquet", **how)[0]) == ["one"]
    (tmp_path / "d.txt").write_bytes(b"BZh is how bzip2 files begin, %PDF- others")
    assert len(read_files(tmp_path, paths=["d.txt"], **how)[0]) == 1
