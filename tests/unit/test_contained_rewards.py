"""Rewards in processes of their own: values, what goes wrong by word and row, and what a recipe is told before it runs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RewardError
from pipeline.processes import descendants
from pipeline.settings.strict import content_of
from pipeline.store.digests import Digests
from stages.lib.on_policy.contained_calls import Means, Scored
from stages.lib.on_policy.contained_rewards import contained_scorers
from stages.lib.on_policy.rewards import check_rows
from stages.lib.on_policy.samples import Completion, Sample
from stages.lib.processes.contained import Listener, ProgramLimits
from tests.unit.running_stages import params_of, problems_of
from tests.unit.test_rewards import Params, read, told

LEAVES = """\
import os, random, sys, time


def reward(prompt, completion, ended, num_tokens, level=0):
    what, _, number = completion.partition(" ")
    if what == "hang":
        time.sleep(1000)
    if what == "fork":
        for _ in range(2):
            if os.fork() == 0:
                os.setsid()
                os.fork()
                time.sleep(1000)
        time.sleep(1000)
    if what == "copy" and os.fork() == 0:
        return 99.0
    if what == "memory":
        return len(bytearray(1 << 33))
    if what == "die":
        os._exit(0)
    if what == "exit":
        sys.exit(1)
    if what == "raise":
        raise KeyError(number)
    if what == "print":
        print('{"value": 7.0}')
        os.system("echo of a shell")
        return 0.5
    if what == "random":
        return random.random()
    return {"nan": float("nan"), "none": None, "two": [1.0, 2.0], "true": True}.get(what, len(completion) + level)
"""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in descendants(os.getpid())}
    yield
    assert [process for process in descendants(os.getpid()) if process.pid not in before] == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(LEAVES)
    return path


def scored(block: dict[str, Any], texts: list[str], **columns: Any) -> list[Scored]:
    """What each completion of one row is worth."""
    (scorer,) = contained_scorers(read(block), Means(at_a_time=2)).values()
    row = {"columns": columns, "id": "q"}
    return scorer.score([Sample(index, "2 + 2", Completion(text, 3, True), row) for index, text in enumerate(texts)])


def values(block: dict[str, Any], texts: list[str], **columns: Any) -> list[float]:
    found = scored(block, texts, **columns)
    assert [each.trouble for each in found] == [None] * len(texts)
    return [each.value for each in found]


# A user's function


@pytest.mark.slow
def test_every_way_to_go_wrong_is_contained_and_counted(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Between them stand sound completions, whose values are their lengths: 2, and with level 3 of the row 5."""
    block = {
        "kind": "file",
        "path": str(file),
        "function": "reward",
        "on_error": -1,
        "max_seconds": 2,
        "max_memory_gib": 0.25,
    }
    ways = ["hang", "fork", "memory", "die", "exit", "raise x", "nan", "none", "two", "true"]
    found = scored(block, ["ab", "copy", "print", *[text for way in ways for text in (way, "ab")]], level=3)
    assert [found[0], *found[4::2]] == [Scored(5.0)] * 11
    assert found[1:3] == [Scored(7.0), Scored(0.5)]
    troubles = dict(zip(ways, found[3::2], strict=True))
    assert {each.value for each in troubles.values()} == {-1.0}
    assert {way: each.trouble and each.trouble.word for way, each in troubles.items()} == {
        "hang": "timeout", "fork": "timeout", "memory": "memory", "die": "died", "exit": "raised", "raise x": "raised",
        "nan": "not_a_number", "none": "not_a_number", "two": "not_a_number", "true": "not_a_number",
    }  # fmt: skip
    said = {way: each.trouble.what for way, each in troubles.items() if each.trouble}
    assert said["hang"] == "it took more than 2 s"
    line = LEAVES.splitlines().index("        raise KeyError(number)") + 1
    assert said["raise x"] == f"it raised KeyError: 'x' (rewards.py, line {line})"
    assert said["exit"].startswith("it raised SystemExit: 1 (rewards.py, line ")
    assert said["nan"] == "it gave nan"
    assert said["two"] == "it gave 2 values (list) instead of one number"
    out, err = capfd.readouterr()
    assert out == ""
    printed = '{"value": 7.0}\nof a shell\n'
    assert err == f"rewards.file printed {len(printed)} bytes:\n{printed}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "what"), [("hang", "it took more than 1 s"), ("nan", "it gave nan"), ("die", "code 0")]
)
def test_without_on_error_the_first_failure_ends_the_step_and_names_the_row(file: Path, text: str, what: str) -> None:
    block = {"kind": "file", "path": str(file), "function": "reward", "max_seconds": 1}
    with pytest.raises(RewardError) as caught:
        scored(block, ["ab", text, "hang"])
    message = str(caught.value)
    assert message.startswith("rewards.file: row 2 (id 'q'): it") and what in message
    assert message.endswith("Correct the function, or write `on_error`: what such a completion gets.")


