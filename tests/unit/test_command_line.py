"""The command line: what a user can do wrong ends with exit code 2 and a sentence, whatever the class of the error was."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.command import cli, planning
from pipeline.figures import printable
from pipeline.settings.strict import CHECKOUT
from pipeline.store.store import Store
from tests.unit.test_records import entry

LONG = "x" * 300
RECIPE = """
name: small
outputs: [rows]
stages:
  rows: {kind: clean, params: {format: text, source: {kind: files, layout: text, paths: [rows.jsonl]}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a recipe that can be planned."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    return tmp_path


def slipway(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """(exit code, what was printed as errors) of the command."""
    monkeypatch.setattr(sys, "argv", ["slipway", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return code if isinstance(code, int) else 1, capsys.readouterr().err


def process(folder: Path, shell: str, **environment: str) -> tuple[int, bytes]:
    """(exit code, all output) of a shell's line in which `$slipway` is the command."""
    command = f"{sys.executable} -m pipeline"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "slipway": command, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_a_recipe_that_can_be_planned_is_planned(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slipway(capsys, monkeypatch, "plan", "recipe.yaml") == (0, "")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{LONG}.yaml", "is longer than a path can be"),
        ("x/" * 3000, "is longer than a path can be"),
        ("~nobody-of-this-name/x.yaml", "nobody's home folder is known as ~nobody-of-this-name"),
        ("loop", "is a symbolic link that leads back to itself"),
        ("pipe", "is a pipe, and a file or folder is needed"),
        ("/dev/zero", "is a device, and a file or folder is needed"),
        (".", "is a folder, and a file is needed"),
        ("recipe.yaml/x", "no such recipe"),
        ("caf\udce9.yaml", "is not text in UTF-8"),
    ],
    ids=lambda value: ascii(value)[:20],
)
@pytest.mark.parametrize("command", ["plan", "run", "status"])
def test_a_recipe_that_is_no_file(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    what: str,
) -> None:
    code, said = slipway(capsys, monkeypatch, command, name)
    assert (code, what in said, said.count("\n")) == (2, True, 1), said


@pytest.mark.parametrize(
    "name", [LONG, "x/" * 3000, "~nobody-of-this-name", "loop", "pipe", "/dev/zero", "", "recipe.yaml", "a\nb"]
)
@pytest.mark.parametrize("command", ["show", "lineage", "verify", "chat"])
def test_a_name_that_is_no_artifact(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    code, said = slipway(capsys, monkeypatch, command, name)
    assert (code, "no artifact or step of this name" in said) == (2, True), said
    assert said.count("\n") == 1 and (name or "error: '': " in said), said


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("~nobody-of-this-name/x.yaml", "nobody's home folder is known as ~nobody-of-this-name"),
        ("a\0b", "holds a NUL character"),
        ("caf\udce9.yaml", "is not text in UTF-8"),
        ("loop", "no recipe of this name or path ran in"),
        ("", "no recipe of this name or path ran in"),
        ("x/" * 3000, "no recipe of this name or path ran in"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_is_to_be_forgotten_and_is_no_recipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    the_store = Store(folder / "runs")
    the_store.record("small", entry(str(folder / "recipe.yaml")))
    code, said = slipway(capsys, monkeypatch, "forget", name)
    assert (code, what in said, len(said) < 700) == (2, True, True), said
    assert [plan.name for plan in the_store.records().plans] == ["small"]


def test_a_chat_with_a_folder_that_holds_no_model_loads_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{")
    code, said = slipway(capsys, monkeypatch, "chat", "model")
    assert (code, "config.json: is not JSON" in said) == (2, True), said
    Path("model/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    os.mkfifo("model/model.safetensors")
    code, said = slipway(capsys, monkeypatch, "chat", "model")
    assert (code, "model.safetensors: is a pipe" in said) == (2, True), said


@pytest.mark.parametrize(
    ("store", "what"),
    [
        ("recipe.yaml", "recipe.yaml is no folder. Choose another place with --store"),
        ("recipe.yaml/below", "recipe.yaml is no folder. Choose another place with --store"),
        ("/dev/null", "/dev/null is no folder"),
        ("loop", "is a symbolic link that leads back to itself"),
        (LONG, "is longer than a path can be"),
        ("x/" * 1800, "is too long for a store"),
        ("~nobody-of-this-name", "cannot be a store: nobody's home folder is known as ~nobody-of-this-name"),
        ("caf\udce9", "is not text in UTF-8"),
    ],
    ids=lambda value: ascii(value)[:20],
)
@pytest.mark.parametrize("arguments", [("plan", "recipe.yaml"), ("run", "recipe.yaml"), ("status",)])
def test_a_place_where_no_store_can_be(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    store: str,
    what: str,
) -> None:
    for given in ([*arguments, "--store", store], [*arguments]):
        if len(given) == len(arguments):
            monkeypatch.setenv("SLIPWAY_STORE", store)
        code, said = slipway(capsys, monkeypatch, *given)
        assert (code, what in said) == (2, True), said


@pytest.mark.parametrize("name", ["", "row"])
@pytest.mark.parametrize("option", ["--only", "--until", "job"])
def test_a_stage_that_is_none_is_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    """An empty name too, as a variable that is not set leaves it."""
    arguments = ("job", "recipe.yaml", name) if option == "job" else ("run", "recipe.yaml", option, name)
    code, said = slipway(capsys, monkeypatch, *arguments)
    hint = "Did you mean 'rows'?" if name else "Known: rows."
    assert (code, said) == (2, f"error: {folder}/recipe.yaml: has no stage '{name}'. {hint}\n")
    assert not Path("runs").exists()


def test_only_and_until_exclude_each_other_also_where_one_is_empty(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = slipway(capsys, monkeypatch, "run", "recipe.yaml", "--only", "rows", "--until", "")
    assert (code, said) == (2, "error: --only and --until: exclude each other. Use one of them.\n")


def test_an_option_that_takes_one_value_is_given_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two would be dropped without a word. What is repeatable is repeated, and a flag says the same twice."""
    code, said = slipway(capsys, monkeypatch, "run", "recipe.yaml", "--until", "rows", "--until", "other")
    assert code == 2 and "Option '--until' takes one value, and was given 2 times." in said
    repeated = ("--set", "rows.source.layout=text", "--set", "rows.format=text", "--json", "--json")
    assert slipway(capsys, monkeypatch, "plan", "recipe.yaml", *repeated)[0] == 0


@pytest.mark.parametrize("arguments", [("plan", "recipe.yaml"), ("run", "recipe.yaml"), ("gc",), ("chat", "model")])
def test_an_empty_name_of_a_store_is_not_the_working_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    before = sorted(folder.iterdir())
    code, said = slipway(capsys, monkeypatch, *arguments, "--store", "")
    assert (code, "it is empty; name a folder, or . for the working folder" in said) == (2, True), said
    assert sorted(folder.iterdir()) == before
    monkeypatch.setenv("SLIPWAY_STORE", "")
    assert slipway(capsys, monkeypatch, "plan", "recipe.yaml", "--store", ".") == (0, "")


def test_an_error_of_the_system_that_names_a_file_is_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be made below /proc, though it is a folder."""
    code, said = slipway(capsys, monkeypatch, "run", "recipe.yaml", "--store", "/proc/slipway")
    assert (code, "/proc/slipway" in said, "Traceback" in said) == (2, True, False), said


def test_an_error_of_ours_stays_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError(errno.EINVAL, "a bug")

    monkeypatch.setattr(planning, "make_plan", broken)
    monkeypatch.setattr(sys, "argv", ["slipway", "plan", "recipe.yaml"])
    with pytest.raises(OSError, match="a bug"):
        cli.main()


def test_the_override_of_a_user_does_not_command_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = slipway(capsys, monkeypatch, "plan", "recipe.yaml", "--set", "\x1b[2Jrows\udcff=1")
    assert (code, said.isprintable() or said.rstrip("\n").isprintable()) == (2, True)
    assert r"--set \x1b[2Jrows\udcff=1: the recipe has no stage" in said


@pytest.mark.parametrize("character", ["\n", "\t", "\r", "\x1b", "\x07", "\x85", "\u2028"])
def test_each_mistake_in_a_recipe_is_one_line_whatever_its_names_hold(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    name, escape = f"a{character}b", ascii(character)[1:-1]
    stage = {"kind": name, "inputs": {name: name, "rows": {name: "gone"}}, "params": {name: 1}, name: 1}
    known = {"kind": "clean", "params": {name: 1}, "resources": {"launcher": name, "deepspeed": name}}
    one, other = f"x{name}", f"y{name}"
    rounds = {each: {"kind": "mix", "inputs": {"sources": {"a": of}}} for each, of in ((one, other), (other, one))}
    recipe = {"name": name, "outputs": [one, f"{name}c"], "stages": {name: stage, f"{name}2": known, **rounds}, name: 1}
    Path("odd.yaml").write_text(json.dumps(recipe))
    code, said = slipway(capsys, monkeypatch, "plan", "odd.yaml", "--set", f"{name}=1", "--set", f"{name}3=1")
    lines = said.split("\n")
    assert (code, lines[-1], lines[-2].partition(" ")[2]) == (2, "", "problems; nothing was run."), said
    assert all(line.startswith("error: ") and line.isprintable() for line in lines[:-2]), said
    for what in (
        f"odd.yaml: stages.a{escape}b: is no name for a stage",
        f"the stages wait for each other: xa{escape}b <- ya{escape}b <- xa{escape}b",
        f"there is no launcher 'a{escape}b'",
        f"there is no memory layout 'a{escape}b'",
    ):
        assert what in said, said


@pytest.mark.parametrize(
    ("levels", "what"),
    [
        (59, "stages.base.params.architecture.b: is no field of llama"),
        (60, "has more than 64 lists and mappings within each other. Write it flatter."),
        (1500, "has more than 64 lists and mappings within each other. Write it flatter."),
    ],
)
def test_an_override_is_no_deeper_than_a_file_may_be(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, levels: int, what: str
) -> None:
    """`architecture` takes anything, until the stage looks at it: four levels stand around it, and the list is one."""
    deep = f"base.architecture{'.b' * levels}=[1]"
    recipe = str(CHECKOUT / "pipeline" / "recipes" / "quickstart.yaml")
    code, said = slipway(capsys, monkeypatch, "plan", recipe, "--set", deep)
    assert (code, what in said) == (2, True), said


def test_a_long_line_is_cut_in_its_middle() -> None:
    """A thousand characters of each end stay, so that the way out, which stands last, is read."""
    line = printable(f"where: {'x' * 100_000}. Mend it.", sys.stderr)
    assert len(line) == 2005
    assert line.startswith("where: x") and line.endswith("x. Mend it.")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        "$slipway stages --help | head -c 1 >/dev/null",
        "$slipway status --json | true",
        "$slipway stages | head -n 1 >/dev/null",
    ],
)
def test_a_reader_who_leaves_early_gets_no_traceback(folder: Path, shell: str) -> None:
    code, said = process(folder, shell)
    assert said == b""
    assert code in (0, 1)


def test_a_full_disk_at_the_output_is_a_sentence(folder: Path) -> None:
    code, said = process(folder, "$slipway stages > /dev/full")
    assert (code, said) == (2, b"error: the output: cannot be used: No space left on device. Check the path.\n")


@pytest.mark.slow
def test_a_terminal_that_shows_ascii_only_gets_escapes(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("name: small", "name: \u00e4\u4e2d"), encoding="utf-8")
    code, said = process(folder, "$slipway plan recipe.yaml", LANG="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (code, rb"not '\xe4\u4e2d'" in said, b"Traceback" in said) == (2, True, False), said
    (folder / "rows_\u00e4").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    shell = "$slipway plan recipe.yaml --store rows_$'\\xc3\\xa4'"
    code, said = process(folder, shell, LANG="C", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (code, rb"free in" in said, rb"rows_\xe4" in said) == (0, True, True), said


@pytest.mark.slow
def test_an_argument_that_is_not_utf8_is_a_sentence(folder: Path) -> None:
    for shell in (
        "$slipway plan $'caf\\xe9.yaml'",
        "$slipway plan recipe.yaml --set $'rows.max_rows=\\xff'",
        "$slipway show $'caf\\xe9'",
        "$slipway status --store $'caf\\xe9'",
    ):
        code, said = process(folder, shell)
        assert (code, b"error: " in said, b"Traceback" in said) == (2, True, False), said


def test_a_working_folder_that_is_not_utf8_is_a_sentence(folder: Path) -> None:
    code, said = process(
        folder,
        "mkdir $'caf\\xe9' && cp recipe.yaml rows.jsonl $'caf\\xe9' && cd $'caf\\xe9' && $slipway plan recipe.yaml",
    )
    assert (code, b"is not text in UTF-8" in said, b"Traceback" in said) == (2, True, False), said
