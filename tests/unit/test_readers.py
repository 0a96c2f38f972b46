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