def test_a_value_does_not_depend_on_the_calls_before_it(file: Path) -> None:
    """The generator of `random` begins anew with each call, and each batch is a process of its own."""
    block = {"kind": "file", "path": str(file), "function": "reward"}
    first, second, third = values(block, ["random", "ab", "random"])
    assert second == 2.0
    assert first == third == values(block, ["random"])[0]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import no_such_module\ndef reward(completion): return 1", "it raised ModuleNotFoundError: No module named 'no_such_module' (rewards.py, line 1)"),
        ("import os\nos._exit(4)\ndef reward(completion): return 1", "its process ended with code 4"),
        ("while True: pass\ndef reward(completion): return 1", "it took more than 2 s"),
        ("def reward(completion): return 1\ndel reward", "it raised AttributeError"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_run_is_found_before_the_training(source: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(source)
    rewards = read({"kind": "file", "path": str(path), "function": "reward", "max_load_seconds": 2, "on_error": 0})
    with pytest.raises(RewardError) as caught:
        check_rows(rewards, [(0, "prompt", {})])
    assert f"rewards.file: {path} cannot be run: {what}" in str(caught.value)


def test_a_file_is_read_once(file: Path) -> None:
    """What is edited while the step runs counts for the next one, whose id is another."""
    rewards = read({"kind": "file", "path": str(file), "function": "reward"})
    file.write_text("def reward(completion): return 100")
    (scorer,) = contained_scorers(rewards, Means()).values()
    assert [each.value for each in scorer.score([Sample(0, "p", Completion("abc", 1, True), {})])] == [3.0]


def test_the_files_content_is_its_identity(tmp_path: Path) -> None:
    blocks = []
    for name, source in (("a.py", LEAVES), ("b.py", LEAVES), ("c.py", LEAVES + "\n")):
        path = tmp_path / name
        path.write_text(source)
        blocks.append(read({"kind": "file", "path": str(path), "function": "reward"})[0])
    identities = [content_of(block, Digests(tmp_path / "digests").of) for block in blocks]
    assert identities[0] == identities[1] != identities[2]
    assert str(tmp_path) not in str(identities)


SIGNATURES = """\
def all(completion, **columns): return len(columns)
def one(level, *, completion): return level
def optional(completion, other=4): return other
def whole(columns, prompt, ended, num_tokens): return columns["level"] + len(prompt) + ended + num_tokens
async def waits(completion): return 1
def by_place(completion, /): return 1
class Reward: pass
"""


@pytest.mark.parametrize(
    ("function", "expected"),
    [("all", 2.0), ("one", 3.0), ("optional", 4.0), ("whole", 3.0 + len("2 + 2") + 1 + 3)],
)
def test_a_function_is_given_what_it_asks_for(function: str, expected: float, tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(SIGNATURES)
    assert values({"kind": "file", "path": str(path), "function": function}, ["x"], level=3, name="b") == [expected]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("optinal", "has no `def optinal` at its top level (Did you mean 'optional'?)"),
        ("Reward", "has no `def Reward` at its top level ("),
        ("waits", "function: waits is an `async def`: write a `def` that waits itself"),
        ("by_place", "function: by_place takes completion by position only: remove the `/`"),
    ],
)
def test_a_function_that_cannot_be_called_is_told_by_plan(function: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(SIGNATURES)
    assert what in told({"kind": "file", "path": str(path), "function": function})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"def reward(:\n", "rewards.py, line 1: "),
        (b"\xff\xfe", "is no UTF-8 text: byte 0"),
        (b"a\0b", "rewards.py: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_is_no_python_is_told_by_plan(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_bytes(content)
    block = {"kind": "file", "path": "rewards.py", "function": "reward"}
    assert what in problems_of(Params, {"rewards": [block]}, tmp_path)
    assert "no such file" in problems_of(Params, {"rewards": [{**block, "path": "other.py"}]}, tmp_path)


def test_columns_that_a_function_asks_for_are_found_missing_before_the_training(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(SIGNATURES)
    rewards = read({"kind": "file", "path": str(path), "function": "one"})
    rows = [{"columns": {"level": 1}}, {"columns": {"a": 1, "b": 2}}, {}]
    with pytest.raises(RewardError) as caught:
        check_rows(rewards, [(index, "prompt", row) for index, row in enumerate(rows)])
    assert str(caught.value) == (
        "rewards.file: cannot score 2 of 3 rows: row 2: one asks for 'level', and the row has a, b. Name it in `carry` of the"
        " source of the rows, or ask for prompt, completion, ended, num_tokens, columns."
    )
    with pytest.raises(RewardError, match="the column 'ended' has the name of something else that one may ask for"):
        check_rows(rewards, [(0, "prompt", {"columns": {"level": 1, "ended": True}})])


# Mathematical answers


@pytest.mark.slow
def test_math_answers() -> None:
    """By mathematics: halves are halves however they are written; a power that no computer can write out takes too long."""
    block = {"kind": "math_verify", "column": "answer", "max_seconds": 5}
    texts = ["so it is 0.5", "\\boxed{\\frac{1}{2}}", "$x = \\frac12$", "2/4", "2", "no idea", "", "5/10 apples"]
    assert values(block, texts, answer="1/2") == [1, 1, 1, 1, 0, 0, 0, 1]
    assert values(block, ["#### 72", "72.0", "$72", "7 2"], answer="12 * 6 = 72\n#### 72") == [1, 1, 1, 0]
    latex = {**block, "column_is": "latex"}
    assert values(latex, ["$x^2 + 2x + 1$", "$(x + 1)^2$", "$x^2$"], answer="(1+x)^2") == [1, 1, 0]
    endless, sound = scored(block, ["$9^{9^{9^{9}}}$", "0.5"], answer="1/2")
    assert (endless.value, endless.trouble and endless.trouble.word, sound) == (0.0, "timeout", Scored(1.0))


@pytest.mark.slow
def test_columns_without_an_answer_are_found_before_the_training() -> None:
    rows = [{"columns": {"answer": text}} for text in ("3", "none", "10\\pi", "$10\\pi$")]
    with pytest.raises(RewardError) as caught:
        check_rows(read({"kind": "math_verify", "column": "answer"}), [(i, "p", row) for i, row in enumerate(rows)])
    assert "cannot score 2 of 4 rows: row 3: the column 'answer' holds LaTeX that nothing marks: '10\\\\pi'" in str(
        caught.value
    )
    with pytest.raises(RewardError, match="row 2: math-verify finds no answer in the column 'answer': 'none'"):
        check_rows(read({"kind": "math_verify", "column": "answer"}), [(i, "p", row) for i, row in enumerate(rows[:2])])


# JSON


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": "^(a+)+$"}, "age": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}


@pytest.mark.slow
def test_json_schema() -> None:
    block = {"kind": "json_schema", "json_schema": SCHEMA, "max_seconds": 2}
    right = ['{"name": "aa"}', ' {"age": 3, "name": "a"}\n', '{"age": 3.0, "name": "a"}']
    wrong = [
        '{"name": "b"}',
        '{"age": 3}',
        '{"name": "a"} !',
        "{'name': 'a'}",
        '{"name": "a", "age": NaN}',
        "[" * 90_000,
        "",
    ]
    assert values(block, [*right, *wrong]) == [1.0] * 3 + [0.0] * 7
    backtracking, sound = scored(block, [json.dumps({"name": "a" * 50 + "b"}), right[0]])
    assert (backtracking.value, backtracking.trouble and backtracking.trouble.word, sound) == (
        0.0,
        "timeout",
        Scored(1.0),
    )
    fenced = {"kind": "json_schema", "column": "form", "extract": "(?s)```json\n(.*?)```"}
    texts = ["```json\n3\n``` or ```json\n4\n```", '```json\n"a"\n```', "3"]
    assert values(fenced, texts, form='{"type": "integer"}') == [1, 0, 0]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "give json_schema, or the column that holds it: one of the two"),
        ({"json_schema": {}, "column": "a"}, "one of the two"),
        (
            {"json_schema": {"type": "strin"}},
            "json_schema: $.type: 'strin' is not valid under any of the given schemas",
        ),
        ({"json_schema": {"$ref": "https://example.org/a"}}, "leads out of the schema, and nothing is fetched"),
    ],
)
def test_a_schema_that_is_none_is_told_by_plan(fields: dict[str, Any], what: str) -> None:
    assert what in told({"kind": "json_schema", **fields})


