"""A checkpoint of other processes, or of another memory layout, loaded: weights, moments and step counts become those of this
engine, a tensor at a time. What follows is what would have followed within rounding, for sums are taken in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import pad

from pipeline.store.resumable import read_saved
from stages.lib.models.adapters.gathering import gathered
from stages.lib.processes.collectives import barrier
from stages.lib.training.engine import Engine
from stages.lib.training.layouts import zero_stage_of
from stages.lib.training.saved_form import MOMENTS, Weights, weights_problem
from stages.lib.training.whole_state import SteppedParameter, WholeState, read_whole_state


def is_spread_alike(engine: Engine, folder: Path) -> bool:
    """Whether the engine can read the files of a checkpoint as they are."""
    saved, stage = read_saved(folder), zero_stage_of(engine.layout)
    return saved.zero_stage == stage and (not stage or saved.world_size == engine.ctx.world.size)


def whole_state_of(engine: Engine, folder: Path) -> WholeState:
    return read_whole_state(folder, read_saved(folder), engine.stepped, buffers_of(engine))


def buffers_of(engine: Engine) -> dict[str, Tensor]:
    """Name -> buffer that belongs to the module's state."""
    buffers = {name for name, _ in engine.module.named_buffers()}
    return {name: tensor for name, tensor in engine.module.state_dict().items() if name in buffers}


def whole_shape(parameter: nn.Parameter) -> Size:
    """That of a parameter, of which ZeRO-3 may keep a part in every process."""
    return Size(getattr(parameter, "ds_shape", parameter.shape))


def conversion_problem(engine: Engine, folder: Path) -> str:
    """Why a checkpoint cannot be made that of this engine; "" if it can. Raises what reading a file raises."""
    whole = whole_state_of(engine, folder)
    parameters = dict(engine.module.named_parameters())
    wanted = Weights((name, whole_shape(parameters[name])) for name in engine.stepped)
    wanted |= {name: buffer.shape for name, buffer in buffers_of(engine).items()}
    examples = {name: torch.empty(each.weight.shape, device="meta") for name, each in whole.stepped.items()}
    if problem := weights_problem({**examples, **whole.buffers}, wanted, "weights"):
        return problem
    if not engine.in_fp16 and not any(has_moments(each) for each in whole.stepped.values()):
        return "the optimizer's state is empty"
    return next((f"{name} {problem}" for name, each in whole.stepped.items() if (problem := each.problem())), "")


@torch.no_grad()
def load_converted(engine: Engine, folder: Path) -> None:
    """Makes weights, moments, counts of steps, buffers and the scale of the loss those of the checkpoint.

    All processes call it together.
    """
    whole, steps = whole_state_of(engine, folder), read_saved(folder).step or 0
    engine.module.load_state_dict(whole.buffers, strict=False)
    write = {0: write_plainly, 3: write_equal_parts}.get(zero_stage_of(engine.layout), write_pieces)
    write(engine, whole)
    if engine.layout is not None:
        engine.wrapped.global_steps = steps
    if whole.scale is not None and engine.scaler.is_enabled():
        engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": whole.scale, "_growth_tracker": 0})
    elif whole.scale is not None and getattr(engine.optimizer, "dynamic_loss_scale", False):
        engine.optimizer.loss_scaler.cur_scale = whole.scale
    barrier()


def write_plainly(engine: Engine, whole: WholeState) -> None:
    for name, parameter in engine.module.named_parameters():
        if (saved := whole.stepped.get(name)) is None:
            continue
        parameter.copy_(saved.weight.tensor())
        engine.optimizer.state.pop(parameter, None)
        if saved.steps:
            moments = {each: pieces.tensor().to(parameter.device) for each, pieces in saved.moments.items()}
            engine.optimizer.state[parameter] = {"step": torch.tensor(saved.steps), **moments}


def write_pieces(engine: Engine, whole: WholeState) -> None:
    """Into the stretches of flat tensors that ZeRO-1 or 2 has in this process."""
    states = flat_states(engine, [group["params"][0] for group in engine.optimizer.optimizer.param_groups])
    parameters = dict(engine.module.named_parameters())
    for name, saved in whole.stepped.items():
        parameter = parameters[name]
        weight = saved.weight.tensor()
        parameter.copy_(weight)
        here = parameter._hp_mapping
        if here is None:
            continue  # all of it lies in other processes
        parameter.set_full_hp_param(weight)
        state, taken = states[here.param_group_index], here.lp_fragment_address
        for each, moment in tensors_of(saved).items():
            into = state[each].narrow(0, here.hp_fragment_address.start, here.hp_fragment_address.numel)
            into.copy_(moment.flatten().narrow(0, taken.start, taken.numel))
        state["step"].fill_(max(float(state["step"]), saved.steps))


def write_equal_parts(engine: Engine, whole: WholeState) -> None:
    """Into the parts that ZeRO-3 has in this process."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    engine.release()
    states = flat_states(engine, engine.optimizer.fp32_partitioned_groups_flat)
    parameters = dict(engine.module.named_parameters())
    for name, saved in whole.stepped.items():
        parameter = parameters[name]
        weight = saved.weight.tensor()
        with gathered([parameter], writing=True):
            if engine.ctx.world.is_main:
                parameter.copy_(weight)
        safe_set_local_fp32_param(parameter, own_part(engine, parameter, weight))
        for each, moment in tensors_of(saved).items():
            safe_set_local_optimizer_state(parameter, own_part(engine, parameter, moment), each)
        group, *_ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        states[group]["step"].fill_(max(float(states[group]["step"]), saved.steps))


def has_moments(saved: SteppedParameter) -> bool:
    """Whether there are moments: every step leaves some, but for one in fp16 that was left out."""
    return any(pieces.parts for pieces in saved.moments.values())


def tensors_of(saved: SteppedParameter) -> dict[str, Tensor]:
    """Name -> whole moment; nothing before the first step."""
    return {name: pieces.tensor() for name, pieces in saved.moments.items() if pieces.parts}


def own_part(engine: Engine, parameter: Any, whole: Tensor) -> Tensor:
    """The part of a tensor that this process has of the parameter, filled up with zeros."""
    size, flat = parameter.ds_tensor.numel(), whole.flatten()
    filled = pad(flat, (0, max(0, size * engine.ctx.world.size - flat.numel())))
    return filled.narrow(0, size * engine.ctx.world.rank, size)


def flat_states(engine: Engine, flats: list[Tensor]) -> list[dict[str, Tensor]]:
    """What AdamW keeps of each flat tensor that it steps: as before the first step, which has not been made here."""
    states = []
    for flat in flats:
        states.append({"step": torch.tensor(0.0), **{name: torch.zeros_like(flat) for name in MOMENTS}})
        engine.optimizer.optimizer.state[flat] = states[-1]
    return states
