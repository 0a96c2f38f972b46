"""From a checkpoint that was found to one that is loaded: one that does not hold what the engine writes is passed over.

All of it is looked at before anything of the engine is changed, and all processes take the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Size

from pipeline.errors import ArtifactError, Problem
from pipeline.stage import Context
from pipeline.store.checkpoints import PREFIX
from pipeline.store.resumable import converted, read_saved
from stages.lib.processes.collectives import from_all, from_main
from stages.lib.training.converting import conversion_problem, is_spread_alike, load_converted
from stages.lib.training.engine import PLAIN_STATE, TAG, Engine
from stages.lib.training.layouts import spread_of_run, zero_stage_of
from stages.lib.training.saved_form import SteppedTensors, Weights, content_problem
from stages.lib.training.state import UNREADABLE, Saved, cannot_be_extended, read_state, start_over

NOT_READ = ("param_alignment_paddings", "param_slice_mappings", "universal_checkpoint_info")
"""What DeepSpeed's optimizers write, and are loaded without."""

Unfit = Mapping[int, str]
"""Step -> why its checkpoint cannot be loaded."""


def load_saved(engine: Engine, saved: Saved | None, find: Callable[[Unfit], Saved | None]) -> Saved | None:
    """The checkpoint that was loaded into the engine: `saved`, or what `find` comes upon without those that do not fit.

    None where there is none: the engine is as it was made. Raises `ArtifactError` where it is that of another training.
    """
    unfit: dict[int, str] = {}
    while saved is not None and (reason := why_unfit(engine, saved)):
        if saved.extended:
            raise cannot_be_extended(saved.folder, reason)
        unfit |= {**saved.passed_over, saved.state["step"]: reason}
        saved = find(unfit)
    if saved is not None:
        load_into(engine, saved.folder)
        if changed := converted(read_saved(saved.folder), spread_of_run(engine.ctx)):
            engine.ctx.journal.note(f"{saved.folder.name} was {changed}")
    return saved


def load_into(engine: Engine, folder: Path) -> None:
    """Reads a checkpoint of any processes and memory layout. All processes call it together."""
    if is_spread_alike(engine, folder):
        engine.load(folder)
    else:
        load_converted(engine, folder)


def load_weights_of(ctx: Context, engine: Engine, step: int) -> dict[str, Any]:
    """Brings back the weights of an earlier step, whose checkpoint was kept; returns our part of it.

    Raises `ArtifactError` where it is damaged. All processes call it together.
    """
    folder = ctx.checkpoints.path(step)
    found = from_main(lambda: ctx.checkpoints.own_problems(step))
    found = found or list(filter(None, [files_problem(engine, folder)]))
    if found:
        what = f"holds the best weights, and cannot be used: {'; '.join(found[:3])}"
        raise ArtifactError(Problem(str(folder), what, start_over(ctx)))
    load_into(engine, folder)
    state: dict[str, Any] = from_main(lambda: read_state(folder))
    return state


def why_unfit(engine: Engine, saved: Saved) -> str:
    """Why the engine cannot be loaded from the checkpoint and those that it needs, the same in all processes; "" if it can."""
    if problem := files_problem(engine, saved.folder):
        return problem
    for step in () if saved.extended else read_saved(saved.folder).needs:
        if problem := files_problem(engine, saved.folder.with_name(f"{PREFIX}{step}")):
            return f"it needs {PREFIX}{step}: {problem}"
    return ""


def files_problem(engine: Engine, folder: Path) -> str:
    """What is wrong with a file that some process would load; "" if nothing is. All processes call it together."""
    return next(filter(None, from_all(own_files_problem(engine, folder))), "")


def own_files_problem(engine: Engine, folder: Path) -> str:
    """The same of those that this process would load. Nothing that stands in them is run."""
    from stages.lib.training.deepspeed_files import load_data

    if not is_spread_alike(engine, folder):
        try:
            return conversion_problem(engine, folder)
        except UNREADABLE as error:
            return f"it cannot be read ({type(error).__name__})"
    wanted = wanted_split(engine) if engine.layout is not None else wanted_plainly(engine)
    for name, content in wanted.items():
        try:
            saved = load_data(folder / name, mmap=True)
        except UNREADABLE as error:
            return f"{name} cannot be read ({type(error).__name__})"
        if problem := content_problem(saved, content):
            return f"{name} is not what training writes: {problem}"
    return ""


def wanted_plainly(engine: Engine) -> dict[str, dict[str, Any]]:
    """Name of a file -> an example of what is in it."""
    weights = Weights((name, tensor.shape) for name, tensor in engine.own_state().items())
    content: dict[str, Any] = {"module": weights, "optimizer": stepped_by(engine, engine.optimizer.state_dict())}
    return {PLAIN_STATE: content | ({"scaler": engine.scaler.state_dict()} if engine.scaler.is_enabled() else {})}


def wanted_split(engine: Engine) -> dict[str, dict[str, Any]]:
    """The same of the files that DeepSpeed reads in this process."""
    stage, rank = zero_stage_of(engine.layout), engine.ctx.world.rank
    parts = {name for name, p in engine.module.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    whole = engine.wrapped.module_state_dict(exclude_frozen_parameters=True)
    # Of a weight that ZeRO-3 has split no part stands here: all are in the optimizer's file.
    weights = Weights((name, Size([0]) if name in parts else tensor.shape) for name, tensor in whole.items())
    content: dict[str, Any] = {"module": weights}
    content |= dict.fromkeys(("dp_world_size", "mp_world_size", "global_steps", "skipped_steps"), 0)
    split = f"zero_pp_rank_{rank}_"
    model_file = f"{TAG}/{split if stage == 3 else ''}mp_rank_00_model_states.pt"
    if stage == 0:
        return {model_file: content | {"optimizer": optimizer_example(engine)}}
    if engine.wrapped.zero_nvme_offload_optimizer():
        return {model_file: content}  # the rest are copies of files on that disk
    prefix = "bf16_" if engine.wrapped.bfloat16_enabled() else ""
    optimizer_file = f"{TAG}/{prefix}{split}mp_rank_00_optim_states.pt"
    return {model_file: content, optimizer_file: {"optimizer_state_dict": optimizer_example(engine)}}


def optimizer_example(engine: Engine) -> Any:
    """An example of what DeepSpeed saves of the optimizer: its state, or that within the state of what is around it."""
    state = engine.optimizer.state_dict()
    if "param_groups" in state:
        return stepped_by(engine, state)
    return {
        key: stepped_by(engine, value, state) if isinstance(value, Mapping) and "param_groups" in value else value
        for key, value in state.items()
        if key not in NOT_READ
    }


def stepped_by(engine: Engine, state: Mapping[str, Any], around: Mapping[str, Any] | None = None) -> SteppedTensors:
    """What an optimizer with this state steps."""
    tensors = [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    tensors = tensors or (around or {}).get("fp32_flat_groups", [])  # ZeRO-3 takes them out between two steps
    groups = tuple(len(group["params"]) for group in state["param_groups"])
    return SteppedTensors(groups, tuple(tensor.shape for tensor in tensors), from_the_first=not engine.in_fp16)
