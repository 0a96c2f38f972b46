"""Chats whose answers are JSON: the name and the parameters of a function, read from how it is called."""

from __future__ import annotations

import json
from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import Module

MOST_PARAMETERS = 6
ASKED = "Extract name and parameters as JSON from `{}`."


def extraction_rows(module: Module) -> Iterator[Row]:
    """Chat rows: one per function that is called and takes no more than so many parameters."""
    for function in module.functions:
        if function.is_property or len(function.parameters) > MOST_PARAMETERS:
            continue
        found = {"name": function.name, "parameters": [each.name for each in function.parameters]}
        yield {
            "id": f"{function.name}#json",
            "messages": [
                {"role": "user", "content": ASKED.format(function.call)},
                {"role": "assistant", "content": json.dumps(found, ensure_ascii=False, allow_nan=False)},
            ],
        }
