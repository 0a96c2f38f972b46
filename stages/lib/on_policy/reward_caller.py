"""Runs what others wrote, in a process of its own: `python reward_caller.py REQUEST_FILE FD`. See `processes/contained.py`.

A user's function for each completion: the request holds `source` and `path` of a Python file, the `function` in it, and
`calls`, the arguments of each; `warm_up` is a function that is called before, or null; `gives` says what a call gives: number or
text. The first answer says that the function is there, each further one `{"value": 1.0}`, or `{"text": "..."}` or null in it.

A completion's code against tests: the request holds `code`, `tests` (each a Python program, or `{"input": ...}` for what the
code is to read) and `secret`. The first answer says that it begins; then comes one for each test with the secret, which the
code is not told: `{"secret": ..., "passed": true}`, or `{"secret": ..., "output": "what the code printed"}`.

What goes wrong is an answer too: `{"trouble": "raised", "what": "it raised ..."}`.

Only the standard library: it is started for every rollout, or every completion.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import linecache
import os
import random
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAIN = os.getpid()
LONGEST_WHAT = 500
"""Characters of what a message repeats of an error."""
LONGEST_OUTPUT = 1 << 18
"""Characters of what the code prints; more than that is no right output."""
NAME = "completion.py"


def module_of(name: str, path: str, source: str) -> types.ModuleType:
    """The module that a file is. Raises what the file raises."""
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module


def own_words() -> types.ModuleType:
    """reward_values.py, which lies beside this file, without the package that it belongs to."""
    spec = importlib.util.spec_from_file_location("reward_values", Path(__file__).with_name("reward_values.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed_generators() -> None:
    """Gives each call the same random numbers, so that a value does not depend on the calls before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
        numpy.random.seed(0)


def answer_of(values: types.ModuleType, compute: Callable[[], Any], gives: str = "number") -> dict[str, Any]:
    """The value, or what went wrong."""
    try:
        value = compute()
        return {"text": values.text_of_value(value)} if gives == "text" else {"value": values.number_of(value)}
    except values.Unscorable as error:
        return {"trouble": f"not_a_{gives}", "what": error.what[:LONGEST_WHAT]}
    except MemoryError as error:
        return {"trouble": "memory", "what": values.raised(error)[:LONGEST_WHAT]}
    except BaseException as error:  # SystemExit as well: it is the function's, and not ours
        return {"trouble": "raised", "what": values.raised(error)[:LONGEST_WHAT]}


def reply(descriptor: int, answer: Mapping[str, Any]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may have been closed, or be something else by now
            stream.flush()
    if os.getpid() != MAIN:
        os._exit(0)  # what ran has forked, and this is the copy
    data = json.dumps(answer, allow_nan=False).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def call_function(request: Mapping[str, Any], descriptor: int) -> None:
    values = own_words()
    found: list[Callable[..., Any]] = []

    def load() -> int:
        module = module_of("reward_file", request["path"], request["source"])
        if request["warm_up"] is not None:
            getattr(module, request["warm_up"])()
        found.append(getattr(module, request["function"]))
        return 0

    reply(descriptor, answer_of(values, load))
    for arguments in request["calls"] if found else ():
        seed_generators()
        reply(descriptor, answer_of(values, functools.partial(found[0], **arguments), request["gives"]))


# Code against tests


@contextlib.contextmanager
def standing_as(name: str) -> Iterator[types.ModuleType]:
    """An empty module that imports, pickle and dataclasses find under its name; afterwards what stood there does again."""
    kept = sys.modules.get(name)
    module = sys.modules[name] = types.ModuleType(name)
    try:
        yield module
    finally:
        vars(module).clear()  # files that it left open are written and closed
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept


def tested(code: str, test: str) -> dict[str, Any]:
    """Whether the test raises nothing after the code; an `AssertionError` says that it is not passed."""
    with standing_as("completion") as module:
        exec(compile(code, NAME, "exec", dont_inherit=True), vars(module))
        try:
            exec(compile(test, "test", "exec", dont_inherit=True), vars(module))
        except AssertionError:
            return {"passed": False}
    return {"passed": True}


def printed_by(code: str, given: str) -> dict[str, Any]:
    """What the code prints as a program of its own that reads `given`, however it reads and writes its descriptors."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as written:
        asked.write(given.encode())
        asked.seek(0)
        with standing_on(asked.fileno(), written.fileno()):
            try:
                with standing_as("__main__") as module:
                    exec(compile(code, NAME, "exec", dont_inherit=True), vars(module))
            except SystemExit:
                pass
        written.seek(0)
        text = written.read(4 * (LONGEST_OUTPUT + 1)).decode("utf-8", errors="replace")
    return {"output": text[: LONGEST_OUTPUT + 1]}


@contextlib.contextmanager
def standing_on(source: int, sink: int) -> Iterator[None]:
    """Within it the descriptors 0 and 1, and what Python reads and prints, are these; afterwards nothing is read or kept."""
    kept = sys.stdin, sys.stdout
    os.dup2(source, 0)
    os.dup2(sink, 1)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    printing = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "replace", write_through=True
    )
    sys.stdout = printing
    try:
        yield
    finally:
        for stream in (sys.stdout, printing):
            with contextlib.suppress(Exception):  # the program may have closed it, or put something else in its place
                stream.flush()
        sys.stdin, sys.stdout = kept
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        if nowhere > 1:
            os.close(nowhere)


def outcome(code: str, test: Any) -> dict[str, Any]:
    """What came of one test."""
    try:
        return tested(code, test) if isinstance(test, str) else printed_by(code, test["input"])
    except MemoryError:
        return {"trouble": "memory", "what": "it raised MemoryError"}
    except BaseException as error:  # SystemExit as well: a program that ends before its tests has not passed them
        last = traceback.format_exception_only(error)[-1].strip()
        return {"trouble": "raised", "what": f"it raised {last[:500]}"}


def run_tests(request: Mapping[str, Any], descriptor: int) -> None:
    secret, code, tests = request["secret"], request["code"], request["tests"]
    reply(descriptor, {"begun": True})
    for test in tests:
        reply(descriptor, {"secret": secret, **outcome(code, test)})


def answer_request(request_file: str, descriptor: int) -> None:
    os.set_inheritable(descriptor, False)
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    os.unlink(request_file)
    run = run_tests if "tests" in request else call_function
    run(request, descriptor)
    os._exit(0)  # without what others left to be done at the end


if __name__ == "__main__":
    answer_request(sys.argv[1], int(sys.argv[2]))
