"""What `slipway inspect` prints: what is proposed can be pasted, what is learned is marked, and what is wrong is a sentence."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.command import cli
from pipeline.command.inspection import report_lines, source_fields
from pipeline.errors import DataError, RecipeError, SlipwayError
from pipeline.store.artifact import FileEntry, Kind, Manifest
from stages.data.clean import STAGE as CLEAN
from stages.data.clean import CleanParams
from stages.lib.curation.wholeness import emptied
from stages.lib.inspecting.artifacts import inspect_folder
from stages.lib.inspecting.data import Asked, inspect_data
from stages.lib.inspecting.inspection import inspect_places
from stages.lib.inspecting.row_views import marked_pieces, parts_of_row, spread
from stages.lib.inspecting.token_views import ModelView
from stages.lib.text.chat_presets import PRESETS
from stages.lib.text.prompts import prompt_of
from tests.unit.running_stages import params_of, run_stage
from tests.unit.test_chat_template import build

CHATS = [
    {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}
    for n in range(3)
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of one token a character, with the template of the house."""
    folder = tmp_path_factory.mktemp("model")
    build(PRESETS["slipway"].template).save_pretrained(folder)
    return folder


def slipway(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """(exit code, output, errors) of the command."""
    monkeypatch.setattr(sys, "argv", ["slipway", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    captured = capsys.readouterr()
    return code if isinstance(code, int) else 1, captured.out, captured.err


def printed(report: dict[str, Any], stream: io.StringIO | None = None) -> str:
    return "\n".join(report_lines(report, stream or io.StringIO()))


def test_what_is_printed_can_be_pasted(
    chats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines from `stages:` to the next blank one are a part of a recipe whose params `clean` takes."""
    code, said, _ = slipway(capsys, monkeypatch, "inspect", str(chats))
    assert code == 0
    block = yaml.safe_load("stages:" + said.partition("\nstages:")[2].partition("\n\n")[0])
    ((name, stage),) = block["stages"].items()
    assert (name, stage["kind"]) == ("chats_rows", "clean")
    assert params_of(CleanParams, stage["params"], chats.parent).source.layout == "messages"
    assert "all rows: 3 read = 3 kept + 0 dropped" in said
    assert "  assistant: [[say 0]]" in said
    assert "\x1b" not in said


def test_json_holds_the_same(chats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, _ = slipway(capsys, monkeypatch, "inspect", str(chats), "--json", "--show", "1")
    (proposal,) = json.loads(said)["proposals"]
    assert (code, proposal["source"]["layout"]) == (0, "messages")
    assert proposal["shown"] == [
        {
            "where": "chats.jsonl:1",
            "row": CHATS[0],
            "parts": [
                {"name": "user", "pieces": [["ask 0", False]]},
                {"name": "assistant", "pieces": [["say 0", True]]},
            ],
        }
    ]


def test_a_terminal_gets_colour_and_nothing_that_the_data_commands(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "\x1b[2Jask"}, {"role": "assistant", "content": "say\nmore"}]}
    path.write_text(json.dumps(row) + "\n")
    said = printed(inspect_data([str(path)], Asked()), Terminal())
    assert "  assistant: \x1b[1;32msay\x1b[0m\n    \x1b[1;32mmore\x1b[0m" in said
    assert "\\x1b[2Jask" not in said and "\x1b[2J" not in said


def test_tokens_that_carry_loss_are_marked(chats: Path, model: Path) -> None:
    """One token a character: <s> <|user|> `ask 0` <|end|> <|assistant|> `say 0` <|end|> are 15, of which `say 0` and the end
    carry loss, 6.
    """
    report = inspect_data([str(chats)], Asked(model=model, num_shown=1, max_length_tokens=14))
    (proposal,) = report["proposals"]
    assert proposal["tokens"] == {"min": 15, "p50": 15, "p90": 15, "p99": 15, "max": 15}
    assert proposal["longer_than_max_length_tokens"] == 3
    (shown,) = proposal["shown"]
    (part,) = shown["parts"]
    assert part["name"] == "chat, 15 tokens, 6 carry loss"
    assert [piece for piece, marked in part["pieces"] if marked] == ["say 0<|end|>"]
    assert "".join(piece for piece, _ in part["pieces"]) == "<s><|user|>ask 0<|end|><|assistant|>say 0<|end|>"


def test_turns_without_loss_and_last_questions_carry_none(model: Path) -> None:
    view = ModelView(model)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    (seen,) = view.views_of({"messages": turns}, "chats")
    assert [piece for piece, marked in view.part_of(seen)["pieces"] if marked] == ["d<|end|>"]
    (asked,) = view.views_of({"prompt": turns}, "prompts")
    assert not any(asked.carries_loss)
    pair = {"prompt": turns[2:5], "chosen": [turns[3]], "rejected": [{"role": "assistant", "content": "x"}]}
    sides = view.views_of(pair, "preferences")
    assert [each.name for each in sides] == ["chosen", "rejected"]
    learned = [[piece for piece, marked in view.part_of(each)["pieces"] if marked] for each in sides]
    assert learned == [["d<|end|>"], ["x<|end|>"]]  # and not the answer that stands in the prompt
    single = {"prompt": turns[:3], "completion": [turns[3]], "label": False}
    (seen,) = view.views_of(single, "unpaired_preferences")
    assert [piece for piece, marked in view.part_of(seen)["pieces"] if marked] == ["d<|end|>"]
    told = parts_of_row(single, "unpaired_preferences")
    assert [(part["name"], part["pieces"][0][0]) for part in told[-2:]] == [
        ("completion", "d"),
        ("label", "undesirable"),
    ]
    assert prompt_of(single, "chat") == turns[:3]


def test_rows_that_the_template_refuses_are_counted(chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("{{ raise_exception('no chats today') }}").save_pretrained(folder)
    report = inspect_data([str(chats)], Asked(model=folder))
    refused = report["proposals"][0]["not_rendered"]
    assert refused["count"] == 3
    assert "no chats today" in refused["examples"][0]
    assert "not rendered by this model's template: 3 rows" in printed(report)


def test_a_template_that_writes_no_text_is_said_of_its_folder_and_of_rows(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    build("{{- '\\ud800' -}}" + PRESETS["slipway"].template).save_pretrained(folder)
    for places in ([str(folder)], [str(chats), "--model", str(folder)]):
        code, out, said = slipway(capsys, monkeypatch, "inspect", *places)
        assert r"what it writes holds '\ud800', half of a character, which UTF-8 cannot hold" in out + said, (
            code,
            said,
        )
        assert "Traceback" not in said and code in (0, 2)


def test_marks_of_spans_and_answers() -> None:
    """Of overlapping spans the first is marked."""
    spans = [{"start": 4, "end": 7, "label": "A"}, {"start": 5, "end": 9, "label": "B"}]
    assert marked_pieces("one two three", spans, "label") == [("one ", False), ("two|A", True), (" three", False)]
    row = {"id": "q", "context": "one two", "question": "?", "answers": [{"start": 4, "text": "two"}]}
    context, _, answers = parts_of_row(row, "questions")
    assert context["pieces"] == [["one ", False], ["two", True]]
    assert answers["pieces"] == [["two", True]]


def test_what_turns_hold_beside_their_content_is_shown() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (seen,) = parts_of_row({"messages": [call]}, "chats")
    assert seen == {"name": "assistant", "pieces": [['tool_calls: [{"name": "f"}]', True]]}


def test_rows_that_show_nothing() -> None:
    """A turn may say nothing where it calls a tool."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert emptied({"messages": [call]}) is None
    assert emptied({"messages": [{"role": "assistant", "content": "\u200b"}]}) == "empty_field"
    assert emptied({"messages": [{"role": "system", "content": "", "tools": [{"type": "function"}]}]}) is None
    assert emptied({"text": " ", "label": "a"}) == "empty_field"
    assert emptied({"id": "a", "context": "b", "question": "c", "answers": []}) is None


def test_percentiles_are_lengths_that_occur() -> None:
    """Of 1 to 200: half of them are at most 100, 90 % at most 180, 99 % at most 198."""
    assert spread(range(1, 201)) == {"min": 1, "p50": 100, "p90": 180, "p99": 198, "max": 200}
    assert spread([7]) == {"min": 7, "p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert spread([]) == {}


def artifact_of(out: Path, kind: Kind) -> Path:
    manifest = Manifest(
        artifact_id="0" * 64,
        artifact_kind=kind,
        stage="clean",
        stage_version=1,
        step="rows",
        recipe="r",
        seed=0,
        params={},
        input_ids={},
        files={path.name: FileEntry(size=1, sha256="0" * 64) for path in out.iterdir()},
        created_at="2026-01-01T00:00:00Z",
        wall_seconds=1.0,
        world_size=1,
        device="cpu",
        library_versions={},
    )
    (out / "manifest.json").write_text(manifest.model_dump_json())
    return out


def test_rows_of_an_artifact_are_shown_with_what_was_dropped(chats: Path, tmp_path: Path, model: Path) -> None:
    """Four rows, one of which says what another says."""
    with chats.open("a") as file:
        file.write(json.dumps(CHATS[0]) + "\n")
    source = {"kind": "files", "paths": [str(chats)], "layout": "messages"}
    out = run_stage(CLEAN, {"format": "chats", "source": source}, tmp_path / "ran").out
    report = inspect_folder(artifact_of(out, Kind.CHAT_ROWS), Asked(model=model, num_shown=1))
    assert (report["format"], report["files"][0]["looked_at"]) == ("chats", 3)
    said = printed(report)
    assert "4 read = 3 kept + 1 dropped" in said
    assert "dropped 1: exact_duplicate" in said
    assert "[[say 0<|end|>]]" in said
    with pytest.raises(DataError, match="--layout, --format and --set say nothing of it"):
        inspect_folder(out, Asked(layout="messages"))


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("rows.jsonl", "{", "rows.jsonl:1: is not JSON"),
        ("rows.jsonl", '{"text": "a"}', "rows.jsonl:1: is no row of chats"),
        ("rows.jsonl", '{"messages": [1]}', "rows.jsonl:1: is no row of chats"),
        ("ledger.json", '{"read": 3}', "ledger.json: is no ledger"),
        ("ledger.json", "[]", "ledger.json: is not a JSON object"),
    ],
)
def test_a_damaged_artifact_is_told(file: str, content: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
    (tmp_path / file).write_text(content)
    with pytest.raises(SlipwayError, match=re.escape(what)):
        inspect_folder(artifact_of(tmp_path, Kind.CHAT_ROWS), Asked())


def test_an_adapter_is_shown_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "some/base", "peft_type": "LORA", "r": 8}'
    )
    report = inspect_folder(tmp_path, Asked())
    assert report["adapter"] == {"base_model_name_or_path": "some/base", "peft_type": "LORA", "r": 8}
    assert "its tokenizer cannot be used" in printed(report)


def test_a_model_is_shown_with_its_template_and_an_example(model: Path) -> None:
    said = printed(inspect_folder(model, Asked()))
    assert "stop_tokens: {'2': '</s>'" in said and "'<|end|>'" in said
    assert "[[Paris.<|end|>]]" in said
    assert "chat template" in said


def test_a_tokenizer_without_template_is_shown_too(tmp_path: Path) -> None:
    build(None).save_pretrained(tmp_path)
    report = inspect_folder(tmp_path, Asked())
    assert "example" not in report and report["tokenizer"]["vocabulary_size"] > 100
    assert "chat template" not in printed(report)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["none.jsonl"], "no file or folder, and no artifact or step of this name"),
        ([""], "no file or folder, and no artifact or step of this name"),
        (["*.none"], "is not there"),
        (["pipe"], "is a pipe, and a file or folder is needed"),
        (["/dev/zero"], "is a device, and a file or folder is needed"),
        (["loop"], "is a symbolic link that leads back to itself"),
        (["x/" * 3000], "is longer than a path can be"),
        (["~nobody-of-this-name/x"], "nobody's home folder is known"),
        (["empty.jsonl"], "holds nothing"),
        (["folder"], "holds no data file"),
        (["rows.jsonl", "--layout", "chatz"], "--layout: there is no 'chatz'"),
        (["rows.jsonl", "--format", "chat"], "--format: there is no 'chat'. Did you mean 'chats'?"),
        (["rows.jsonl", "--format", "chats", "--layout", "text"], "the layout text gives text, not chats"),
        (["rows.jsonl", "--set", "recordz=a"], "--set recordz: a source has no such field to set"),
        (["rows.jsonl", "--set", "records"], "is not of the form field=value"),
        (["rows.jsonl", "--set", "encoding=klingon"], "there is no text encoding 'klingon'"),
        (["rows.jsonl", "--set", "columns=3"], "--set columns: is not a mapping of names"),
        (["rows.jsonl", "--set", "columns.text=3"], "--set columns: is not a mapping of names"),
        (["rows.jsonl", "--set", "columns.txt=a"], "no layout has such a column. Did you mean 'text'?"),
        (["rows.jsonl", "--set", "max_broken_fraction=7"], "source.max_broken_fraction: "),
        (["rows.jsonl", "--max-length-tokens", "9"], "--model FOLDER"),
        (["rows.jsonl", "--model", "nowhere"], "no file or folder, and no artifact"),
        (["rows.jsonl", "--model", "folder"], "holds no tokenizer that can be opened"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    Path("empty.jsonl").write_text("")
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    code, _, said = slipway(capsys, monkeypatch, "inspect", *arguments)
    assert (code, what in said, said.count("\n")) == (2, True, 1), said


def test_fields_of_a_source_are_set_as_those_of_a_recipe_are() -> None:
    assert source_fields(["records=train", 'columns.text="0"', "has_header=false"]) == {
        "records": "train",
        "columns": {"text": "0"},
        "has_header": False,
    }
    with pytest.raises(RecipeError, match="field=value"):
        source_fields(["=3"])
    with pytest.raises(RecipeError, match="has more than 64 lists and mappings within each other"):
        source_fields(["columns" + ".b" * 60_000 + "=1"])


def test_several_files_are_one_source(chats: Path) -> None:
    other = chats.with_name("more.jsonl")
    other.write_text(json.dumps({"messages": [*CHATS[0]["messages"], {"role": "user", "content": "and then?"}]}) + "\n")
    report = inspect_places(
        [str(chats), str(other)],
        layout=None,
        format=None,
        given={},
        model=None,
        num_rows=0,
        num_shown=0,
        max_length_tokens=None,
    )
    assert report["proposals"][0]["rows"]["read"] == 4
    assert report["notes"] == ["2 files; how they are read is told by the first, chats.jsonl"]
