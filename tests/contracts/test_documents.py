"""What the documents say can be done, can be done: links lead somewhere, commands and options exist, recipes load."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from typer.exceptions import TyperException

from launch import LAUNCHERS
from pipeline.command.cli import app
from pipeline.recipe.reader import load_recipe
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from stages import STAGES
from stages.lib.models.adapters.params import AnyMethod
from trackers import TRACKERS

FOLDERS = ("pipeline", "stages", "launch", "trackers", "data_recipes", "ds_configs", "tests")
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(path for name in FOLDERS for path in (CHECKOUT / name).glob("**/*.md"))])
COMMANDS = typer.main.get_command(app).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHELL = {"bash", "sh", "shell", "console"}
END_OF_COMMAND = {"|", "||", "&&", ";", ">", ">>", "2>", "2>&1", "&"}


def relative(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=relative)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """The anchor that a heading gets when the page is shown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ +(.+?) *$", prose(read(path)), flags=re.MULTILINE)}


def links(text: str) -> list[str]:
    """Targets of `[text](target)` and of `[label]: target`, code spans left out."""
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: +(\S+)", text, flags=re.MULTILINE)


def shell_lines(text: str) -> Iterator[str]:
    """The commands in fenced shell blocks: lines after `$ ` where the block has such lines, else all; continued lines joined."""
    for language, block in FENCE.findall(text):
        if language not in SHELL:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from prompted or [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words(line: str) -> list[str]:
    """The words of the first command of a line, without settings of variables before it."""
    found: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in END_OF_COMMAND:
            break
        if found or not re.match(r"[A-Z_]+=", word):
            found.append(word)
    return found


def slipway_arguments(line: str) -> list[str] | None:
    """What follows `slipway` or `python -m pipeline`; None for other commands."""
    found = words(line)
    if found and Path(found[0]).name == "slipway":
        return found[1:]
    if len(found) >= 3 and Path(found[0]).name.startswith("python") and found[1:3] == ["-m", "pipeline"]:
        return found[3:]
    return None


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    dead = []
    for target in links(read(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            dead.append(target)
    assert dead == []


@each_document
def test_commands_of_slipway_are_such(path: Path) -> None:
    """Each is given to the command line's own parser; recipes that it names are loaded, with its overrides."""
    for line in shell_lines(read(path)):
        arguments = slipway_arguments(line)
        if arguments is None:
            continue
        try:
            check_command(arguments)
        except TyperException as error:
            pytest.fail(f"{relative(path)}: {line}: {error.format_message()}")


def check_command(arguments: list[str]) -> None:
    """Raises `TyperException` where the arguments do not fit, and `RecipeError` where a recipe cannot be loaded."""
    if arguments[:1] in ([], ["--help"], ["-h"]):
        return
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise TyperException(f"there is no command '{arguments[0]}'")
    if {"--help", "-h"} & set(arguments):
        return
    values = command.make_context(arguments[0], arguments[1:]).params
    recipe = values.get("recipe")
    if recipe is not None and Path(recipe).parts[0] in FOLDERS:
        loaded = load_recipe(CHECKOUT / recipe, STAGES, LAUNCHERS, values.get("set_") or (), TRACKERS)
        for name in (values.get("only"), values.get("until"), values.get("stage")):
            if name:
                loaded.step(name)
    if arguments[0] == "stages" and values.get("kind") not in (None, "KIND", *STAGES):
        raise TyperException(f"there is no stage '{values['kind']}'")


@each_document
def test_commands_named_in_passing_exist(path: Path) -> None:
    """`slipway plan` between backticks: the command and its options, not its arguments."""
    unknown = []
    for span in re.findall(r"`((?:\.venv/bin/)?slipway [^`\n]+)`", prose(read(path))):
        name, *rest = words(span)[1:] or [""]
        command = COMMANDS.get(name)
        options = (
            {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
            if command
            else set()
        )
        if command is None or [
            word for word in rest if word.startswith("--") and word.partition("=")[0] not in options
        ]:
            unknown.append(span)
    assert unknown == []


@each_document
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", read(CHECKOUT / "Makefile"), flags=re.MULTILINE))
    text = read(path)
    named = {
        word for line in shell_lines(text) if words(line)[:1] == ["make"] for word in words(line)[1:] if "=" not in word
    }
    named |= {name for span in re.findall(r"`make ([^`\n]+)`", prose(text)) for name in span.split() if "=" not in name}
    assert named - targets == set()


@each_document
def test_files_named_in_prose_exist(path: Path) -> None:
    """`stages/data/clean.py` between backticks; names with a placeholder in them are left alone."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", prose(read(path)))
    assert [name for name in named if not (CHECKOUT / name).exists()] == []


def test_the_documents_that_must_be_there_are() -> None:
    wanted = {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"{n}/README.md" for n in ("pipeline", "stages", "launch", "trackers", "tests", "data_recipes")),
    }
    assert wanted - {relative(path) for path in DOCUMENTS} == set()


def test_the_readme_shows_the_two_commands() -> None:
    lines = list(shell_lines(read(CHECKOUT / "README.md")))
    assert {"make demo", "make test"} <= {" ".join(words(line)) for line in lines}


def test_the_checks_above_can_fail() -> None:
    """Wrong commands, options and stages are refused by the same functions."""
    for line, complaint in [
        ("slipway plann x.yaml", "no command 'plann'"),
        ("slipway plan", "Missing parameter"),
        ("slipway plan x.yaml --sett a=1", "No such option"),
        (".venv/bin/slipway stages pretrainn", "no stage 'pretrainn'"),
    ]:
        arguments = slipway_arguments(line)
        assert arguments is not None
        with pytest.raises(TyperException, match=complaint):
            check_command(arguments)
    assert slipway_arguments("SLIPWAY_STORE=/x slipway run a.yaml | tee log")[:2] == ["run", "a.yaml"]  # type: ignore[index]
    assert slipway_arguments("python -m pipeline doctor") == ["doctor"]
    assert slipway_arguments("make demo") is None
    block = "```console\n$ slipway run \\\n    x.yaml\nout\n```\n```python\nslipway nonsense\n```\n"
    assert [words(line) for line in shell_lines(block)] == [["slipway", "run", "x.yaml"]]
    assert links("[a](b.md) `[c](d)` [e]: f\n[g]: h.md") == ["b.md", "h.md"]
    assert slug("How to add: a stage, `x`") == "how-to-add-a-stage-x"


FROM_OTHERS = CHECKOUT / "stages" / "FROM_OTHERS.md"


def cells_of_options() -> list[list[str]]:
    """The rows of the tables of options: what stands between the bars."""
    rows = [line.strip("|").split("|") for line in read(FROM_OTHERS).splitlines() if line.startswith("| `")]
    assert len(rows) > 40 and {len(row) for row in rows} == {5}
    return rows


def test_what_options_of_others_are_called_here_exists() -> None:
    blocks = {name for block in get_args(AnyMethod) for name in block.model_fields}
    unknown = []
    for path in (path for row in cells_of_options() for path in re.findall(r"`([^`]+)`", row[0])):
        home, _, name = path.partition(".")
        if home in ("adapter", "resources", "inputs"):
            found = {
                "adapter": blocks,
                "resources": set(Resources.model_fields),
                "inputs": {role for stage in STAGES.values() for role in stage.inputs},
            }[home]
        else:
            found = set(STAGES[home].params.model_fields)
        if name not in found:
            unknown.append(path)
    assert unknown == []


@pytest.mark.slow
def test_options_of_trl_are_called_as_trl_calls_them() -> None:
    """In a process of its own: what TRL loads takes seconds, and changes the process."""
    elsewhere = {"model", "train_dataset", "eval_dataset", "ref_model", "peft_config", "reward_funcs", "PeftModel"}
    named = {name for row in cells_of_options() for name in re.findall(r"`(\w+)`", row[3])}
    code = (
        "import dataclasses, trl; configs = [getattr(trl, f'{name}Config') for name in ('SFT', 'DPO', 'KTO', 'Reward', "
        "'GRPO', 'RLOO')]; from trl.experimental.online_dpo import OnlineDPOConfig; configs.append(OnlineDPOConfig); "
        "from trl.experimental.async_grpo import AsyncGRPOConfig; configs.append(AsyncGRPOConfig); "
        "print(*{field.name for each in configs for field in dataclasses.fields(each)})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert named - elsewhere - {"merge_and_unload"} - set(process.stdout.split()) == set()
