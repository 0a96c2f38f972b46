"""Adapters of every kind, killed and started again and split over processes: the same weights, and frozen ones left alone.

Runs are killed in their fifth step and go on from the checkpoint of the fourth: of each method two processes under ZeRO-3,
where a weight that is saved without being gathered is empty, and one process without DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.training_world import (
    GPT2_WITH_DROPOUT,
    Job,
    make_tokenizer,
    run_forked,
    write_chats,
    write_model,
)

pytestmark = pytest.mark.slow

PARAMS = {
    "global_batch_size": 8,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_length_tokens": 56,
}
RESOURCES = {"micro_batch_size": 4, "save_every_steps": 2, "log_every_steps": 1}
DIE = {"step": 5, "during": "step"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1, "learning_rate_ratio": 4.0, "modules_to_save": ["lm_head"]},
    "dora": {"method": "lora", "rank": 2, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "pissa": {"method": "lora", "rank": 2, "init": "pissa", "rank_pattern": {"v_proj": 4}},
    "experts": {
        "method": "lora",
        "rank": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "nf4": {"method": "lora", "rank": 2, "quantize_base": "nf4"},
    "lora_alone": {"method": "lora", "rank": 2, "init": "orthogonal", "publish": "adapter"},
    "vera": {"method": "vera", "rank": 8},
    "adalora": {"method": "adalora", "rank": 4, "target_rank": 2, "warmup_fraction": 0.2, "final_fraction": 0.2},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck", "size": 4},
    "prompt_tuning": {"method": "prompt_tuning", "num_virtual_tokens": 4},
    "prefix_tuning": {"method": "prefix_tuning", "num_virtual_tokens": 4},
    "prefix_projected": {"method": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 4, "encoder": "lstm", "encoder_size": 8},
    "bitfit": {"method": "bitfit"},
    "freeze": {"method": "freeze", "last_layers": 1, "modules": ["mlp"]},
    "only_new": {"method": "freeze", "only_new": True},
}
FAMILY = {"bitfit": "gpt2", "experts": "mixtral", "only_new": "deepened"}
"""Of Llama, which has no biases, where nothing else is said."""
RUNS: dict[str, tuple[int, str | None]] = {
    "one": (1, None),
    "two": (2, None),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
}
WITHOUT_ZERO3 = ("dora", "adalora")
"""They read whole weights in every pass, or whole gradients: `plan` refuses them."""
SPREAD = {
    "two": ("lora", "adalora", "prefix_projected"),
    "zero2": ("lora", "dora", "adalora", "p_tuning", "freeze"),
}
"""Which methods run so; in one process and under ZeRO-3 all do that can."""
CASES = [
    (name, run)
    for name in ADAPTERS
    for run in RUNS
    if name in SPREAD.get(run, ADAPTERS) and not (run == "zero3" and name in WITHOUT_ZERO3)
]
KILLED = [
    ("lora", "one"),
    ("adalora", "one"),
    *((name, "zero2" if name in WITHOUT_ZERO3 else "zero3") for name in ADAPTERS),
]


@dataclass
class World:
    folder: Path
    models: dict[str, Path]
    chats: Path

    def job(self, name: str, run: str, *, killed: bool = False) -> Job:
        processes, layout = RUNS[run]
        model = self.models[FAMILY.get(name, "llama")]
        return Job(
            self.folder / f"{name}-{run}{'-killed' * killed}",
            "stages.language_model.sft",
            {**PARAMS, "adapter": ADAPTERS[name]},
            {"model": model, "chats": self.chats},
            {**RESOURCES, "deepspeed": layout},
            processes=processes,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = make_tokenizer()
    models = {
        "llama": write_model(folder / "llama", tokenizer, attention_dropout=0.2),
        "gpt2": write_model(folder / "gpt2", tokenizer, **GPT2_WITH_DROPOUT),
        "deepened": write_model(folder / "deepened", tokenizer, added_layers=[1]),
        "mixtral": write_model(folder / "mixtral", tokenizer, model_type="mixtral", num_local_experts=4),
    }
    world = World(folder, models, write_chats(folder / "chats"))
    killed = [world.job(name, run, killed=True) for name, run in KILLED]
    for job in killed:
        job.die = DIE
    run_forked(folder, [*(world.job(name, run) for name, run in CASES), *killed])
    for job in killed:
        assert [line["step"] for line in job.events("progress") if line["what"] == "checkpoint"] == [2, 4]
    run_forked(folder, [world.job(name, run, killed=True) for name, run in KILLED])
    return world


def adapter_of(job: Job) -> dict[str, torch.Tensor]:
    """The adapter's weights, of an artifact that is one or that holds one."""
    out = job.work / "out"
    home = out if (out / "adapter_config.json").exists() else out / "adapter"
    return load_file(home / "adapter_model.safetensors")


