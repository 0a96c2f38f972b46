"""A user's own DeepSpeed config: which fields a memory layout may have, what is said of the others, and what gets one on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Problem, RecipeError
from pipeline.settings.resources import Resources
from pipeline.stage import Forecast
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.layout_fields import BLOCKS, FIELDS, KEPT, NOTHING, REFUSED, SET, ZERO
from stages.lib.training.layouts import LAYOUTS, complete_layout, decisions, read_layout
from stages.lib.training.params import Batch, OptimizerParams, TrainingParams

BATCH = Batch(global_batch_size=16, micro_batch_size=2, accumulation=4, processes=2)
PLAIN = json.loads((LAYOUTS / "zero2.json").read_bytes())

DOCUMENTED = {
    "zero1": {ZERO: {"stage": 1}},
    "zero2": {
        ZERO: {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        }
    },
    "zero3": {
        ZERO: {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    },
    "nvme": {
        ZERO: {
            "stage": 3,
            "offload_optimizer": {
                "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4, "fast_init": False,
            },
            "offload_param": {
                "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 5, "buffer_size": 1e8,
                "max_in_cpu": 1e9,
            },
        },
        "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True},
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "loss scale": {
        "fp16": {
            "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
    "float32": {"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}},
    "batch": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    },
    "communication": {"communication_data_type": "fp32"},
    "optimizer": {
        "optimizer": {
            "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
    "apex": {"amp": {"enabled": "auto", "opt_level": "auto"}},
}  # fmt: skip
"""What the documentation of transformers shows of DeepSpeed's configs."""


def said(folder: Path, layout: Any, precision: str = "fp32", batch: Batch = BATCH) -> list[str]:
    """What is said of a file, all at once; nothing of one that is taken."""
    path = folder / "own.json"
    path.write_text(layout if isinstance(layout, str) else json.dumps(layout), encoding="utf-8")
    try:
        complete_layout(Resources(deepspeed=str(path)), params(precision), batch)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return []


