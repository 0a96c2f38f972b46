"""Paths from outside: every way in which one can be wrong is a sentence, and none is a wait."""

from __future__ import annotations

import glob
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.deepspeed import DeepSpeedOptions
from pipeline.errors import ArtifactError, PathError, RecipeError
from pipeline.recipe.outside import kind_of_folder
from pipeline.settings import paths as module
from pipeline.settings.paths import expanded, holds_file, matching, read_file, read_json, status
from pipeline.settings.resources import find_layout
from pipeline.settings.strict import OutsideFolder, Reading, Strict, validate
from pipeline.settings.yaml_loader import load_yaml
from pipeline.store.artifact import Kind, digest_file, read_manifest
from pipeline.store.digests import Digests, cache_file
from tests.unit.fake_stages import WriteParams

LONG = "x" * 300


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: with a pipe, a socket, links, a file and a folder."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("pipe", "link_to_pipe")
    os.symlink("gone", "dangling")
    Path("folder").mkdir()
    Path("file").write_text("a: 1")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        yield tmp_path


NEVER_A_PATH = [
    ("pipe", "is a pipe, and a file or folder is needed"),
    ("link_to_pipe", "is a pipe, and a file or folder is needed"),
    ("socket", "is a socket, and a file or folder is needed"),
    ("/dev/zero", "is a device, and a file or folder is needed"),
    ("loop", "is a symbolic link that leads back to itself"),
    (LONG, "is longer than a path can be"),
    ("x/" * 3000, "is longer than a path can be"),
    ("~nobody-of-this-name/x", "nobody's home folder is known as ~nobody-of-this-name"),
    ("a\0b", "holds a NUL character"),
    ("a\udce9b", "is not text in UTF-8"),
]


@pytest.mark.parametrize(("name", "what"), NEVER_A_PATH, ids=lambda value: ascii(value)[:20])
def test_a_field_that_names_a_file_says_what_is_wrong_with_it(odd: Path, name: str, what: str) -> None:
    for field in ("file", "block"):
        params, problems = validate(WriteParams, {field: name}, "params", Reading([odd]))
        assert params is None
        assert [problem.where for problem in problems] == [f"params.{field}"]
        assert what in problems[0].what
    with pytest.raises(PathError, match=what):
        find_layout(f"{name}.json" if name == LONG else name, Reading([odd])) or Reading([odd]).find(name)


@pytest.mark.parametrize("name", ["dangling", "file/x", "gone"])
def test_what_is_not_there_is_said_with_the_places_that_were_looked_at(odd: Path, name: str) -> None:
    _, problems = validate(WriteParams, {"file": name}, "params", Reading([odd]))
    assert f"no such file or folder: {name} (looked below {odd}" in str(problems[0])


def test_a_folder_where_a_file_is_needed_and_the_reverse(odd: Path) -> None:
    class Rows(Strict):
        root: OutsideFolder
        """A folder."""

    assert "is a folder, and a file is needed" in str(
        validate(DeepSpeedOptions, {"hostfile": "folder"}, "r", Reading([odd]))
    )
    assert "is a folder, and a file is needed" in str(validate(WriteParams, {"block": "folder"}, "r", Reading([odd])))
    assert "is a file, and a folder is needed" in str(validate(Rows, {"root": "file"}, "r", Reading([odd])))
    assert validate(Rows, {"root": "folder"}, "r", Reading([odd]))[1] == []
    assert validate(DeepSpeedOptions, {"hostfile": "file"}, "r", Reading([odd]))[1] == []


