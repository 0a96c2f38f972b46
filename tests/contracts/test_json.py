"""What is written as JSON holds nothing that only Python reads."""

from __future__ import annotations

import ast

from pipeline.settings.strict import CHECKOUT

TEXTS = {
    "pipeline/running/reasons.py",  # values in a sentence
    "pipeline/store/locks.py",  # filled up to a length
    "stages/lib/training/layouts.py",  # values in a sentence
    "stages/lib/sources/json_reader.py",  # a size
    "stages/lib/sources/layouts.py",  # a trial of the encoding
    "stages/lib/sources/tool_turns.py",  # what a message says
    "stages/lib/on_policy/samples.py",  # what a column says
    "stages/lib/text/chat_filters.py",  # what a template writes
    "stages/lib/text/chat_probe.py",  # to a process of its own
    "launch/probe.py",  # to a process of its own
}
"""Files that make JSON for something else than a file of ours."""


def test_json_is_written_without_nan() -> None:
    """`json_text` of pipeline/store/numbers.py does so with a sentence for what is not finite."""
    offenders = []
    for package in ("pipeline", "stages", "launch", "trackers"):
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            name = path.relative_to(CHECKOUT).as_posix()
            calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            writers = [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]
            strict = [call for call in writers if any(ast.unparse(each) == "allow_nan=False" for each in call.keywords)]
            if len(strict) < len(writers) and name not in TEXTS:
                offenders.append(name)
    assert offenders == []
