"""Adapters that are trained further, killed and started again and split over processes: the same weights.

Under ZeRO-3 modules that an adapter trains whole are split like the model which they were copied from, while the adapter's
weights are put into them. Runs are killed in their fifth step, and go on from the checkpoint of the fourth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats, write_model

pytestmark = pytest.mark.slow

PARAMS = {
    "global_batch_size": 8,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "max_length_tokens": 56,
}
RESOURCES = {"micro_batch_size": 4, "save_every_steps": 2, "log_every_steps": 1}
FIRST: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "modules_to_save": ["lm_head"], "publish": "adapter"},
    "freeze": {"method": "freeze", "last_layers": 1, "publish": "adapter"},
}
CONTINUED = {
    "lora": {"method": "continued", "dropout": 0.1, "learning_rate_ratio": 4.0},
    "freeze": {"method": "continued"},
}
RUNS = {"one": (1, None), "zero3": (2, "zero3")}


class World:
    """The jobs, by what they train and how they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = make_tokenizer()
        self.inputs = {"model": write_model(folder / "llama", tokenizer), "chats": write_chats(folder / "chats")}

    def first(self, name: str) -> Job:
        params = {**PARAMS, "adapter": FIRST[name]}
        return Job(self.folder / name, "stages.language_model.sft", params, self.inputs, RESOURCES)

    def further(self, name: str, run: str, *, killed: bool = False) -> Job:
        processes, layout = RUNS[run]
        return Job(
            self.folder / f"{name}-{run}{'-killed' * killed}",
            "stages.language_model.sft",
            {**PARAMS, "adapter": CONTINUED[name]},
            {**self.inputs, "adapter": self.first(name).work / "out"},
            {**RESOURCES, "deepspeed": layout},
            processes=processes,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("continued")
    world = World(folder)
    run_forked(folder, [world.first(name) for name in FIRST])
    killed = [world.further(name, "zero3", killed=True) for name in FIRST]
    for job in killed:
        job.die = {"step": 5, "during": "step"}
    run_forked(folder, [*(world.further(name, run) for name in FIRST for run in RUNS), *killed])
    run_forked(folder, [world.further(name, "zero3", killed=True) for name in FIRST])
    return world


@pytest.mark.parametrize("name", FIRST)
def test_they_begin_where_the_adapter_ended_and_end_the_same(world: World, name: str) -> None:
    first, one, split = world.first(name), world.further(name, "one"), world.further(name, "zero3")
    ended = first.result()["metrics"]["heldout_loss"]
    for job in (one, split):
        assert job.result()["metrics"]["heldout_loss_base"] == pytest.approx(ended, rel=1e-5)
    assert split.losses() == pytest.approx(one.losses(), rel=1e-5)
    shapes = [
        {key: value.shape for key, value in load_file(job.work / "out" / "adapter_model.safetensors").items()}
        for job in (first, one, split)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("name", FIRST)
def test_killed_and_started_again_they_end_the_same(world: World, name: str) -> None:
    whole, killed = world.further(name, "zero3"), world.further(name, "zero3", killed=True)
    assert [line["step"] for line in killed.events("resume")] == [4]
    assert killed.losses() == whole.losses()
    files = [(job.work / "out" / "adapter_model.safetensors").read_bytes() for job in (whole, killed)]
    assert files[0] == files[1]