def test_the_problems_of_a_file_with_a_block_are_told_once_and_with_its_name(odd: Path) -> None:
    (odd / "block.yaml").write_text("words: [\n")
    _, problems = validate(WriteParams, {"block": "block.yaml"}, "params", Reading([odd]))
    assert [problem.where for problem in problems] == [f"{odd}/block.yaml:2"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pipe", "is a pipe, and a file is needed"),
        ("/dev/zero", "is a device, and a file is needed"),
        ("folder", "is a folder, and a file is needed"),
        ("gone", "is not there"),
        ("file/x", "lies below a file"),
        ("loop", "leads back to itself"),
        (LONG, "is longer than a path can be"),
    ],
)
def test_only_regular_files_are_read_and_nothing_is_waited_for(odd: Path, name: str, what: str) -> None:
    with pytest.raises(PathError, match=what):
        read_file(Path(name), 100)
    with pytest.raises(RecipeError, match=what):
        load_yaml(Path(name))


def test_a_file_is_read_up_to_its_limit(odd: Path) -> None:
    assert read_file(Path("file"), 4) == b"a: 1"
    with pytest.raises(PathError, match="has 4 bytes, and 3 are the most"):
        read_file(Path("file"), 3)
    # Its size is told as 0, and what is read is not.
    with pytest.raises(PathError, match="are the most that is read"):
        read_file(Path("/proc/self/status"), 10)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "holds a number of too many digits"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ("\x80", "is not JSON"),
    ],
)
def test_json_from_outside_is_an_object_or_a_sentence(odd: Path, content: str, what: str) -> None:
    Path("config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(PathError, match=what):
        read_json(Path("config.json"))
    with pytest.raises(PathError, match=what):
        kind_of_folder(odd)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"architectures": {"a": 1}}, "has {'a': 1} as `architectures`"),
        ({"architectures": 5}, "has 5 as `architectures`"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}, "has 'x' as `hidden_size`"),
        ({"architectures": ["LlamaForCausalLM"], "num_attention_heads": [1]}, "as `num_attention_heads`"),
        ({"architectures": ["Odd"]}, "names the architecture 'Odd'"),
        ({}, "does not say in `architectures`"),
    ],
)
def test_a_config_that_no_plan_can_reckon_with_is_refused(odd: Path, config: dict[str, object], what: str) -> None:
    Path("config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError) as caught:
        kind_of_folder(odd)
    assert what in str(caught.value)


def test_a_classifier_with_labels_of_an_odd_type_is_a_classifier(odd: Path) -> None:
    Path("config.json").write_text('{"architectures": ["XForSequenceClassification"], "id2label": 1}')
    assert kind_of_folder(odd) is Kind.CLASSIFIER


def test_a_manifest_that_is_a_pipe_is_not_waited_for(odd: Path) -> None:
    os.mkfifo("folder/manifest.json")
    assert not holds_file(Path("folder"), "manifest.json")
    with pytest.raises(ArtifactError, match="is no regular file"):
        read_manifest(Path("folder"))
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        read_manifest(Path("gone"))
    with pytest.raises(PathError, match="is a pipe"):
        digest_file(Path("pipe"))


@pytest.mark.parametrize("name", ["", LONG, "a\0b", "loop", "pipe", "/dev/zero", "file", "a\udce9b"])
def test_what_cannot_be_a_folder_holds_no_file(odd: Path, name: str) -> None:
    assert not holds_file(Path(name), "manifest.json")


def test_the_digest_of_a_folder_refuses_what_has_no_end(odd: Path) -> None:
    data = odd / "data" / "deep"
    data.mkdir(parents=True)
    (data / "a.txt").write_text("a")
    (data / "gone").symlink_to("nowhere")
    (data / ".pipe").symlink_to(odd / "pipe")
    before = Digests(odd / "digests.json").of(odd / "data")
    (data / "gone").unlink()
    assert Digests(odd / "digests.json").of(odd / "data") == before
    os.mkfifo(data / "b.txt")
    with pytest.raises(PathError, match=r"data/deep/b\.txt: is a pipe, and no part of a data set or model"):
        Digests(odd / "digests.json").of(odd / "data")
    (data / "b.txt").unlink()
    (data / "b.txt").symlink_to("/dev/zero")
    with pytest.raises(PathError, match="is a device"):
        Digests(odd / "digests.json").of(odd / "data")


def test_the_digest_of_a_folder_refuses_names_that_are_no_text(odd: Path) -> None:
    (odd / "folder" / "caf\udce9.jsonl").write_text("{}")
    with pytest.raises(PathError, match="has a name that is not UTF-8"):
        Digests(odd / "digests.json").of(odd / "folder")


def test_the_digest_of_what_is_gone_is_a_sentence(odd: Path) -> None:
    with pytest.raises(PathError, match="is not there"):
        Digests(odd / "digests.json").of(odd / "gone")


def test_a_user_without_a_home_remembers_no_digests(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "SLIPWAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    digests = Digests(cache_file())
    os.utime("file", (1, 1))
    digests.of(odd / "file")
    digests.save()
    with pytest.raises(PathError, match="home folder"):
        expanded("~/x")
    monkeypatch.setenv("SLIPWAY_CACHE", "~nobody-of-this-name")
    with pytest.raises(PathError, match="~nobody-of-this-name"):
        cache_file()


def test_the_status_of_what_is_not_there_is_none(odd: Path) -> None:
    assert status("gone") is status("file/x") is status("dangling") is None


# Patterns


def test_patterns_find_what_glob_finds(tmp_path: Path) -> None:
    """The standard library's `glob` is the oracle, in a tree without links."""
    for number in range(60):
        choose = random.Random(number).choice
        parts = [choose(["a", "b", ".c", "d1"]) for _ in range(choose([1, 2, 3]))]
        path = tmp_path.joinpath("root", *parts, choose(["x.jsonl", "y.txt", ".z.jsonl", "[w].txt"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    patterns = (
        "*", "**", "**/*", "**/*.jsonl", "*/x.jsonl", "a/**", "a/**/x.jsonl", "**/b/*", "**/**/x.jsonl", "?/*", "[ab]/*", "[!a]/*",
        ".*/*", "**/.z.jsonl", "**/[[]w].txt", "none/*", "a/x.jsonl/*", "*/*/*.txt", "d[0-9]/**/*",
    )  # fmt: skip
    for pattern in patterns:
        expected = glob.glob(f"{tmp_path}/root/{pattern}", recursive=True)
        found = matching(tmp_path / "root" / pattern)
        assert found == sorted({path.rstrip("/") for path in expected}), pattern
        assert found or pattern.startswith(("none", "a/x.jsonl"))


def test_links_that_lead_upwards_make_no_endless_paths(tmp_path: Path) -> None:
    """Two links to their own folder: forty levels of them, which the system allows, are 2 ** 40 paths."""
    (tmp_path / "b.jsonl").touch()
    for name in ("a", "c"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").touch()
    started = time.process_time()
    found = {os.path.realpath(path) for path in matching(tmp_path / "**" / "*.jsonl")}
    assert found == {str(tmp_path / "b.jsonl"), str(tmp_path / "deep" / "d.jsonl")}
    assert matching(tmp_path.joinpath(*["*"] * 38, "none")) == []
    assert time.process_time() - started < 1


def test_a_linked_folder_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.jsonl").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to("../far")
    assert matching(tmp_path / "data" / "**" / "*.jsonl") == [str(tmp_path / "data" / "link" / "a.jsonl")]


def test_a_pattern_that_looks_at_a_whole_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    monkeypatch.setattr(module, "MOST_ENTRIES", 3)
    assert len(matching(tmp_path / "*")) == 3
    monkeypatch.setattr(module, "MOST_ENTRIES", 2)
    with pytest.raises(PathError, match="looks at more than 2 files and folders"):
        matching(tmp_path / "*")


def test_a_pattern_is_wrong_as_a_path_is(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PathError, match="leads back to itself"):
        matching(tmp_path / "loop" / "*")
    assert matching(tmp_path / "*" / "*") == []
    for pattern in (tmp_path / "*" / LONG, tmp_path / LONG / "*"):
        with pytest.raises(PathError, match="is longer than a path can be"):
            matching(pattern)
