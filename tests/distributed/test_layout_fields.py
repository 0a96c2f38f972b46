"""The tables of what a memory layout may say, held to the DeepSpeed that is installed; and layouts of one's own, trained with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.training.layout_fields import BLOCKS, FIELDS, KEPT, NOTHING, REFUSED, SET, ZERO
from tests.distributed.test_training_library import context, run

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's own use of torch.
    pytest.mark.filterwarnings("ignore:`?torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed.*"),
]

SAMPLES = {
    "true or false": True,
    "a whole number": 8,
    "a whole number above 0": 8,
    "a number above 0": 8,
    "a number": 0.5,
}
SAMPLES |= {"a text": "x", "a list of texts": ["x"]}
"""Of each kind of value that a field may have, one."""

WRITTEN_OUT = {"fp32_allreduce"}
"""What this DeepSpeed does not read: an old name."""
READ_IN_A_GROUP = {"sequence_parallel_size"}
"""What it reads where a group of processes is there, as another test of this process may have made one."""


@pytest.fixture(autouse=True, scope="module")
def environment_as_it_was() -> Iterator[None]:
    """A group of one writes its rank into the environment, which processes that other tests start would inherit; and where
    another test has made the group, DeepSpeed looks for it there."""
    import deepspeed

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    if torch.distributed.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    yield
    deepspeed.comm.configure(enabled=False)  # its log, which outlives the engine
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class Watched(dict[str, Any]):
    """A mapping that knows which names it was asked for."""

    def __init__(self, *pairs: Any, **values: Any) -> None:
        super().__init__(*pairs, **values)
        self.asked: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return Names(self)

    def __copy__(self) -> Watched:
        return self


class Names:
    """Of a `Watched` mapping: to look for a name among these is to ask for it."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __contains__(self, name: object) -> bool:
        return name in self.watched

    def __iter__(self) -> Iterator[str]:
        return iter(self.watched)


def fields_within(block: str) -> set[str]:
    """The names directly within a block that the tables know."""
    start = f"{block}." if block else ""
    names = {each.removeprefix(start) for each in {*FIELDS, *BLOCKS, *REFUSED} if each.startswith(start)}
    return {name for name in names if "." not in name}


def names_of(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_the_tables_know_all_that_deepspeed_reads() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    aio, profiler = Watched(block_size=8), Watched(enabled=False)
    config = Watched(train_batch_size=1, aio=aio, flops_profiler=profiler)
    DeepSpeedConfig(config)
    assert len(config.asked) > 50, "or it is asked in another way"
    assert config.asked - fields_within("") == set()
    assert fields_within("") - config.asked - READ_IN_A_GROUP == WRITTEN_OUT
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert aio.asked == fields_within("aio") - {"thread_count"}
    assert profiler.asked == fields_within("flops_profiler")


def test_the_tables_know_every_field_of_the_blocks() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    blocks = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        f"{ZERO}.offload_param": DeepSpeedZeroOffloadParamConfig,
        f"{ZERO}.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        f"{ZERO}.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
    }
    for block, model in blocks.items():
        assert fields_within(block) == names_of(model), block
    assert fields_within(ZERO) == names_of(DeepSpeedZeroConfig) | set(_REMOVED_ZERO_CONFIG_KEYS) | {"aio"}
    off = {f"{ZERO}.{field.alias or name}": field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for block in ("bf16", "fp16", f"{ZERO}.offload_optimizer"):
        off |= {f"{block}.{name}": field.default for name, field in blocks[block].model_fields.items()}
    for field in set(off) & set(REFUSED):
        default = REFUSED[field].default
        assert off[field] in ((False, None) if default is NOTHING else (default,)), field


def nested(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field, value in fields:
        *parents, name = field.split(".")
        block = made
        for parent in parents:
            block = block.setdefault(parent, {})
        block[name] = value
    return made


@pytest.mark.parametrize("number", [8, 8.0])
def test_deepspeed_takes_every_field_that_is_kept(number: float) -> None:
    """With a value of the kind that the table says; JSON has 5e8 for 500000000."""
    from deepspeed.runtime.config import DeepSpeedConfig

    samples = {words: number if sample == 8 and sample is not True else sample for words, sample in SAMPLES.items()}
    values = {
        field: samples[each.words] if each.words in samples else each.words.split('"')[1]
        for field, each in KEPT.items()
    }
    values["aio.use_gds"] = False  # for which DeepSpeed wants a GPU
    made = nested([("train_batch_size", 1), (f"{ZERO}.stage", 3), *values.items()])
    config = DeepSpeedConfig(made)
    assert config.zero_config.sub_group_size == 8
    assert config.zero_config.offload_param.buffer_count == 8
    assert config.flops_profiler_config.profile_step == 8
    assert set(SET) & set(values) == set()


OWN: dict[str, dict[str, Any]] = {
    "documented zero2": {
        ZERO: {
            "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
            "allgather_bucket_size": 5e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 5e6,
            "contiguous_gradients": True, "round_robin_gradients": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "communication_data_type": "fp32",
    },
    "documented zero3": {
        ZERO: {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
            "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    "all that is off": {
        ZERO: {"stage": 1, "offload_param": {"device": "none"}, "cpu_offload": False, "legacy_stage1": None},
        "amp": {"enabled": False}, "curriculum_learning": {"enabled": False}, "sparse_gradients": False, "optimizer": None,
        "nebula": {"enabled": False}, "elasticity": {"enabled": False}, "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
        "steps_per_print": "auto",
    },
    "zero2 otherwise": {
        ZERO: {
            "stage": 2, "contiguous_gradients": False, "reduce_scatter": False, "use_multi_rank_bucket_allreduce": False,
            "allgather_partitions": False, "parameter_alignment": True, "reduce_bucket_size": 5000,
            "allgather_bucket_size": 5000, "ignore_unused_parameters": False,
        },
    },
    "zero3 otherwise": {
        ZERO: {
            "stage": 3, "contiguous_gradients": False, "reduce_scatter": False, "sub_group_size": 1000,
            "stage3_use_all_reduce_for_fetch_params": True, "stage3_module_granularity_threshold": 100,
            "memory_efficient_linear": False, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 5000,
            "enable_sanity_checks": True, "leaf_module": {"names": ["mlp"]},
            "stage3_gather_16bit_weights_on_model_save": False,
        },
    },
    "all that is logged": {
        ZERO: {"stage": 2}, "wall_clock_breakdown": True, "steps_per_print": 1, "dump_state": True,
        "comms_logger": {"enabled": True, "verbose": True}, "flops_profiler": {"enabled": True, "profile_step": 1},
        "csv_monitor": {"enabled": True, "output_path": "OUTPUT", "job_name": "job"}, "vocabulary_size": 383,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_layout_of_ones_own_trains_what_the_packaged_one_trains(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    own = json.loads(json.dumps(OWN[name]).replace("OUTPUT", str(tmp_path / "logged")))
    (tmp_path / "own.json").write_text(json.dumps(own), encoding="utf-8")
    made = []
    for layout in (str(tmp_path / "own.json"), f"zero{own[ZERO]['stage']}"):
        ctx = context(tmp_path / Path(layout).stem, deepspeed=layout)
        run(ctx, max_steps=3)
        made.append(load_file(ctx.out / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    for weight, value in made[0].items():
        assert torch.allclose(value, made[1][weight], atol=1e-5), weight
    assert (tmp_path / "logged").exists() == ("csv_monitor" in own)
