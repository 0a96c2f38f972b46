"""Whether a chat template ends: its first rendering, in a process of its own that the kernel stops."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.settings.strict import CHECKOUT
from stages.lib.text.chat_budget import OverLimit
from stages.lib.text.chat_sandbox import render_template

MAX_SECONDS = 20
"""Processor time of the process, which takes less than one where nothing is odd."""

MAX_BYTES = 2 << 30
"""Its memory."""

ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals of a launcher that ends all below it. They say nothing of a template: whoever asked stops its rank as well."""

TRIALS = 3
"""How often a process that was asked to end is started."""

VERDICTS: dict[str, str] = {}
"""Template -> what its first rendering ran into; "" if nothing."""


def require_bounded(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> None:
    """Raises `OverLimit` if the template's first rendering takes more time or memory than any should."""
    if template not in VERDICTS:
        VERDICTS[template] = probe(template, messages, variables)
    if verdict := VERDICTS[template]:
        raise OverLimit(verdict)


def probe(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    max_seconds: int = MAX_SECONDS,
) -> str:
    """What stood in the way of rendering the chat, in words that follow upon the template's name; "" if nothing did."""
    chat = {"template": template, "messages": list(messages), "variables": dict(variables)}
    command = [sys.executable, "-m", __name__, str(max_seconds)]
    for _ in range(TRIALS):
        ended = subprocess.run(
            command, cwd=CHECKOUT, input=json.dumps(chat), capture_output=True, text=True, check=False
        )
        if -ended.returncode not in ASKED_TO_END:
            break
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it takes more than {max_seconds} s of processor time"
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-1:] or [f"code {ended.returncode}"]
        return f"a process that renders it does not end well: {said[0]:.200}"
    return ended.stdout.strip()


def main(max_seconds: int) -> None:
    """Renders what stdin says in bounds that the kernel holds, and prints what stood in the way ("" for nothing)."""
    resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        render_template(**json.load(sys.stdin))
    except MemoryError:
        print("it needs too much memory")
    except OverLimit as error:
        print(error.message)
    except Exception:  # whatever else it is: it shows again where the chat is rendered, and is told there
        print()


if __name__ == "__main__":
    main(int(sys.argv[1]))
