"""Checkpoints of every memory layout, written here by hand, are read as the same whole weights and moments; what is none of this
model's is told before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from pipeline.store.resumable import STATE, Saved
from stages.lib.training.converting import conversion_problem, load_converted
from stages.lib.training.deepspeed_files import load_data
from stages.lib.training.engine import Engine
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import TrainingParams
from stages.lib.training.whole_state import WholeState, read_whole_state
from tests.distributed.test_training_library import context

Damage = Callable[[Path], None]
NAMES = ("linear.weight", "linear.bias")
WEIGHT, BIAS = torch.arange(1.0, 7.0).reshape(2, 3), torch.tensor([7.0, 8.0])
KINDS: dict[str, tuple[int, int]] = {"plain": (1, 0), "pieces": (2, 2), "equal parts": (2, 3)}
"""How it is written -> by how many processes, and under which ZeRO stage."""


class Tiny(nn.Module):
    """A matrix of 2 x 3, a bias, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(2))


def moments(flat: Tensor, steps: float = 5.0) -> dict[str, Tensor]:
    """Of a flat weight: a tenth of it, and a hundredth."""
    return {"step": torch.tensor(steps), "exp_avg": flat / 10, "exp_avg_sq": flat / 100}


def write_plain(folder: Path) -> None:
    optimizer = {
        "state": {0: moments(WEIGHT), 1: moments(BIAS)},
        "param_groups": [{"params": [0], "lr": 0.1}, {"params": [1], "lr": 0.1}],
    }
    module = {"linear.weight": WEIGHT, "linear.bias": BIAS, "seen": torch.ones(2)}
    torch.save({"module": module, "optimizer": optimizer}, folder / "engine.pt")


def write_pieces(folder: Path) -> None:
    """ZeRO-2 of two: a group per parameter. The first rank has four numbers of the weight, and all of the bias.

    Flat tensors are filled up to an even length for both; moments keep what they are filled with.
    """
    (folder / "engine").mkdir()
    module = {name: tensor.bfloat16() for name, tensor in zip(NAMES, (WEIGHT, BIAS), strict=True)}
    torch.save({"module": {**module, "seen": torch.ones(2)}}, folder / "engine" / "mp_rank_00_model_states.pt")
    weight, filling = WEIGHT.flatten(), torch.full((2,), 99.0)
    stretches = [(weight[:4], BIAS), (torch.cat([weight[4:], filling]), filling)]
    places = [
        [{NAMES[0]: fragment_address(4, 0)}, {NAMES[1]: fragment_address(2, 0)}],
        [{NAMES[0]: fragment_address(2, 0)}, {}],
    ]
    for rank, flats in enumerate(stretches):
        state = {
            "single_partition_of_fp32_groups": [flats[0] if rank == 0 else weight[4:], flats[1]],
            "base_optimizer_state": {"state": {number: moments(flat) for number, flat in enumerate(flats)}},
            "param_slice_mappings": places[rank],
        }
        path = folder / "engine" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)


def write_equal_parts(folder: Path) -> None:
    """ZeRO-3 of two: each has three numbers of the weight and one of the bias."""
    (folder / "engine").mkdir()
    shapes = [{NAMES[0]: WEIGHT.shape}, {NAMES[1]: BIAS.shape}]
    for rank in range(2):
        flats = [WEIGHT.flatten()[3 * rank : 3 * rank + 3], BIAS[rank : rank + 1]]
        state = {"state": {number: moments(flat) for number, flat in enumerate(flats)}}
        model = {"module": {name: torch.empty(0) for name in NAMES} | {"seen": torch.ones(2)}, "param_shapes": shapes}
        start = folder / "engine" / f"zero_pp_rank_{rank}_mp_rank_00_"
        torch.save(model, f"{start}model_states.pt")
        parts = {"fp32_flat_groups": flats, "optimizer_state_dict": state}
        torch.save({"optimizer_state_dict": parts}, f"{start}optim_states.pt")


WRITE = {"plain": write_plain, "pieces": write_pieces, "equal parts": write_equal_parts}


def write(folder: Path, kind: str) -> Saved:
    folder.mkdir(parents=True, exist_ok=True)
    WRITE[kind](folder)
    processes, stage = KINDS[kind]
    (folder / STATE).write_text(f'{{"step": 5, "world_size": {processes}, "zero_stage": {stage}}}')
    return Saved(processes, stage, step=5)


