"""What becomes of each field of a DeepSpeed config: kept as the file says it, set by the recipe, or refused.

A layout may say where state lies, how it is sent and what is logged. Everything that it says besides would train something
else than the recipe, under the same artifact id. DeepSpeed itself passes over top-level names that it does not know, so a
typo would be a default. tests/distributed/test_layout_fields.py holds the tables to all that the installed DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Values:
    """The values that a kept field may have."""

    fit: Callable[[Any], bool]
    words: str


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # and not NaN


def is_whole_number(value: Any) -> bool:
    """Whether a value is a whole number: 5e8 is one, as 500000000 is."""
    return is_number(value) and (isinstance(value, int) or value.is_integer())


def one_of_words(*words: str) -> Values:
    return Values(lambda value: isinstance(value, str) and value in words, " or ".join(f'"{word}"' for word in words))


FLAG = Values(lambda value: isinstance(value, bool), "true or false")
COUNT = Values(lambda value: is_whole_number(value) and value >= 0, "a whole number")
POSITIVE = Values(lambda value: is_whole_number(value) and value > 0, "a whole number above 0")
STEPS = Values(lambda value: is_number(value) and value > 0, "a number above 0")
AMOUNT = Values(lambda value: is_number(value) and value >= 0, "a number")
TEXT = Values(lambda value: isinstance(value, str), "a text")
TEXTS = Values(
    lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of texts"
)
INTEGER = Values(is_whole_number, "a whole number")

ZERO = "zero_optimization"

ZERO_FIELDS: dict[str, Values] = {
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": POSITIVE,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": COUNT,
    "overlap_comm": FLAG,
    "sub_group_size": COUNT,
    "round_robin_gradients": FLAG,
    "parameter_alignment": FLAG,
    "zero_hpz_partition_size": COUNT,
    "ignore_unused_parameters": FLAG,
    "memory_efficient_linear": FLAG,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "stage3_prefetch_bucket_size": COUNT,
    "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_module_granularity_threshold": INTEGER,
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    "stage3_gather_16bit_weights_on_model_save": FLAG,
    "leaf_module.classes": TEXTS,
    "leaf_module.names": TEXTS,
    "leaf_module.name_suffixes": TEXTS,
    **{
        f"{block}.{name}": values
        for block in ("offload_param", "offload_optimizer")
        for name, values in {
            "device": one_of_words("none", "cpu", "nvme"),
            "nvme_path": TEXT,
            "buffer_count": COUNT,
            "pin_memory": FLAG,
        }.items()
    },
    "offload_param.buffer_size": COUNT,
    "offload_param.max_in_cpu": COUNT,
    "offload_optimizer.pipeline_read": FLAG,
    "offload_optimizer.pipeline_write": FLAG,
    "offload_optimizer.fast_init": FLAG,
}
"""Of `zero_optimization`, besides `stage`: where state lies, and how it is sent."""

LOG_LEVEL = one_of_words("debug", "info", "warning", "error", "critical")

KEPT: dict[str, Values] = {
    **{f"{ZERO}.{name}": values for name, values in ZERO_FIELDS.items()},
    "aio.block_size": POSITIVE,
    "aio.queue_depth": POSITIVE,
    "aio.intra_op_parallelism": POSITIVE,
    "aio.single_submit": FLAG,
    "aio.overlap_events": FLAG,
    "aio.use_gds": FLAG,
    "communication_data_type": one_of_words("fp32", "bf16", "fp16"),  # of these only what `precision` allows
    "disable_python_gc": FLAG,
    # What is logged.
    "steps_per_print": STEPS,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "log_level": LOG_LEVEL,
    "vocabulary_size": COUNT,  # DeepSpeed warns where it is no multiple of 8, and does no more with it
    "timers.throughput.enabled": FLAG,
    "timers.throughput.synchronized": FLAG,
    "comms_logger.enabled": FLAG,
    "comms_logger.prof_all": FLAG,
    "comms_logger.prof_ops": TEXTS,
    "comms_logger.verbose": FLAG,
    "comms_logger.debug": FLAG,
    "flops_profiler.enabled": FLAG,
    "flops_profiler.recompute_fwd_factor": AMOUNT,
    "flops_profiler.profile_step": POSITIVE,
    "flops_profiler.module_depth": INTEGER,
    "flops_profiler.top_modules": POSITIVE,
    "flops_profiler.detailed": FLAG,
    "flops_profiler.output_file": TEXT,
    **{
        f"{monitor}.{name}": FLAG if name in ("enabled", "online") else POSITIVE if "interval" in name else TEXT
        for monitor, names in {
            "csv_monitor": "enabled output_path job_name",
            "tensorboard": "enabled output_path job_name",
            "wandb": "enabled group team project",
            "comet": "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        }.items()
        for name in names.split()
    },
}
"""Dotted field -> the values that it may have. All of these are handed to DeepSpeed as the file says them."""

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Block -> the package without which DeepSpeed ends where the block is enabled."""

