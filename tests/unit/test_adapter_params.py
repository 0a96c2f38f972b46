"""What a recipe may say of an adapter, and what `plan` says of it: refusals with a way out, shares, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch import LAUNCHERS
from pipeline.command.reports import arithmetic
from pipeline.errors import ArtifactError, RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.settings.resources import Resources
from pipeline.settings.strict import content_of, validate
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind
from stages import STAGES
from stages.lib.models.config import read_config
from stages.lib.models.memory import state_bytes_per_rank
from stages.lib.training.extension import extension_problems
from tests.families import write_base_model

COMMON = {"global_batch_size": 8, "max_steps": 5, "learning_rate": 1e-3}
PARAMS: dict[str, dict[str, Any]] = {
    "pretrain": {**COMMON, "isolate_documents": False},
    "sft": {**COMMON, "max_length_tokens": 64},
    "reward": {**COMMON, "max_length_tokens": 64},
    "dpo": {**COMMON, "max_length_tokens": 64},
    "kto": {**COMMON, "max_length_tokens": 64},
    "distill": {**COMMON, "isolate_documents": False},
    "classify": COMMON,
    "extract": COMMON,
    "answer": COMMON,
}
CAUSAL = ("pretrain", "sft", "dpo", "kto", "distill")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 80,
    "vocab_size": 100,
}


def params_of(stage: str, block: dict[str, Any] | None, **more: Any) -> Any:
    fields = {**PARAMS[stage], **more, **({"adapter": block} if block else {})}
    params, problems = validate(STAGES[stage].params, fields, "params")
    assert not problems, problems
    return params


def refused(stage: str, block: dict[str, Any], **more: Any) -> str:
    _, problems = validate(STAGES[stage].params, {**PARAMS[stage], **more, "adapter": block}, "params")
    return "\n".join(map(str, problems))


def forecast(
    block: dict[str, Any], stage: str = "sft", more: dict[str, Any] | None = None, **resources: Any
) -> Forecast:
    inputs = {"model": Estimate(parameters=40_000, architecture=LLAMA, vocabulary_size=100)}
    return Forecast(params_of(stage, block, **(more or {})), Resources(device="cpu", **resources), inputs)


@pytest.mark.parametrize("stage", PARAMS)
def test_recipes_without_an_adapter_keep_their_identity(stage: str) -> None:
    assert "adapter" not in content_of(params_of(stage, None), str)
    assert content_of(params_of(stage, {"method": "lora"}), str)["adapter"] == {
        "method": "lora",
        "publish": None,
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": None,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init": "default",
        "learning_rate_ratio": 1.0,
    }, "what was added later is left out where it says nothing"


@pytest.mark.parametrize("stage", PARAMS)
def test_what_is_made(stage: str) -> None:
    """A whole model where nothing else is said; an adapter where that is asked for, or where nothing could be merged."""
    kinds: dict[str, Kind] = {}

    def made(block: dict[str, Any] | None) -> Kind:
        return STAGES[stage].output_kind(params_of(stage, block), kinds)

    whole = made(None)
    assert whole is not Kind.ADAPTER
    assert made({"method": "lora"}) is made({"method": "freeze", "last_layers": 1, "publish": "merged"}) is whole
    if stage in CAUSAL:
        assert made({"method": "lora", "publish": "adapter"}) is made({"method": "prompt_tuning"}) is Kind.ADAPTER
    else:
        assert "publish: adapter is for causal models alone" in refused(stage, {"method": "lora", "publish": "adapter"})
        assert "prompt_tuning is for causal models alone: take lora, vera" in refused(
            stage, {"method": "prompt_tuning"}
        )


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({}, "method: is required"),
        ({"method": "lore"}, "there is no method 'lore' (Did you mean 'lora'?"),
        ({"method": "lora", "ranks": 4}, "unknown field"),
        ({"method": "lora", "rank": 3, "init": "orthogonal"}, "init: orthogonal needs an even rank, not 3"),
        (
            {"method": "lora", "init": "orthogonal", "rank_pattern": {"v_proj": 5}},
            "init: orthogonal needs an even rank, not 5",
        ),
        ({"method": "lora", "target_modules": []}, "target_modules names nothing: leave it out for all linear layers"),
        ({"method": "lora", "init_iterations": 4}, "init_iterations has no effect with init: default"),
        ({"method": "lora", "init": "pissa", "use_dora": True}, "use_dora does not go with init: pissa"),
        (
            {"method": "lora", "init": "pissa", "target_parameters": ["experts.down_proj"]},
            "target_parameters cannot begin with pissa: take init: default",
        ),
        (
            {"method": "lora", "use_dora": True, "quantize_base": "nf4"},
            "use_dora needs the weights of the base as they are: remove it, or quantize_base",
        ),
        (
            {"method": "lora", "dropout": 0.1, "target_parameters": ["experts.down_proj"]},
            "target_parameters have no dropout: remove one of the two",
        ),
        ({"method": "adalora", "rank": 8}, "target_rank 8 must be below rank 8: with as much, take lora"),
        (
            {"method": "adalora", "warmup_fraction": 0.5},
            "warmup_fraction and final_fraction leave no steps to prune in: their sum must be below 1",
        ),
        (
            {"method": "ia3", "target_modules": ["k_proj"]},
            "give both target_modules and feedforward_modules, or neither",
        ),
        (
            {"method": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
            "feedforward_modules names down_proj, which target_modules does not",
        ),
        ({"method": "prefix_tuning", "projection_size": 8}, "projection_size has no effect without projection"),
        ({"method": "p_tuning", "encoder_layers": 3}, "encoder_layers has no effect with encoder: mlp"),
        ({"method": "freeze"}, "says nothing of what is trained: give last_layers, modules or both, or only_new"),
        ({"method": "freeze", "only_new": True, "last_layers": 1}, "only_new says already what is trained: remove it"),
        (
            {"method": "prompt_tuning", "publish": "merged"},
            "publish: merged is not possible: virtual tokens are no weights",
        ),
        (
            {"method": "bottleneck", "publish": "merged"},
            "publish: merged is not possible: modules between those of the model are no weights of the model. Set publish",
        ),
    ],
)
def test_blocks_that_say_what_cannot_be(block: dict[str, Any], said: str) -> None:
    assert said in refused("sft", block)


def test_ranks_need_steps_and_whole_gradients() -> None:
    """Of 2 steps the first is the last that prunes, and there would be no step before it to score triplets by."""
    assert "precision to bf16 or fp32" in refused("sft", {"method": "adalora"}, precision="fp16")
    few = {"method": "adalora", "warmup_fraction": 0.0, "final_fraction": 0.5}
    assert "no steps to prune in: of 2 steps 0 are before and 1 after" in refused("sft", few, max_steps=2)
    for fields in ({"max_steps": 4}, {"max_steps": 10, "precision": "bf16"}):
        assert params_of("sft", few, **fields).adapter is not None


def test_ranks_that_were_found_over_some_steps_are_not_those_of_more() -> None:
    """The way out is another step, which goes on from the lora that was published."""
    for block, count in (({"method": "adalora"}, 1), ({"method": "lora"}, 0)):
        found = extension_problems(params_of("sft", block, max_steps=20, schedule="constant"), 20, 10, 10)
        assert len(found) == count
        assert all(
            "is adalora, whose ranks were found over the steps of what it extends" in str(each) for each in found
        )


def test_what_does_not_go_with_a_stage() -> None:
    assert "add_tokens needs embeddings that are trained" in refused("sft", {"method": "lora"}, add_tokens=True)
    for kind in ("dpo", "kto"):
        assert "adapter: dropout must be 0" in refused(kind, {"method": "lora", "dropout": 0.1})
        assert "adapter: quantize_base must be null" in refused(kind, {"method": "lora", "quantize_base": "nf4"})
    for stage in ("pretrain", "distill"):
        said = refused(stage, {"method": "prefix_tuning"}, isolate_documents=True)
        assert "puts its tokens before a whole block, not before each document" in said


@pytest.mark.parametrize(
    ("block", "resources", "said"),
    [
        (
            {"method": "prefix_tuning"},
            {"gradient_checkpointing": True},
            "resources.gradient_checkpointing: is true, and layers that are computed again would not see the prefix",
        ),
        (
            {"method": "freeze", "only_new": True},
            {},
            "params.adapter.only_new: is true, and the model has no layers that a step `deepen` added. Make some",
        ),
        ({"method": "bitfit"}, {}, "bitfit finds nothing to train: models of the type llama have no such parameters"),
        (
            {"method": "lora", "use_dora": True},
            {"deepspeed": "zero3"},
            "params.adapter.use_dora: is true, and reads whole",
        ),
        (
            {"method": "adalora"},
            {"deepspeed": "zero3"},
            "params.adapter: is adalora, which prunes by whole gradients and weights, and this layout does not keep them",
        ),
        (
            {"method": "prompt_tuning"},
            {},
            "which with the virtual tokens is 84 in all, and the model takes 80 tokens. Take 4 fewer of either.",
        ),
    ],
)
def test_what_plan_refuses(block: dict[str, Any], resources: dict[str, Any], said: str) -> None:
    assert said in "\n".join(map(str, STAGES["sft"].check(forecast(block, **resources))))


def test_adalora_is_refused_where_deepspeed_mistakes_the_place_of_a_parameter(tmp_path: Path) -> None:
    path = tmp_path / "robin.json"
    for switched_on, refused in ((True, True), (False, False)):
        path.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": switched_on}}))
        found = STAGES["sft"].check(forecast({"method": "adalora"}, deepspeed=str(path)))
        assert any("is adalora, which prunes" in str(problem) for problem in found) == refused


def test_the_ways_out_work() -> None:
    for block, resources in (
        ({"method": "prefix_tuning", "num_virtual_tokens": 16}, {}),
        ({"method": "freeze", "last_layers": 2}, {}),
        ({"method": "lora", "use_dora": True}, {"deepspeed": "zero2"}),
        ({"method": "lora"}, {"deepspeed": "zero3"}),
        ({"method": "adalora"}, {"deepspeed": "zero2"}),
        ({"method": "adalora"}, {}),
        ({"method": "lora", "init": "pissa"}, {"deepspeed": "zero3"}),
    ):
        found = [problem for problem in STAGES["sft"].check(forecast(block, **resources)) if "chat" not in str(problem)]
        assert found == [], block


def test_an_adapter_needs_a_model() -> None:
    params = params_of("pretrain", {"method": "lora"}, architecture={"model_type": "llama"})
    found = STAGES["pretrain"].check(Forecast(params, Resources(device="cpu"), {"tokens": Estimate()}))
    assert any("params.adapter: is for a model that has learned something" in str(problem) for problem in found)


def test_plan_prints_the_share() -> None:
    """Prefix of 8 tokens: 8 x 2 x 3 x 16 = 768 of 40,000 + 768, 1.884%; of the last layer 11,264 parameters, all the model's
    own: 28.160% of 40,000.
    """
    prefix = STAGES["sft"].estimate(forecast({"method": "prefix_tuning", "num_virtual_tokens": 8}))
    assert (prefix.parameters, prefix.trained_parameters, prefix.added_parameters) == (40_000, 768, 768)
    assert "(768 trained, 1.884%)" in arithmetic(prefix, 1)
    assert prefix.adapter == "prefix_tuning"
    assert any("steps that read adapters (evaluate), `slipway chat` and peft" in note for note in prefix.notes or ())
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80 + 2 * 32
    last = STAGES["sft"].estimate(forecast({"method": "freeze", "last_layers": 1}))
    assert f"({layer:,} trained, {layer / 40_000:.3%})" in arithmetic(last, 1)
    assert last.adapter is None
    whole = STAGES["sft"].estimate(
        Forecast(params_of("sft", None), Resources(device="cpu"), forecast({"method": "ia3"}).inputs)
    )
    assert "trained" not in arithmetic(whole, 1)


@pytest.mark.parametrize(
    ("layout", "world", "precision", "expected"),
    [
        # 4 bytes a weight; gradients and moments, 4 + 8, of what is trained.
        (None, 1, "fp32", 1000 * 4 + 10 * 12),
        (None, 1, "bf16", 1000 * 4 + 10 * 12 + 1000 * 2),
        # 2 bytes a weight and a gradient; a copy and moments, 12, of what is trained.
        ({"zero_optimization": {"stage": 0}}, 2, "bf16", 1000 * 2 + 10 * 2 + 10 * 12),
        ({"zero_optimization": {"stage": 2}}, 2, "bf16", 1000 * 2 + 10 * 2 // 2 + 10 * 12 // 2),
        ({"zero_optimization": {"stage": 3}}, 2, "bf16", (1000 * 2 + 10 * 2 + 10 * 12) // 2),
    ],
)
def test_memory_leaves_out_what_frozen_weights_do_not_need(
    layout: Any, world: int, precision: str, expected: int
) -> None:
    """Of 1,000 parameters of which 10 are trained."""
    found = state_bytes_per_rank(parameters=1000, trained=10, layout=layout, world_size=world, precision=precision)
    assert found == expected


def test_checkpoints_of_an_adapter_take_what_is_trained() -> None:
    """18 bytes of each of 768 trained for three checkpoints and one being written; the artifact 4 of each."""
    estimate = STAGES["sft"].estimate(
        forecast({"method": "prefix_tuning", "num_virtual_tokens": 8}, keep_checkpoints=3)
    )
    assert estimate.disk_bytes == 768 * (4 + 18 * 4)


def test_memory_of_a_base_in_four_bits() -> None:
    """Linear layers of 3 layers: q, o 32 x 32; k, v 32 x 16; three of 32 x 80. Half a byte and 4 / 64 of one instead of 4.

    The largest is made anew in float32, with 4 bytes for two of its weights.
    """
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)
    whole, four_bits = (
        STAGES["sft"].estimate(forecast({"method": "lora", **more})).memory_bytes_per_rank
        for more in ({}, {"quantize_base": "nf4"})
    )
    assert whole - four_bits == 4 * weights - (weights // 2 + weights // 16 + 32 * 80 * 6)


def test_models_without_linear_layers_of_torch_are_not_put_in_four_bits() -> None:
    inputs = {"model": Estimate(architecture={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "vocab_size": 100})}
    for block, refused in (({"quantize_base": "nf4"}, True), ({}, False)):
        given = Forecast(params_of("sft", {"method": "lora", **block}), Resources(device="cpu"), inputs)
        said = " ".join(map(str, STAGES["sft"].check(given)))
        assert ("params.adapter.quantize_base: is nf4, and models of the type gpt2" in said) is refused


def test_a_pissa_is_published_with_twice_the_rank() -> None:
    """Rank 2 on q: 3 x 2 (32 + 32) trained; the artifact has as much again, which takes off what it began with."""
    block = {"method": "lora", "rank": 2, "target_modules": ["q_proj"], "init": "pissa"}
    trained = 3 * 2 * (32 + 32)
    for publish, kept in (("adapter", 0), ("merged", 40_000)):
        found = STAGES["sft"].estimate(forecast({**block, "publish": publish}, keep_checkpoints=1))
        assert found.disk_bytes == 4 * (kept + 2 * trained) + 18 * 2 * trained
        assert found.adapter_weights == 2 * trained


def test_an_adapter_that_is_trained_further_is_counted(tmp_path: Path) -> None:
    """By its file where there is one, without what a VeRA only drew; else by what the step before will make."""
    shapes = {"q_proj.vera_lambda_b": (32,), "q_proj.vera_lambda_d": (4,), "base_model.vera_A": (4, 32)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "adapter_model.safetensors")
    for config, given, expected in (
        ({"peft_type": "VERA"}, None, (36, 36)),
        ({"slipway_method": "bitfit"}, None, (36, 0)),
        (None, Estimate(adapter_weights=72, added_parameters=36), (72, 72)),
        (None, Estimate(adapter_weights=72, added_parameters=0), (72, 0)),
        (None, Estimate(), (None, None)),
    ):
        if config:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        plain = forecast({"method": "continued"})
        inputs = {**plain.inputs, "adapter": given or Estimate(folder=tmp_path)}
        found = STAGES["sft"].estimate(replace(plain, inputs=inputs))
        assert (found.trained_parameters, found.added_parameters) == expected


RECIPE = """\
name: recipe
seed: 1
outputs: [last]
stages:
  rows: {{kind: clean, params: {{format: chats, source: {{kind: files, layout: messages, paths: [rows.jsonl]}}}}}}
  chats: {{kind: mix, inputs: {{sources: {{rows: rows}}}}}}
  tuned:
    kind: sft
    inputs: {{model: ./base, chats: chats}}
    params: {{global_batch_size: 1, max_steps: 1, learning_rate: 1e-3, max_length_tokens: 64, adapter: {adapter}}}
{last}
"""
AGAIN = """\
  last:
    kind: sft
    inputs: {model: tuned, chats: chats}
    params: {global_batch_size: 1, max_steps: 1, learning_rate: 1e-3, max_length_tokens: 64}"""
MERGED = "  last: {kind: merge, inputs: {model: ./base, adapter: tuned}}"


def load(tmp_path: Path, adapter: str, last: str) -> Any:
    write_base_model(tmp_path / "base", "llama-3")
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(adapter=adapter, last=last))
    return load_recipe(path, STAGES, LAUNCHERS)


def test_a_stage_that_needs_a_whole_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "{method: lora, publish: adapter}", AGAIN)
    said = str(caught.value)
    assert "stages.last.inputs.model: needs causal_lm, and 'tuned' makes adapter. Set `publish: merged`" in said
    assert "{kind: merge, inputs: {model: THE MODEL OF tuned, adapter: tuned}}" in said


@pytest.mark.parametrize(("adapter", "last"), [("{method: lora}", AGAIN), ("{method: lora, publish: adapter}", MERGED)])
def test_both_ways_out_are_recipes(adapter: str, last: str, tmp_path: Path) -> None:
    assert [step.name for step in load(tmp_path, adapter, last).steps][-1] == "last"


def test_who_opens_an_adapter_as_a_model_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/some-model"}')
    with pytest.raises(
        ArtifactError, match=r"holds an adapter of 'someone/some-model' alone, and no model\. Make one of"
    ):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == {"model_type": "llama"}


def test_plan_refuses_to_merge_virtual_tokens() -> None:
    inputs = {"model": Estimate(), "adapter": Estimate(adapter="p_tuning")}
    merge = STAGES["merge"]
    (problem,) = merge.check(Forecast(merge.params(), Resources(device="cpu"), inputs))
    assert "is of the method p_tuning, whose virtual tokens are no weights" in str(problem)
    inputs["adapter"] = Estimate(adapter="lora")
    assert merge.check(Forecast(merge.params(), Resources(device="cpu"), inputs)) == []
