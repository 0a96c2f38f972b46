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
import traceback
import types
from collections.abc import Callable, Mapping
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


class Written(io.BytesIO):
    """What a program has printed; it may close its output, as `exit()` does."""

    def close(self) -> None:
        pass


def tested(code: str, test: str) -> dict[str, Any]:
    """Whether the test raises nothing after the code; an `AssertionError` says that it is not passed."""
    names: dict[str, Any] = {"__name__": "completion"}
    exec(compile(code, NAME, "exec", dont_inherit=True), names)
    try:
        exec(compile(test, "test", "exec", dont_inherit=True), names)
    except AssertionError:
        return {"passed": False}
    return {"passed": True}


def printed_by(code: str, given: str) -> dict[str, Any]:
    """What the code prints as a program of its own that reads `given`."""
    kept = sys.stdin, sys.stdout
    written = Written()
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(written, encoding="utf-8", errors="replace", write_through=True)
    try:
        exec(compile(code, NAME, "exec", dont_inherit=True), {"__name__": "__main__"})
    except SystemExit:
        pass
    finally:
        sys.stdin, sys.stdout = kept
    return {"output": written.getvalue().decode("utf-8", errors="replace")[: LONGEST_OUTPUT + 1]}


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
