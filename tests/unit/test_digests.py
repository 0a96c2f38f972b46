"""Digests of what lies outside: they follow content, and are remembered only while nothing can have changed."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.store import digests as module
from pipeline.store.digests import Digests, cache_file


def old(path: Path) -> Path:
    """The file as if it was written long ago."""
    os.utime(path, (1, 1))
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return old(path)


def test_digests_of_folders_follow_content_and_ignore_caches_and_times(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "a.py").write_text("a")
    digests = Digests(tmp_path / "digests.json")
    before = digests.of(folder)
    (folder / "__pycache__" / "a.pyc").write_text("x")
    old(folder / "a.py")
    assert digests.of(folder) == before
    (folder / "a.py").write_text("b")
    assert digests.of(folder) != before


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1])
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    """Also where it is read in more than one go, or in none."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    expected = sha256(path.read_bytes()).hexdigest()
    assert Digests(tmp_path / "digests.json").of(path) == f"sha256:{expected}"


def test_a_digest_is_remembered_only_while_the_file_is_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "data.jsonl", "1")
    first = Digests(tmp_path / "digests.json")
    digest = first.of(file)
    first.save()
    read: list[str] = []
    monkeypatch.setattr(module, "digest_file", lambda path: read.append(str(path)) or "of another content")
    again = Digests(tmp_path / "digests.json")
    assert again.of(file) == digest
    assert read == []
    written(file, "2")
    assert again.of(file) == "sha256:of another content"
    assert read == [str(file)]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    """A second change within the clock's grain would leave size and time as they are."""
    (tmp_path / "data.jsonl").write_text("1")
    digests = Digests(tmp_path / "digests.json")
    digests.of(tmp_path / "data.jsonl")
    digests.save()
    assert not (tmp_path / "digests.json").exists()


def test_two_processes_keep_what_each_other_found_and_forget_what_is_gone(tmp_path: Path) -> None:
    names = [written(tmp_path / name, name) for name in ("a", "b", "gone")]
    one, other = (Digests(tmp_path / "cache" / "digests.json") for _ in range(2))
    for digests, path in ((one, names[0]), (other, names[1]), (one, names[2])):
        digests.of(path)
    one.save()
    names[2].unlink()
    other.save()
    assert sorted(json.loads(other.file.read_bytes())) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_is_remembered_is_a_help_and_not_needed(tmp_path: Path) -> None:
    """A file that is no JSON is written anew; a place that cannot be written is left alone."""
    file = written(tmp_path / "data", "1")
    (tmp_path / "digests.json").write_text("{")
    (tmp_path / "not a folder").write_text("")
    for place in (tmp_path / "digests.json", tmp_path / "not a folder" / "digests.json"):
        digests = Digests(place)
        assert digests.of(file) == f"sha256:{sha256(b'1').hexdigest()}"
        digests.save()
    assert list(json.loads((tmp_path / "digests.json").read_bytes())) == [str(file)]


def test_the_place_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIPWAY_CACHE", raising=False)
    assert cache_file() == tmp_path / "slipway" / "digests.json"
    monkeypatch.setenv("SLIPWAY_CACHE", str(tmp_path / "own"))
    assert cache_file() == tmp_path / "own" / "digests.json"
    monkeypatch.delenv("SLIPWAY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "slipway" / "digests.json"