def test_a_column_that_holds_no_schema_is_found_before_the_training() -> None:
    rewards = read({"kind": "json_schema", "column": "form"})
    for text, what in (("{", "it is no JSON"), ("3", "a JSON schema is an object"), ('{"type": 3}', r"\$.type")):
        with pytest.raises(RewardError, match=f"row 1: the column 'form' holds no JSON schema: {what}"):
            check_rows(rewards, [(0, "p", {"columns": {"form": text}})])


# Code


@pytest.mark.slow
def test_code_against_tests() -> None:
    """Three tests, of which each way to write `add` passes as many as it says; with all or nothing only the first counts."""
    tests = json.dumps(["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(-1, 1) == 0"])
    ways: dict[str, tuple[float, str | None]] = {
        "def add(a, b): return a + b": (1, None),
        "print('x' * 10 ** 6)\ndef add(a, b): return a + b": (1, None),
        "def add(a, b): return 3": (1 / 3, None),
        "def add(a, b): return abs(a) + b": (2 / 3, None),
        "def add(a, b): return {1: 3, 2: 4}[a]": (2 / 3, "raised"),
        "def add(:": (0, "raised"),
        "import sys; sys.exit(0)": (0, "raised"),
        "import os; os._exit(0)": (0, "died"),
        "import os, sys; [os.write(int(sys.argv[2]), b'{\"passed\": true}\\n') for _ in range(3)]": (0, "died"),
        "import time\ndef add(a, b): return a + b if a != 2 else time.sleep(99)": (1 / 3, "timeout"),
        "x = bytearray(1 << 40)": (0, "memory"),
        "import os\nfor _ in range(2):\n if os.fork() == 0: os.setsid(); os.fork()\nwhile True: pass": (0, "timeout"),
    }
    block = {"kind": "code_tests", "column": "tests", "max_seconds": 3, "max_memory_gib": 0.5}
    found = scored({**block, "partial_credit": True}, list(ways), tests=tests)
    assert [(each.value, each.trouble and each.trouble.word) for each in found] == list(ways.values())
    fenced = {**block, "extract": "(?s)```python\n(.*?)```"}
    texts = [
        "So:\n```python\ndef add(a, b): return a + b\n```",
        "def add(a, b): return a + b",
        "```python\ndef add(a, b): 3\n```",
    ]
    assert values(fenced, texts, tests="assert add(1, 1) == 2") == [1, 0, 0]