def whole(folder: Path, saved: Saved) -> WholeState:
    return read_whole_state(folder, saved, NAMES, ["seen"])


def engine_of(folder: Path, module: nn.Module) -> Engine:
    params = TrainingParams(max_steps=9, learning_rate=0.1, global_batch_size=1)
    groups, _ = parameter_groups([(module, 0.1)], 0.1)
    return Engine(context(folder / "run"), module, groups, params, None, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_holds_the_same(tmp_path: Path, kind: str) -> None:
    found = whole(tmp_path, write(tmp_path, kind))
    assert set(found.stepped) == set(NAMES)
    for name, expected in zip(NAMES, (WEIGHT, BIAS), strict=True):
        parameter = found.stepped[name]
        assert parameter.problem() == ""
        assert parameter.steps == 5
        assert torch.equal(parameter.weight.tensor(), expected)
        assert torch.equal(parameter.moments["exp_avg"].tensor(), expected / 10)
        assert torch.equal(parameter.moments["exp_avg_sq"].tensor(), expected / 100)
    assert torch.equal(found.buffers["seen"], torch.ones(2))


@pytest.mark.parametrize("kind", ["pieces", "equal parts"])
def test_it_becomes_that_of_an_engine(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    engine = engine_of(tmp_path, Tiny())
    assert conversion_problem(engine, tmp_path) == ""
    load_converted(engine, tmp_path)
    linear, state = engine.module.linear, engine.optimizer.state
    assert torch.equal(linear.weight, WEIGHT) and torch.equal(linear.bias, BIAS)
    assert torch.equal(engine.module.seen, torch.ones(2))
    for parameter, expected in ((linear.weight, WEIGHT), (linear.bias, BIAS)):
        assert float(state[parameter]["step"]) == 5
        assert torch.equal(state[parameter]["exp_avg"], expected / 10)
        assert torch.equal(state[parameter]["exp_avg_sq"], expected / 100)


def edited(name: str, edit: Callable[[Any], None]) -> Damage:
    """Damage to what a file of DeepSpeed's holds."""

    def damage(folder: Path) -> None:
        path = folder / "engine" / name
        content = load_data(path)
        edit(content)
        torch.save(content, path)

    return damage


def without_moment(content: Any) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"].pop(0)


def cut_short(content: Any) -> None:
    content["optimizer_state_dict"]["param_slice_mappings"][0] = {}


def of_another(content: Any) -> None:
    content["param_shapes"][0] = {"other.weight": WEIGHT.shape}


def of_another_shape(content: Any) -> None:
    content["param_shapes"][0] = {NAMES[0]: torch.Size([3, 2])}


RANK_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("kind", "damage", "reason"),
    [
        ("pieces", edited(RANK_1, without_moment), "linear.weight has moments that are not there as a whole"),
        ("pieces", edited(RANK_1, cut_short), "linear.weight is not there as a whole"),
        ("equal parts", edited(MODEL, of_another), "weights.linear.weight is missing"),
        (
            "equal parts",
            edited(MODEL, of_another_shape),
            "weights.linear.weight has the shape [3, 2] instead of [2, 3]",
        ),
    ],
)
def test_what_is_not_this_model_s_is_told(tmp_path: Path, kind: str, damage: Damage, reason: str) -> None:
    write(tmp_path, kind)
    damage(tmp_path)
    engine = engine_of(tmp_path, Tiny())
    before = engine.module.linear.weight.clone()
    assert conversion_problem(engine, tmp_path) == reason
    assert torch.equal(engine.module.linear.weight, before)


def test_there_are_no_moments_only_where_every_step_in_fp16_was_left_out(tmp_path: Path) -> None:
    write(tmp_path, "plain")
    content = torch.load(tmp_path / "engine.pt")
    content["optimizer"]["state"] = {}
    torch.save(content, tmp_path / "engine.pt")
    engine = engine_of(tmp_path, Tiny())
    assert conversion_problem(engine, tmp_path) == "the optimizer's state is empty"
    engine.in_fp16 = True
    assert conversion_problem(engine, tmp_path) == ""
    load_converted(engine, tmp_path)
    assert torch.equal(engine.module.linear.weight, WEIGHT)
    assert not engine.optimizer.state