def completed(folder: Path, layout: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    assert said(folder, layout, precision) == []
    found = complete_layout(Resources(deepspeed=str(folder / "own.json")), params(precision), BATCH)
    assert found is not None
    return found


def params(precision: str) -> OptimizerParams:
    return OptimizerParams.model_validate({"learning_rate": 1e-3, "precision": precision})


def with_field(field: str, value: Any, start: dict[str, Any] | None = None) -> dict[str, Any]:
    layout = copy.deepcopy(PLAIN if start is None else start)
    *parents, name = field.split(".")
    block = layout
    for parent in parents:
        block = block.setdefault(parent, {})
    block[name] = value
    return layout


@pytest.mark.parametrize("name", [path.stem for path in LAYOUTS.glob("*.json")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_packaged_layouts_are_taken_as_they_are(tmp_path: Path, name: str, precision: str) -> None:
    packaged = read_layout(name)
    found = completed(tmp_path, packaged, precision)
    assert found[ZERO] == packaged[ZERO]
    assert set(found) == set(packaged)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_transformers_documents_is_taken(tmp_path: Path, name: str) -> None:
    found = completed(tmp_path, DOCUMENTED[name])
    assert found[ZERO] == DOCUMENTED[name][ZERO] if ZERO in DOCUMENTED[name] else ZERO not in found
    assert not {"optimizer", "amp"} & set(found), "DeepSpeed would make its own, or refuse the name"
    assert set(found["fp16"]) == {"enabled"}


CHANGED = [
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "'torch_autocast' changes what is trained"),
    ({"communication_data_type": "fp16"}, 'communication_data_type is "fp16", which rounds gradients'),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "'data_types' changes what is trained"),
    ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op' changes what is trained"),
    ({"curriculum_learning": {"enabled": True}}, "'curriculum_learning' changes what is trained"),
    ({"data_efficiency": {"enabled": True}}, "'data_efficiency' changes what is trained"),
    ({"progressive_layer_drop": {"enabled": True, "theta": 0.5}}, "'progressive_layer_drop' changes what is trained"),
    (
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
        "'compression_training' changes what is trained",
    ),
    ({ZERO: {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients' changes what is trained"),
    ({ZERO: {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights' changes what is trained"),
    ({ZERO: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow' changes what is trained"),
    ({ZERO: {"stage": 2, "load_from_fp32_weights": False}}, "load_from_fp32_weights' changes what is trained"),
    ({"fp16": {"enabled": "auto", "loss_scale": 128}}, "'fp16.loss_scale' changes what is trained"),
    ({"bf16": {"enabled": "auto", "bf16_optimizer_states": True}}, "bf16_optimizer_states' changes what is trained"),
    ({"prescale_gradients": True}, "'prescale_gradients' is not supported here"),
    ({"gradient_predivide_factor": 8.0}, "'gradient_predivide_factor' is not supported here"),
    ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel' is not supported here"),
    ({"elasticity": {"enabled": True, "min_gpus": 1}}, "'elasticity' is not supported here"),
    ({"sequence_parallel_size": 2}, "'sequence_parallel_size' is not supported here"),
    ({"activation_checkpointing": {"partition_activations": True}}, "Write `gradient_checkpointing: true`"),
    ({ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio' is not supported here"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "expected"), CHANGED, ids=[next(iter(block)) for block, _ in CHANGED])
def test_what_is_no_memory_layout_is_refused_by_name(tmp_path: Path, block: dict[str, Any], expected: str) -> None:
    """The way out is the same for all: without the field the file is taken."""
    (line,) = said(tmp_path, PLAIN | block)
    assert expected in line
    assert "Remove it from the file." in line or "remove it" in line
    assert said(tmp_path, PLAIN) == []


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    own = {
        "gradient_cliping": 0.5,
        "torch_autocast": {"enabled": True},
        "bf16": True,
        "train_batch_size": 64,
        "communication_data_type": "bf16",
        ZERO: {"stage": "2", "overlap_comm": "yes", "zenflow": {"topk_ratio": 0.1}, "offload_param": "cpu"},
    }
    lines = said(tmp_path, own)
    for each in (
        "Did you mean 'gradient_clipping'?", "'torch_autocast'", "its bf16 is True, and not a mapping", "train_batch_size is 64",
        'communication_data_type is "bf16"', "zero_optimization.stage is '2'. Take 0, 1, 2 or 3, as a number.",
        "zero_optimization.overlap_comm is 'yes'. Write true or false.", "zenflow'", "offload_param is 'cpu', and not a mapping",
    ):  # fmt: skip
        assert [each in line for line in lines].count(True) == 1, each
    assert len(lines) == 9
    assert all(line.startswith("resources.deepspeed: ") for line in lines)


def test_a_file_is_looked_at_where_the_batch_is_wrong_too(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"torch_autocast": {"enabled": True}, ZERO: {"stage": 7}}))
    training = TrainingParams(learning_rate=1e-3, global_batch_size=16, max_steps=1)
    problems = check_training(Forecast(training, Resources(processes=3, deepspeed=str(tmp_path / "own.json")), {}))
    wrong = [problem.what for problem in problems]
    assert [problem.where for problem in problems] == ["params.global_batch_size"] + ["resources.deepspeed"] * 2
    assert "torch_autocast" in wrong[1] and "stage is 7" in wrong[2]


# Ways out. Each refusal says one; what it says is done to the file, and the file is taken.


def typo(layout: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layout.items() if name != "gradient_cliping"} | {"gradient_clipping": "auto"}


MENDED: list[tuple[dict[str, Any], str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    (PLAIN | {"gradient_cliping": 0.5}, "Did you mean 'gradient_clipping'? Else remove it.", typo),
    (
        PLAIN | {"bfloat16": {"enabled": True}},
        'Write "bf16": {"enabled": "auto"}',
        lambda own: {name: value for name, value in own.items() if name != "bfloat16"} | {"bf16": {"enabled": "auto"}},
    ),
    (
        PLAIN | {"communication_data_type": "fp16"},
        'Write "fp32" in the file',
        lambda own: own | {"communication_data_type": "fp32"},
    ),
    (PLAIN | {"fp32_allreduce": True}, "fp32", lambda own: PLAIN | {"communication_data_type": "fp32"}),
    (
        PLAIN | {"gradient_clipping": 0.5},
        "the stage's param max_gradient_norm",
        lambda own: own | {"gradient_clipping": "auto"},
    ),
    (
        PLAIN | {"zero_force_ds_cpu_optimizer": True},
        'Write "auto"',
        lambda own: own | {"zero_force_ds_cpu_optimizer": "auto"},
    ),
    (
        with_field(f"{ZERO}.reduce_bucket", 5),
        "Did you mean 'reduce_bucket_size'?",
        lambda own: with_field(f"{ZERO}.reduce_bucket_size", 5),
    ),
    (
        PLAIN | {"overlap_comm": True},
        "Write it as zero_optimization.overlap_comm, or remove it.",
        lambda own: with_field(f"{ZERO}.overlap_comm", True),
    ),
    (
        with_field(f"{ZERO}.gradient_clipping", "auto"),
        "Write it as gradient_clipping, or remove it.",
        lambda own: PLAIN,
    ),
    (
        with_field(f"{ZERO}.cpu_offload", True),
        'Write "offload_optimizer": {"device": "cpu"}.',
        lambda own: with_field(f"{ZERO}.offload_optimizer", {"device": "cpu"}),
    ),
    (
        with_field(f"{ZERO}.offload_param", {"device": "cpu"}),
        'Take "stage": 3, or remove offload_param',
        lambda own: with_field(f"{ZERO}.stage", 3, own),
    ),
    (
        {ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        'Take "stage": 1',
        lambda own: with_field(f"{ZERO}.stage", 1, own),
    ),
    (
        {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        'Add "nvme_path"',
        lambda own: with_field(f"{ZERO}.offload_optimizer.nvme_path", "/local", own),
    ),
    (
        with_field(f"{ZERO}.aio", {"block_size": 5}),
        "beside zero_optimization",
        lambda own: PLAIN | {"aio": {"block_size": 5}},
    ),
    (with_field(f"{ZERO}.stage", "2"), "Take 0, 1, 2 or 3, as a number.", lambda own: PLAIN),
    (PLAIN | {ZERO: True}, "Compare with ds_configs/zero3_offload.json", lambda own: PLAIN),
    (with_field(f"{ZERO}.reduce_bucket_size", 1.5), "Write a whole number", lambda own: PLAIN),
    (PLAIN | {"steps_per_print": 0}, "Write a number above 0.", lambda own: PLAIN | {"steps_per_print": 10}),
]


@pytest.mark.parametrize(("own", "hint", "mend"), MENDED, ids=[hint for _, hint, _ in MENDED])
def test_every_refusal_says_what_gets_one_on(
    tmp_path: Path, own: dict[str, Any], hint: str, mend: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    (line,) = said(tmp_path, own)
    assert hint in line
    assert said(tmp_path, mend(own)) == []


def test_gradients_may_be_sent_in_the_precision_of_the_recipe_or_better(tmp_path: Path) -> None:
    taken = {
        (sent, precision)
        for sent in ("fp32", "bf16", "fp16")
        for precision in ("fp32", "bf16", "fp16")
        if not said(tmp_path, PLAIN | {"communication_data_type": sent}, precision)
    }
    assert taken == {("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")}


def test_a_second_partition_divides_the_processes(tmp_path: Path) -> None:
    own = {ZERO: {"stage": 3, "zero_hpz_partition_size": 2}}
    three = Batch(global_batch_size=6, micro_batch_size=2, accumulation=1, processes=3)
    (line,) = said(tmp_path, own, batch=three)
    assert "does not divide 3 processes" in line
    assert (
        said(tmp_path, own) == []
        and said(tmp_path, with_field(f"{ZERO}.zero_hpz_partition_size", 1, own), batch=three) == []
    )


def test_a_name_that_stands_twice_is_not_read_as_its_last_value(tmp_path: Path) -> None:
    own = json.dumps(PLAIN)[:-1] + ', "bf16": {"enabled": "auto", "enabled": "auto"}}'
    (line,) = said(tmp_path, own)
    assert line.endswith("own.json: names that stand twice in one block: 'enabled', 'bf16'. Remove one.")
    with pytest.raises(RecipeError, match="twice"):
        read_layout(str(tmp_path / "own.json"))


@pytest.mark.parametrize("block", ["tensorboard", "wandb", "comet"])
def test_a_log_whose_package_is_not_there_is_refused(
    tmp_path: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    own = PLAIN | {block: {"enabled": True}}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = said(tmp_path, own)
    assert f"its {block} is enabled, and the package" in line and "Install it, or remove the block" in line
    assert said(tmp_path, PLAIN | {block: {"enabled": False}}) == []
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert completed(tmp_path, own)[block] == {"enabled": True}


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_that_is_off_is_taken_and_left_out(tmp_path: Path, field: str) -> None:
    """Files that list every default are common, and DeepSpeed refuses some of its old names whatever they say."""
    refused = REFUSED[field]
    off: list[Any] = [None, "auto"]
    off += [False, {}, {"enabled": False, "more": 1}] if refused.default is NOTHING else [refused.default]
    for value in off:
        found: Any = completed(tmp_path, with_field(field, value))
        *parents, name = field.split(".")
        for parent in parents:
            found = found.get(parent, {})
        assert name not in found, value


def test_the_tables_do_not_overlap() -> None:
    assert not set(KEPT) & set(SET) and not set(REFUSED) & (FIELDS | BLOCKS)
    assert set(SET) == set(decisions(params("fp32"), BATCH))
    assert all(isinstance(each.hint, str) and each.hint.endswith(".") for each in REFUSED.values())


def test_a_file_that_is_no_config_at_all_is_answered_at_once(tmp_path: Path) -> None:
    assert len(said(tmp_path, {f"name{number}": number for number in range(50_000)})) == 100
    assert len(said(tmp_path, json.dumps(PLAIN)[:-1] + ', "bf16": {}' * 50_000 + "}")) == 1
    deep = '{"x": ' * 400 + "1" + "}" * 400
    assert len(said(tmp_path, f'{{"optimizer": {deep}, "data_types": {deep}}}')) == 3


# Plans.


@pytest.mark.parametrize(
    "content", ['{"zero_optimization": {"stage": "2"}}', '{"zero_optimization": 3}', "{", '{"x": 1}']
)
def test_the_estimate_of_a_step_that_is_made_does_not_fall_over_its_file(tmp_path: Path, content: str) -> None:
    """A step that is made already is not checked, and its plan must be shown."""
    path = tmp_path / "own.json"
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 16,
        "intermediate_size": 16,
    }
    training = TrainingParams(learning_rate=1e-3, global_batch_size=4, max_steps=2)

    def estimated(text: str) -> int | None:
        path.write_text(text, encoding="utf-8")
        forecast = Forecast(training, Resources(deepspeed=str(path)), {})
        own = estimate_training(
            forecast, architecture=config, num_rows=8, sequence_length=8, parameters=920, vocabulary_size=16
        )
        return own.memory_bytes_per_rank

    assert estimated(content) is None
    assert estimated("{}") is not None and estimated('{"zero_optimization": {"stage": 2}}') is not None
    path.write_text(content, encoding="utf-8")
    problems = check_training(Forecast(training, Resources(deepspeed=str(path)), {}))
    assert problems and all(isinstance(problem, Problem) and problem.hint for problem in problems)