SET = {
    "train_batch_size": "the stage's param global_batch_size",
    "train_micro_batch_size_per_gpu": "resources.micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and resources.micro_batch_size",
    "gradient_clipping": "the stage's param max_gradient_norm",
    "bf16.enabled": "the stage's param precision",
    "bf16.check_grad_overflow": "Slipway, which takes no step whose gradients are not finite",
    "fp16.enabled": "the stage's param precision",
    "zero_allow_untested_optimizer": "Slipway, whose optimizer is PyTorch's AdamW",
    "zero_force_ds_cpu_optimizer": "Slipway, whose optimizer is PyTorch's AdamW",
}
"""Dotted field -> what sets it, and demands its value of the file. `decisions` of layouts.py has the values."""

MATCHED = ("optimizer", "scheduler")
"""Blocks that say what the recipe says, or are refused: `layout_blocks.py`. They are not handed on."""

NOTHING = object()


@dataclass(frozen=True)
class Refused:
    """A field that no layout may use."""

    why: str
    hint: str = "Remove it from the file."
    default: Any = NOTHING
    """The value with which DeepSpeed does what it does without the field, where that is not `false`."""


def decided_by(what: str) -> Refused:
    return Refused(f"is decided by {what}", "Remove the block from the file.")


def trains_otherwise(what: str, *, default: Any = NOTHING, hint: str = "") -> Refused:
    """Refused because it changes what is learned, under the same artifact id."""
    return Refused(f"changes what is trained: {what}", f"Remove it from the file. {hint}".rstrip(), default)


def unsupported(what: str, *, default: Any = NOTHING, hint: str = "") -> Refused:
    return Refused(f"is not supported here: {what}", f"Remove it from the file. {hint}".rstrip(), default)


def old_name(hint: str, *, default: Any = NOTHING) -> Refused:
    return Refused("is an old name", hint, default)


PRECISION = "The stage's param precision says fp32, bf16 or fp16."
SCALING = "how fp16 scales the loss decides which steps are left out"
NO_LONGER = "DeepSpeed has it no longer"

