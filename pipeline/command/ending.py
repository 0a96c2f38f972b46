"""How a command ends that cannot go on: a sentence for each mistake, and nothing written once more where writing failed."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pipeline.errors import EXIT_USER_ERROR
from pipeline.figures import printable


def refuse(problems: list[str]) -> NoReturn:
    """Says what is wrong, and ends the process."""
    for problem in problems:
        print(f"error: {printable(problem, sys.stderr)}", file=sys.stderr)
    if len(problems) > 1:
        print(f"{len(problems)} problems; nothing was run.", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def drop_output() -> None:
    """Has the interpreter's last flush succeed, whose failure would be printed otherwise."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
