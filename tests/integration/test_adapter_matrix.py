"""Which method of an adapter was tried in which stage, and how: `stages/ADAPTERS.md` shows what the tests of adapters run.

    python -m tests.integration.test_adapter_matrix

writes the page. It is put together from the tables that those tests go through, so that it claims nothing that none of them runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.settings.strict import CHECKOUT, validate
from stages import STAGES
from tests.distributed.test_adapter_training import ADAPTERS, KILLED, RUNS
from tests.distributed.test_adapter_training import CASES as SPREAD
from tests.integration.test_adapters import MATRIX, PARAMS
from tests.integration.test_on_policy_adapters import CASES as ON_POLICY
from tests.invariants.test_on_policy_invariance import PARAMS as SPREAD_ON_POLICY
from tests.unit.test_on_policy_params import PARAMS as ON_POLICY_PARAMS

pytestmark = pytest.mark.slow

PAGE = CHECKOUT / "stages" / "ADAPTERS.md"
FIXED = ("sft", "pretrain", "dpo", "kto", "reward", "distill", "classify", "extract", "answer")
SAMPLING = ("ppo", "grpo", "rloo", "reinforce_plus_plus", "online_dpo")
VARIANTS = ("use_dora", "quantize_base", "target_parameters", "only_new", "projection")
"""Params that make another method of one."""
HEAD = """\
# Adapters

Written by `python -m tests.integration.test_adapter_matrix` from the tables that the tests go through, and held by a test. What each
method is, stands in [README.md](README.md#adapters).

## Methods in stages

`yes`: a test trains it there; its loss falls, frozen weights stay as they were bit for bit, and what is published, read by peft where
peft has the method, is the model that was trained (`test_adapters.py`, `test_on_policy_adapters.py`, `test_on_policy_invariance.py`). `no`: the recipe is refused,
with a sentence. `-`: it is taken, by the code that the others of its row and column run; no test trains just that.

"""
SECOND = """
## Killed, and spread

In `sft`. `killed`: by SIGKILL in its fifth step, and started again: the same files, byte for byte. `two processes`, `ZeRO-2`, `ZeRO-3`:
losses and weights of one process within 1e-5, no saved tensor empty; `no`: refused (`test_adapter_training.py`). What the code
does alike for all methods is spread for some of them, and for all under ZeRO-3, where weights are split.

"""


def called(block: Mapping[str, Any]) -> str:
    """The method of a block, with what makes another one of it."""
    named = [f"{name}: {block[name]}".replace("True", "true") for name in VARIANTS if name in block]
    named = ["target_parameters" if each.startswith("target_parameters") else each for each in named]
    if block.get("init") == "pissa":
        named.append("init: pissa")
    return ", ".join([f"`{block['method']}`", *(f"`{each}`" for each in named)])


def blocks() -> dict[str, Mapping[str, Any]]:
    """Method -> the plainest block of it, of every method that some test trains."""
    every = [*ADAPTERS.values(), *(block for _, _, block in MATRIX), *(case.adapter for case in ON_POLICY.values())]
    return {called(block): block for block in sorted(every, key=len, reverse=True)}


def is_refused(stage: str, block: Mapping[str, Any]) -> bool:
    """Whether a recipe with the block is no recipe."""
    params = ON_POLICY_PARAMS if stage in SAMPLING else PARAMS[stage]
    kept = {name: value for name, value in block.items() if name != "publish"}
    return bool(validate(STAGES[stage].params, {**params, "adapter": kept}, "params")[1])


def table(columns: tuple[str, ...], rows: Mapping[str, list[str]]) -> str:
    lines = [("method", *columns), ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """What the tests of adapters run, as two tables."""
    known = blocks()
    tried = {(stage, called(block)) for stage, _, block in MATRIX}
    tried |= {(case.stage, called(case.adapter)) for case in ON_POLICY.values()}
    tried |= {("sft", called(block)) for block in ADAPTERS.values()}
    tried |= {
        (name.partition("_")[0], called(each["adapter"]))
        for name, each in SPREAD_ON_POLICY.items()
        if "adapter" in each
    }

    def cell(stage: str, name: str) -> str:
        return "yes" if (stage, name) in tried else "no" if is_refused(stage, known[name]) else "-"

    in_stages = {name: [cell(stage, name) for stage in (*FIXED, *SAMPLING)] for name in sorted(known)}
    killed = {called(ADAPTERS[name]) for name, _ in KILLED}
    spread = {(called(ADAPTERS[name]), run) for name, run in SPREAD}
    split = {called(ADAPTERS[name]) for name, run in SPREAD if run in RUNS}
    how = {
        name: [
            "yes" if name in killed else "-",
            *("yes" if (name, run) in spread else "no" if run == "zero3" else "-" for run in ("two", "zero2", "zero3")),
        ]
        for name in sorted(known)
        if name in split
    }
    stages = tuple(f"`{stage}`" for stage in (*FIXED, *SAMPLING))
    return HEAD + table(stages, in_stages) + SECOND + table(("killed", "two processes", "ZeRO-2", "ZeRO-3"), how)


def test_the_page_says_what_the_tests_run() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
