"""A reference's log-probabilities as an artifact: a training on them is the one that asks the reference itself, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import ArtifactError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast
from pipeline.store.artifact import digest_file
from stages import STAGES
from tests.integration.preference_world import PreferenceWorld, make_model, make_preference_world, run, unpaired_of

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 3e-3, "max_length_tokens": 256, "max_steps": 3}
LENGTH = {"max_length_tokens": 256}
MISMATCHED = {"mismatched": {"global_batch_size": 8, "max_steps": 3}}
STAGE = STAGES["reference_logprobs"]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo": ("dpo", "preferences", {}),
    "kto": ("kto", "unpaired_preferences", MISMATCHED),
    "kto_of_pairs": ("kto", "preferences", {"take_apart": True, **MISMATCHED}),
}
"""Case -> the stage that is trained, the role of its data, and the params of what is made for it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    return make_preference_world(tmp_path_factory.mktemp("world"), num_pairs=60, heldout=12)


@pytest.fixture(scope="module")
def data(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unpaired = unpaired_of(world.preferences, tmp_path_factory.mktemp("unpaired"))
    return {"preferences": world.preferences, "unpaired_preferences": unpaired}


@pytest.fixture(scope="module")
def made(world: PreferenceWorld, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for case, (_, role, params) in CASES.items():
        inputs = {"model": world.model, role: data[role]}
        folders[case] = run(STAGE, inputs, {**LENGTH, **params}, tmp_path_factory.mktemp(case))[1].out
    return folders


def train(
    case: str, world: PreferenceWorld, data: dict[str, Path], folder: Path, *, seed: int = 0, **more: Any
) -> Context:
    """The training of a case; `more`: further inputs, or params where they are no paths."""
    kind, role, _ = CASES[case]
    given = {name: more.pop(name) for name in [*more] if isinstance(more[name], Path)}
    inputs = {"model": world.model, role: data[role], **given}
    return run(STAGES[kind], inputs, {**TRAINING, **more}, folder, seed=seed)[1]


def notes(context: Context) -> str:
    return " ".join(event["text"] for event in context.journal.events("note"))


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_without_the_reference(
    case: str, world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    asked = train(case, world, data, tmp_path / "asked")
    given = train(case, world, data, tmp_path / "given", reference_logprobs=made[case])
    losses = [[event["loss"] for event in each.journal.events("step")] for each in (asked, given)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for name in ("model.safetensors", "reference_logprobs.npz"):
        assert digest_file(given.out / name) == digest_file(asked.out / name), name
    assert "each process with the whole model" in notes(asked)
    assert "each process with the whole model" not in notes(given)
    assert not list(given.work.glob("reference_logprobs-*.npy"))


def test_an_adapter_that_is_trained_further_is_a_part_of_the_reference(
    world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """What the model says without it is refused, unless the model is named as the reference."""
    base = AutoModelForCausalLM.from_pretrained(world.model)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    inputs = {"model": world.model, "preferences": data["preferences"], "adapter": adapter}
    under_it = run(STAGE, inputs, LENGTH, tmp_path / "made")[1].out
    further = {"adapter": {"method": "continued"}}

    def continued(name: str, **more: Path) -> Context:
        given = {**inputs, **more}
        return run(STAGES["dpo"], given, {**TRAINING, **further}, tmp_path / name)[1]

    asked, given = continued("asked"), continued("given", reference_logprobs=under_it)
    for name in ("adapter_model.safetensors", "reference_logprobs.npz"):
        assert digest_file(given.out / name) == digest_file(asked.out / name), name
    with pytest.raises(ArtifactError, match="with the adapter"):
        continued("refused", reference_logprobs=made["dpo"])
    off = continued("off", reference_logprobs=made["dpo"], reference=world.model)
    assert digest_file(off.out / "reference_logprobs.npz") != digest_file(asked.out / "reference_logprobs.npz")


def test_a_loss_without_mismatched_answers_needs_none(
    world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """The numbers are in the artifact, and are not asked for."""
    context = train("kto", world, data, tmp_path / "run", reference_logprobs=made["kto"], loss="apo_zero_unpaired")
    with (
        np.load(context.out / "reference_logprobs.npz") as file,
        np.load(made["kto"] / "reference_logprobs.npz") as all_,
    ):
        assert set(file) == {"train", "heldout"}
        assert all(np.array_equal(file[name], all_[name][:, 0]) for name in file)


def refusal(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(ArtifactError) as caught:
        train(*arguments, **options)
    return [str(problem) for problem in caught.value.problems]


def test_what_is_not_of_this_training_is_refused_with_a_way_out(
    world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """Each way out is then gone, and leads to a training."""
    other = make_model(tmp_path / "other", world.tokenizer, seed=1)
    logprobs = made["dpo"]

    (said,) = refusal("dpo", world, data, tmp_path / "1", reference_logprobs=logprobs, model=other)
    assert "and the reference here is" in said and "name the other one as inputs.reference here" in said
    train("dpo", world, data, tmp_path / "2", reference_logprobs=logprobs, model=other, reference=world.model)

    said, other_precision = refusal(
        "dpo", world, data, tmp_path / "3", reference_logprobs=logprobs, max_length_tokens=255, precision="bf16"
    )
    assert "made with max_length_tokens 256, and here params.max_length_tokens is 255" in said
    assert "made with precision 'fp32', and here params.precision is 'bf16'" in other_precision

    fewer = tmp_path / "fewer"
    shutil.copytree(world.preferences, fewer)
    lines = (fewer / "train.jsonl").read_text().splitlines(keepends=True)
    (fewer / "train.jsonl").write_text("".join(lines[1:]))
    (said,) = refusal("dpo", world, {"preferences": fewer}, tmp_path / "4", reference_logprobs=logprobs)
    assert "train rows, and the 47 here are not the same tokens" in said and "Make it of the same data set" in said


def test_mismatched_answers_of_other_steps_are_refused(
    world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    (said,) = refusal("kto", world, data, tmp_path / "1", reference_logprobs=made["kto"], seed=1)
    assert "train_mismatched rows" in said and "both steps the same seed" in said
    inputs = {"model": world.model, "unpaired_preferences": data["unpaired_preferences"]}
    plain = run(STAGE, inputs, LENGTH, tmp_path / "plain")[1].out
    said = refusal("kto", world, data, tmp_path / "2", reference_logprobs=plain)[0]
    assert "has none of mismatched answers" in said and "apo_zero_unpaired" in said
    of_pairs = refusal("kto_of_pairs", world, data, tmp_path / "3", reference_logprobs=made["dpo"])
    assert any("take_apart: true" in each for each in of_pairs)


def test_holes_and_damage_are_refused(
    world: PreferenceWorld, data: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    holes = tmp_path / "holes"
    shutil.copytree(made["dpo"], holes)
    with np.load(holes / "reference_logprobs.npz") as file:
        arrays = dict(file)
    arrays["train"][7, 1] = -np.inf
    np.savez(holes / "reference_logprobs.npz", **arrays)
    (said,) = refusal("dpo", world, data, tmp_path / "1", reference_logprobs=holes)
    assert "no reference log-probability for 1 of" in said and "the first of them [7]" in said

    whole = (holes / "reference_logprobs.npz").read_bytes()
    (holes / "reference_logprobs.npz").write_bytes(whole[: len(whole) // 2])
    (said,) = refusal("dpo", world, data, tmp_path / "3", reference_logprobs=holes)
    assert "reference_logprobs.npz: cannot be read: BadZipFile" in said

    (holes / "reference.json").write_text(json.dumps({"model": "x"}))
    (said,) = refusal("dpo", world, data, tmp_path / "2", reference_logprobs=holes)
    assert "reference.json: cannot be read" in said


def test_plan_says_what_does_not_go_together() -> None:
    """1,000 parameters in float32 are 4,000 bytes."""
    known = {"model": Estimate(parameters=1000), "preferences": Estimate(train_rows=10)}
    dpo = STAGES["dpo"]
    forecast = Forecast(
        dpo.params(**TRAINING, loss="simpo"),
        Resources(),
        {**known, "reference_logprobs": Estimate()},
    )
    assert any(problem.where == "inputs.reference_logprobs" for problem in dpo.check(forecast))
    pairs = Forecast(STAGE.params(**LENGTH, **MISMATCHED), Resources(), known)
    assert [problem.where for problem in STAGE.check(pairs)] == ["params.mismatched"]
    assert STAGE.estimate(pairs).memory_bytes_per_rank == 4000
    single = Forecast(
        STAGE.params(**LENGTH, tail_weight=0.5, take_apart=True),
        Resources(),
        {"model": Estimate(), "unpaired_preferences": Estimate()},
    )
    assert [problem.where for problem in STAGE.check(single)] == ["params.take_apart", "params.tail_weight"]
