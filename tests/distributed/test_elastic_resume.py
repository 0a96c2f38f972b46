"""A training goes on in other processes and in another memory layout as it would have in its own, within rounding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.resources import LAYOUTS
from tests.distributed.test_on_policy_resume import PARAMS as ON_POLICY
from tests.distributed.test_on_policy_resume import RESOURCES as ON_POLICY_RESOURCES
from tests.distributed.test_training_resume import PARAMS, RESOURCES
from tests.distributed.training_world import (
    Job,
    make_tokenizer,
    run_forked,
    write_chats,
    write_model,
    write_tokens,
)
from tests.integration.on_policy_world import write_policy

pytestmark = pytest.mark.slow

Spread = tuple[int, str | None]
"""How many processes, and which memory layout."""


@dataclass(frozen=True)
class Chain:
    """A job that is stopped twice, and goes on elsewhere each time."""

    kind: str
    spreads: tuple[Spread, Spread, Spread]
    params: str = ""
    stops: tuple[int, int] = (3, 6)

    @property
    def name(self) -> str:
        return "-".join([self.kind, self.params, *(f"{layout}x{count}" for count, layout in self.spreads)])

    def jobs(self, folder: Path, inputs: dict[str, dict[str, Path]]) -> list[Job]:
        """The three runs of the job, and the same job left alone where it began."""
        parts = [self.job(folder / self.name, inputs, spread) for spread in self.spreads]
        stops = [{"step": step} for step in self.stops]
        stopped = [replace(job, stop=stop) for job, stop in zip(parts, stops, strict=False)]
        return [*stopped, parts[2], self.whole(folder, inputs)]

    def whole(self, folder: Path, inputs: dict[str, dict[str, Path]]) -> Job:
        return self.job(folder / f"{self.name}-whole", inputs, self.spreads[0])

    def job(self, work: Path, inputs: dict[str, dict[str, Path]], spread: Spread) -> Job:
        processes, layout = spread
        if self.kind in ("ppo", "grpo"):
            module, params, resources = f"stages.alignment.{self.kind}", ON_POLICY[self.params], ON_POLICY_RESOURCES
        else:
            module, params, resources = f"stages.language_model.{self.kind}", PARAMS[self.kind], RESOURCES
            params = {**params, **OTHERS.get(self.params, {})}
        if layout in OWN:
            layout = str(work.parent / f"{layout}.json")
        return Job(work, module, params, inputs[self.kind], {**resources, "deepspeed": layout}, processes=processes)


OWN = {
    "offload": ("zero2", {"offload_optimizer": {"device": "cpu"}}),
    "small_groups": ("zero3", {"sub_group_size": 1000}),
}
"""Memory layouts of one's own: with the optimizer's state in the host's memory, with several flat tensors in a group."""
OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 4}},
    "bf16": {"precision": "bf16"},
    # So steep that the second of all measurements is the best, of a checkpoint in another layout than the end's.
    "best": {"learning_rate": 3.0, "evaluate_every_steps": 2, "publish_best": {"metric": "heldout_loss"}},
}
CHAINS = [
    Chain("pretrain", ((2, "zero2"), (1, None), (2, "zero3"))),
    Chain("pretrain", ((2, "small_groups"), (1, "zero3_offload"), (2, "zero1"))),
    Chain("pretrain", ((1, "zero2"), (1, None), (1, "zero3")), "best"),
    Chain("sft", ((1, None), (2, "zero1"), (1, "zero2"))),
    Chain("sft", ((2, "zero3"), (2, "offload"), (1, None)), "lora"),
    Chain("sft", ((2, "zero1"), (1, "small_groups"), (2, "offload")), "bf16"),
    Chain("ppo", ((2, "zero2"), (1, "zero3"), (2, "zero3")), "ppo", (4, 9)),
    Chain("grpo", ((1, None), (2, "zero2"), (1, None)), "grpo", (4, 9)),
]
ROUNDING = {"bf16": 2e-2, "best": 2e-2}
"""By how much losses may differ, relative to them; elsewhere 1e-5. Steep steps carry rounding far."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Path]]]:
    folder = tmp_path_factory.mktemp("elastic")
    tokenizer = make_tokenizer()
    chats = write_chats(folder / "chats")
    model = write_model(folder / "model", tokenizer, attention_dropout=0.2)
    aligned = {"model": write_policy(folder / "policy", tokenizer), "prompts": chats}
    inputs = {
        "pretrain": {"tokens": write_tokens(folder / "tokens", tokenizer)},
        "sft": {"model": model, "chats": chats},
        "ppo": aligned,
        "grpo": aligned,
    }
    for name, (packaged, changes) in OWN.items():
        layout = json.loads((LAYOUTS / f"{packaged}.json").read_text())
        layout["zero_optimization"] |= changes
        (folder / f"{name}.json").write_text(json.dumps(layout))
    run_forked(folder, [job for chain in CHAINS for job in chain.jobs(folder, inputs)])
    run_forked(folder, [longer(folder, inputs, spread) for spread in EXTENDED])
    return folder, inputs


EXTENDED: list[Spread] = [(2, "zero2"), (1, "zero3")]


def longer(folder: Path, inputs: dict[str, dict[str, Path]], spread: Spread) -> Job:
    """The first chain's training, which ended under ZeRO-2 in two processes, made longer."""
    extended, work = CHAINS[0].whole(folder, inputs), folder / f"longer-{spread[1]}"
    job = CHAINS[0].job(work, inputs, spread)
    params = {**job.params, "max_steps": 12, "stretch_schedule": True}
    return replace(job, params=params, extends=str(extended.work / "checkpoints" / "checkpoint-9"))


def test_a_finished_training_is_made_longer_elsewhere(world: tuple[Path, dict[str, dict[str, Path]]]) -> None:
    job, same = (longer(*world, spread) for spread in reversed(EXTENDED))
    assert [line["step"] for line in job.events("step")] == [10, 12]
    assert close(job.losses(), same.losses(), CHAINS[0])


def close(found: Sequence[float], expected: Sequence[float], chain: Chain) -> bool:
    rounding = ROUNDING.get(chain.params, 1e-5)
    return list(found) == pytest.approx(list(expected), rel=rounding, abs=1e-6)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_losses_go_on_as_they_would_have(world: tuple[Path, dict[str, dict[str, Path]]], chain: Chain) -> None:
    """Other rows, moments of others or a wrong count of steps would show in the loss after the next step."""
    folder, inputs = world
    *_, job, whole = chain.jobs(folder, inputs)
    assert [line["step"] for line in job.events("resume")] == list(chain.stops)
    assert [line["step"] for line in job.events("step")] == [line["step"] for line in whole.events("step")]
    assert close(job.losses(), whole.losses(), chain)
    if chain.params not in ROUNDING:
        norms, expected = ([line["gradient_norm"] for line in each.events("step")] for each in (job, whole))
        assert norms == pytest.approx(expected, rel=1e-4)
    notes = [line["text"] for line in job.events("note") if "not bit for bit" in line["text"]]
    assert len(notes) == 2 and all(note.startswith("checkpoint-") for note in notes)


def test_the_best_weights_are_brought_back_from_another_layout(world: tuple[Path, dict[str, dict[str, Path]]]) -> None:
    folder, inputs = world
    (chain,) = (each for each in CHAINS if each.params == "best")
    *_, job, whole = chain.jobs(folder, inputs)
    found, expected = (dict(each.result()["metrics"]) for each in (job, whole))
    assert found["published_step"] == expected["published_step"] < chain.stops[0]
    assert found["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-5)