@pytest.mark.slow
def test_code_that_reads_and_prints() -> None:
    tests = json.dumps([{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10"}])
    texts = [
        "print(int(input()) * 2)",
        "import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(b'%d  \\n\\n' % (2 * int(line)))\nexit()",
        "print(4)",
        "if __name__ == '__main__': print(2 * int(input()), end='')",
    ]
    block = {"kind": "code_tests", "column": "tests", "partial_credit": True}
    assert values(block, texts, tests=tests) == [1, 1, 0.5, 1]


def test_code_stands_where_a_program_stands() -> None:
    """Programs that print twice what they read, by descriptors, pickles, children and streams of their own; and a module."""
    twice = "print(2 * int(input()))"
    texts = [
        "print(2 * int(open(0).read()))",
        "import os\nos.write(1, b'%d' % (2 * int(os.read(0, 9))))",
        f"import os, sys\nos.system(sys.executable + ' -c \"{twice}\"')",
        "import pickle\nclass A:\n n = 2\nprint(pickle.loads(pickle.dumps(A)).n * int(input()))",
        "from __main__ import __name__ as name\nimport io, sys\nout = open(1, 'w')\nout.write(str(2 * int(input())) * (name == '__main__'))",
        "import sys\nsys.stdout = open(1, 'w', closefd=False)\nprint(2 * int(input()))\nsys.exit()",
    ]
    tests = json.dumps([{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10"}])
    assert values({"kind": "code_tests", "column": "tests"}, texts, tests=tests) == [1.0] * len(texts)
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: ClassVar[int] = 1"
    test = "import pickle\nassert pickle.loads(pickle.dumps(A())) == A()"
    assert values({"kind": "code_tests", "column": "tests"}, [code], tests=test) == [1.0]


def test_code_sees_none_of_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "1")
    code = "import os\nnames = {*os.environ} - {'LC_CTYPE'}"
    test = "assert names <= {'PATH', 'LANG', 'SLIPWAY_RUN', 'PYTHONHASHSEED', 'PYTHONUNBUFFERED'}, names"
    assert values({"kind": "code_tests", "column": "tests"}, [code], tests=test) == [1.0]


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("assert add(1, 2 == 3", "test 1 of the column 'tests' cannot be run: "),
        ('["assert True", 3]', "test 2 of the column 'tests' cannot be run: it is no program"),
        ('[{"input": "3"}]', "test 1 of the column 'tests' cannot be run: it is no program"),
        ("[]", "the column 'tests' holds no test"),
        (" ", "it is no program"),
        ('{"input": "3", "output": "4"}', 'holds JSON that is no tests: \'{"input": "3", "output": "4"}\'. It holds'),
        ('"assert add(1, 2) == 3"', "holds JSON that is no tests"),
        ("3", "holds JSON that is no tests"),
        ('{"inputs": ["3"], "outputs": []}', "the column 'tests' holds 1 inputs and 0 outputs"),
        ('{"inputs": [["3"]], "outputs": ["4"]}', "test 1 of the column 'tests' cannot be run: it is no program"),
        (
            '{"fn_name": "f", "inputs": [[3]], "outputs": [4]}',
            "holds calls of a function (fn_name), which are not read",
        ),
    ],
)
def test_tests_that_are_none_are_found_before_the_training(column: str, what: str) -> None:
    rewards = read({"kind": "code_tests", "column": "tests"})
    with pytest.raises(RewardError) as caught:
        check_rows(rewards, [(0, "p", {"columns": {"tests": column}})])
    assert what in str(caught.value)


def test_inputs_and_outputs_of_apps_are_tests() -> None:
    """Twice the number, for 2 and for 5: as text, and as the object that a row carries."""
    found = {"inputs": ["2\n", "5"], "outputs": ["4\n", "10"]}
    texts = ["print(int(input()) * 2)", "print(4)", ""]
    block = {"kind": "code_tests", "column": "tests", "partial_credit": True}
    assert values(block, texts, tests=json.dumps(found)) == [1, 0.5, 0] == values(block, texts, tests=found)


def test_tests_that_an_empty_program_passes_are_found_before_the_training() -> None:
    """Three rows are sound: a test that hangs without code, one that ends its process, and two of which the first alone says nothing."""
    sound = [
        "while 'add' not in globals(): pass",
        "import os\nif 'add' not in globals(): os._exit(0)",
        '["import math", "add"]',
    ]
    empty = [
        "def check(candidate):\n    assert candidate(1, 2) == 3",
        "if __name__ == '__main__':\n    assert add(1, 2) == 3",
        '["import math", "x = 1"]',
        '[{"input": "3", "output": " \\n"}]',
    ]
    rows = [{"columns": {"tests": each}} for each in (*sound, *empty, "assert add(1, 2) == 3")]
    rewards = read({"kind": "code_tests", "column": "tests", "max_seconds": 3})
    with pytest.raises(RewardError) as caught:
        check_rows(rewards, [(index, "p", row) for index, row in enumerate(rows)])
    assert str(caught.value).startswith(
        "rewards.code_tests: cannot score 4 of 8 rows: row 4: an empty program passes the tests of the column 'tests'"
    )


@pytest.mark.parametrize("partial_credit", [False, True])
def test_a_test_that_an_empty_program_passes_earns_no_part(partial_credit: bool) -> None:
    """Where all must pass it does no harm; where parts are paid for, it would pay for nothing."""
    row = {"columns": {"tests": '["import math", "assert add(1, 2) == 3"]'}}
    rewards = read({"kind": "code_tests", "column": "tests", "partial_credit": partial_credit})
    if not partial_credit:
        check_rows(rewards, [(0, "p", row)])
        return
    with pytest.raises(RewardError, match=r"an empty program passes test 1 of the column 'tests', and partial_credit"):
        check_rows(rewards, [(0, "p", row)])


def test_many_open_files_are_no_hindrance() -> None:
    """What a process answered just before its end is read from a descriptor above 1,024, which `select` cannot look at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    opened = [*os.pipe(), *os.pipe()]
    try:
        while opened[-1] <= 1024:
            opened.append(os.dup(opened[0]))
        os.write(opened[1], b'{"value": 1.0}\n')
        with subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
            keeper.wait()
            listener = Listener(keeper, opened[-1], opened[2], 2, ProgramLimits(9, 9, 1 << 30), lambda: False)
            listener.listen()
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (listener.answers, listener.is_late) == ([{"value": 1.0}], False)


def test_limits_are_bounded() -> None:
    assert "max_seconds" in told({"kind": "code_tests", "column": "a", "max_seconds": 0})
    assert "max_memory_gib" in told({"kind": "code_tests", "column": "a", "max_memory_gib": 0.01})
    params_of(Params, {"rewards": [{"kind": "code_tests", "column": "a", "max_seconds": 0.5}]}, Path())