REFUSED: dict[str, Refused] = {
    # The recipe, or Slipway itself, does it.
    "amp": decided_by("the stage's param precision"),
    "checkpoint": decided_by("Slipway, which writes and proves checkpoints itself"),
    "nebula": decided_by("Slipway, which writes and proves checkpoints itself"),
    "datastates_ckpt": decided_by("Slipway, which writes and proves checkpoints itself"),
    "dataloader_drop_last": decided_by("Slipway, which reads the data itself"),
    "activation_checkpointing": unsupported(
        "models of transformers do not use it", hint="Write `gradient_checkpointing: true` in the recipe's resources."
    ),
    # Number formats.
    "torch_autocast": trains_otherwise("it rounds the arithmetic", hint=PRECISION),
    "data_types": trains_otherwise("it rounds gradients or weights", hint=PRECISION),
    "weight_quantization": trains_otherwise("it rounds the weights"),
    "bf16.immediate_grad_update": trains_otherwise("it rounds gradients at another place"),
    "bf16.bf16_master_weights_and_grads": trains_otherwise("it rounds weights and gradients"),
    "bf16.bf16_optimizer_states": trains_otherwise("it rounds the optimizer's state"),
    "fp16.auto_cast": trains_otherwise("it rounds what the model is given"),
    "fp16.fp16_master_weights_and_grads": trains_otherwise("it rounds weights and gradients"),
    "fp16.loss_scale": trains_otherwise(SCALING, default=0),
    "fp16.initial_scale_power": trains_otherwise(SCALING, default=16),
    "fp16.loss_scale_window": trains_otherwise(SCALING, default=1000),
    "fp16.hysteresis": trains_otherwise(SCALING, default=2),
    "fp16.consecutive_hysteresis": trains_otherwise(SCALING),
    "fp16.min_loss_scale": trains_otherwise(SCALING, default=1),
    f"{ZERO}.zero_quantized_weights": trains_otherwise("it rounds the weights"),
    f"{ZERO}.zero_quantized_nontrainable_weights": trains_otherwise("it rounds the weights"),
    f"{ZERO}.zero_quantized_gradients": trains_otherwise("it rounds the gradients"),
    f"{ZERO}.load_from_fp32_weights": trains_otherwise("false rounds the weights of a run that resumes", default=True),
    # What is learned, in which order, and by which rule.
    "gradient_allreduce_op": trains_otherwise("the sum over the processes is not their mean", default="mean"),
    "data_efficiency": trains_otherwise("it takes other data, or leaves layers out"),
    "curriculum_learning": trains_otherwise("it takes other data in another order"),
    "progressive_layer_drop": trains_otherwise("it leaves layers out"),
    "compression_training": trains_otherwise(
        "it rounds or prunes the weights", hint="The stage `quantize` compresses a model."
    ),
    "quantize_training": trains_otherwise("it rounds the weights", hint="The stage `quantize` compresses a model."),
    "eigenvalue": trains_otherwise("it belongs to quantize_training"),
    "sparse_attention": trains_otherwise("it is another attention"),
    f"{ZERO}.zenflow": trains_otherwise("it steps with gradients of earlier steps"),
    f"{ZERO}.override_module_apply": trains_otherwise("false makes other fresh weights under ZeRO-3", default=True),
    # What the engine here does not do, or DeepSpeed refuses with it.
    "prescale_gradients": unsupported("DeepSpeed refuses it under ZeRO-2 and ZeRO-3"),
    "gradient_predivide_factor": unsupported("DeepSpeed refuses it under ZeRO-2 and ZeRO-3", default=1),
    "managed_gradient_accumulation": unsupported("Slipway says which backward pass is the last", default=True),
    "disable_allgather": unsupported("DeepSpeed reads it and does nothing with it"),
    "tensor_parallel": unsupported("weights are split by ZeRO-3"),
    "expert_parallel": unsupported("weights are split by ZeRO-3"),
    "use_data_before_expert_parallelism": unsupported("weights are split by ZeRO-3"),
    "pipeline": unsupported("weights are split by ZeRO-3"),
    "sequence_parallel_size": unsupported("a sequence stays in one process", default=1),
    "seq_parallel_communication_data_type": unsupported("a sequence stays in one process", default="fp32"),
    "elasticity": unsupported("the batch is the recipe's, by whatever number of processes"),
    "autotuning": unsupported("it would start trainings of its own"),
    "hybrid_engine": unsupported("stages that train on their own completions generate without it"),
    "compile": unsupported("models run as they are"),
    "sparse_gradients": unsupported(NO_LONGER),
    "graph_harvesting": unsupported(NO_LONGER),
    f"{ZERO}.compute_grad_norm": unsupported("gradients are clipped by their norm", default=True),
    f"{ZERO}.elastic_checkpoint": unsupported("a checkpoint is resumed from by as many processes as wrote it"),
    f"{ZERO}.pipeline_loading_checkpoint": unsupported("Slipway says how checkpoints are read"),
    f"{ZERO}.legacy_stage1": unsupported(NO_LONGER),
    f"{ZERO}.mics_shard_size": unsupported(NO_LONGER, default=-1),
    f"{ZERO}.mics_hierarchical_params_gather": unsupported(NO_LONGER),
    f"{ZERO}.zeropp_loco_param": unsupported(NO_LONGER),
    f"{ZERO}.save_muon_momentum_buffer_in_memory": unsupported("the optimizer is AdamW"),
    f"{ZERO}.offload_optimizer.ratio": unsupported("the optimizer is PyTorch's AdamW", default=1),
    f"{ZERO}.offload_optimizer.super_offload": unsupported("the optimizer is PyTorch's AdamW"),
    f"{ZERO}.offload_optimizer.cpuadam_cores_perc": unsupported("the optimizer is PyTorch's AdamW", default=0.8),
    # Old names, and names at a wrong place.
    "bfloat16": old_name('Write "bf16": {"enabled": "auto"}: the stage\'s param precision decides it.', default=None),
    "fp32_allreduce": old_name('Write "communication_data_type": "fp32".'),
    "aio.thread_count": old_name('Write "intra_op_parallelism".', default=1),
    f"{ZERO}.cpu_offload": old_name('Write "offload_optimizer": {"device": "cpu"}.'),
    f"{ZERO}.cpu_offload_param": old_name('Write "offload_param": {"device": "cpu"}.'),
    f"{ZERO}.cpu_offload_use_pin_memory": old_name('Write "pin_memory": true in offload_optimizer and offload_param.'),
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": old_name('Write "stage3_gather_16bit_weights_on_model_save".'),
    f"{ZERO}.aio": Refused("stands at the wrong place", 'Write "aio" beside zero_optimization, not in it.'),
}
"""Dotted field -> why no layout may use it, and what to do instead. A value that switches it off is no use, and left out."""

FITTED = (
    f"{ZERO}.reduce_bucket_size",
    f"{ZERO}.stage3_prefetch_bucket_size",
    f"{ZERO}.stage3_param_persistence_threshold",
)
"""Fields whose "auto" is a size that follows the model's width: `fit_to_width` of layouts.py."""

FIELDS = {*KEPT, *SET, *MATCHED, f"{ZERO}.stage"}
BLOCKS = {field[:index] for field in FIELDS for index, letter in enumerate(field) if letter == "."}
"""Dotted names of the mappings that are looked into."""