def files_of(job: Job) -> dict[str, bytes]:
    out = job.work / "out"
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize(("name", "run"), KILLED)
def test_killed_and_started_again_it_ends_the_same(world: World, name: str, run: str) -> None:
    """Byte for byte: the whole model, where there is one, and the adapter."""
    whole, killed = world.job(name, run), world.job(name, run, killed=True)
    assert [line["step"] for line in killed.events("resume")] == [4]
    assert files_of(killed) == files_of(whole)
    assert killed.result()["metrics"] == whole.result()["metrics"]
    assert killed.losses() == whole.losses()


@pytest.mark.parametrize(("name", "run"), [(name, run) for name, run in CASES if run != "one"])
def test_it_does_not_depend_on_processes_and_layout(world: World, name: str, run: str) -> None:
    """Losses within 1e-5 of those of one process, and no tensor that is empty or of another shape."""
    one, other = world.job(name, "one"), world.job(name, run)
    assert other.losses() == pytest.approx(one.losses(), rel=1e-5)
    expected, found = adapter_of(one), adapter_of(other)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    assert all(value.numel() for value in found.values())


@pytest.mark.parametrize(("name", "run"), CASES)
def test_a_checkpoint_holds_what_is_trained(world: World, name: str, run: str) -> None:
    """Trained weights and two moments of Adam: with what lies around them less than the model's own weights twice."""
    job = world.job(name, run)
    (checkpoint,) = sorted(job.work.glob("checkpoints/checkpoint-6"))
    note = next(line["text"] for line in job.events("note") if "parameters (" in line["text"])
    trained = int(note.split(" trains ")[1].split(" ")[0].replace(",", ""))
    saved = sum(path.stat().st_size for path in checkpoint.rglob("*.pt"))
    # 12 bytes each, 16 where DeepSpeed keeps weights twice; a few kilobytes for each of up to 60 tensors, and each file.
    assert saved < 20 * trained + 150_000


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_killed_run_saved_no_frozen_weights(world: World, name: str) -> None:
    """In the plain engine's file every tensor is one that the adapter trains, under the name it has in training."""
    job = world.job(name, "one")
    state = torch.load(job.work / "checkpoints" / "checkpoint-6" / "engine.pt", weights_only=True)["module"]
    frozen = load_file(job.inputs["model"] / "model.safetensors")
    own = [key for key in state if key in frozen]
    trained = {"bitfit": "bias", "freeze": ".layers.1.mlp.", "only_new": ".layers.1."}
    assert all(name in trained and trained[name] in key for key in own)
    begun = {key.rpartition(".")[0] for key in state if key.endswith((".start_A", ".start_B"))}
    assert begun == ({key.partition(".lora_")[0] for key in state if ".lora_" in key} if name == "pissa" else set())
    # Of two experts' weights that are adapted, the matrices of the one stand in the layer around the other.
    assert state and not any("base_layer" in key and ".lora_" not in key for key in state)
