"""A checkpoint of any memory layout as whole weights and moments by name: files are mapped, and a tensor is put together when asked for.

How ZeRO lays a parameter into its flat tensors is what DeepSpeed's own converter to universal checkpoints goes by
(deepspeed/checkpoint/ds_to_universal.py): of ZeRO-1 and 2 each rank says which pieces it has, of ZeRO-3 each has an equal part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from pipeline.store.resumable import Saved
from stages.lib.training.engine import PLAIN_STATE, TAG
from stages.lib.training.saved_form import MOMENTS


@dataclass
class Pieces:
    """A tensor that lies in flat pieces, one after the other."""

    shape: Size
    parts: list[Tensor] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return sum(part.numel() for part in self.parts) == self.shape.numel()

    def tensor(self) -> Tensor:
        """The whole, in float32."""
        return torch.cat([part.reshape(-1).float() for part in self.parts]).reshape(self.shape)


@dataclass
class SteppedParameter:
    """A parameter that an AdamW steps."""

    weight: Pieces
    moments: dict[str, Pieces]
    """Name -> moment; nothing lies in them before the first step."""
    steps: float = 0.0
    """How many the optimizer has made."""

    @classmethod
    def of_shape(cls, shape: Size) -> SteppedParameter:
        return cls(Pieces(shape), {name: Pieces(shape) for name in MOMENTS})

    def add(self, weight: Tensor, state: Mapping[str, Any], cut: Callable[[Tensor], Tensor]) -> None:
        """Takes the next piece: `cut` of a flat weight, and of what an optimizer keeps beside it."""
        self.weight.parts.append(cut(weight))
        if state:
            self.steps = float(state["step"])
            for name, pieces in self.moments.items():
                pieces.parts.append(cut(state[name]))

    def problem(self) -> str:
        """What is missing; "" if nothing is."""
        if not self.weight.is_whole:
            return "is not there as a whole"
        begun = [pieces for pieces in self.moments.values() if pieces.parts]
        return "" if all(pieces.is_whole for pieces in begun) else "has moments that are not there as a whole"


@dataclass
class WholeState:
    """What a checkpoint holds beside our own part of it."""

    stepped: dict[str, SteppedParameter]
    buffers: dict[str, Tensor]
    scale: float | None
    """Of the loss in fp16, where it is scaled."""


def read_whole_state(folder: Path, saved: Saved, names: Sequence[str], buffers: Collection[str]) -> WholeState:
    """Whole tensors of a checkpoint that says `saved` of itself.

    `names` are the parameters in the order in which the optimizer steps them without DeepSpeed, `buffers` those that belong to
    the module's state. Raises what reading a file raises where it is not what training writes.
    """
    if not saved.zero_stage:
        return read_plain(folder, names, buffers)
    processes = saved.world_size or 1
    split = "zero_pp_rank_{}_" if saved.zero_stage == 3 else ""
    models = [f"{split.format(rank)}mp_rank_00_model_states.pt" for rank in range(processes if split else 1)]
    model = load(folder / TAG / models[0])
    optimizers = [load_part(folder / TAG, rank) for rank in range(processes)]
    stepped = read_equal_parts(model, optimizers) if split else read_said_pieces(model, optimizers)
    module = model["module"]
    scaler = optimizers[0].get("loss_scaler")
    return WholeState(stepped, {name: module[name] for name in buffers}, getattr(scaler, "cur_scale", None))


def load(path: Path) -> Any:
    from stages.lib.training.deepspeed_files import load_data

    return load_data(path, mmap=True)


def load_part(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank has written of DeepSpeed's optimizer."""
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # in bf16 its name begins so
    part: dict[str, Any] = load(path)["optimizer_state_dict"]
    return part


def read_plain(folder: Path, names: Sequence[str], buffers: Collection[str]) -> WholeState:
    """Of a checkpoint without DeepSpeed."""
    saved = load(folder / PLAIN_STATE)
    module, optimizer = saved["module"], saved["optimizer"]
    ids = [each for group in optimizer["param_groups"] for each in group["params"]]
    stepped = {}
    for name, number in zip(names, ids, strict=True):
        stepped[name] = SteppedParameter.of_shape(module[name].shape)
        stepped[name].add(module[name], optimizer["state"].get(number, {}), lambda tensor: tensor)
    scale = saved["scaler"].get("scale") if "scaler" in saved else None
    return WholeState(stepped, {name: module[name] for name in buffers}, scale)


def read_said_pieces(model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, SteppedParameter]:
    """Of ZeRO-1 and 2: each rank has a stretch of each group's flat tensor, and says where in it a parameter lies."""
    stepped: dict[str, SteppedParameter] = {}
    for part in optimizers:
        states = part["base_optimizer_state"]["state"]
        flats = part["single_partition_of_fp32_groups"]
        for number, (flat, places) in enumerate(zip(flats, part["param_slice_mappings"], strict=True)):
            for name, place in places.items():
                of_name = stepped.setdefault(name, SteppedParameter.of_shape(model["module"][name].shape))
                of_name.add(flat, states.get(number, {}), cutter(place.start, place.numel))
    return stepped


def read_equal_parts(model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, SteppedParameter]:
    """Of ZeRO-3: each rank has an equal part of each parameter, the last ones filled up with zeros."""
    stepped: dict[str, SteppedParameter] = {}
    for rank, part in enumerate(optimizers):
        states = part["optimizer_state_dict"]["state"]
        for number, (flat, shapes) in enumerate(zip(part["fp32_flat_groups"], model["param_shapes"], strict=True)):
            for name, shape, offset, size in laid_out(shapes, len(optimizers)):
                held = max(0, min(size, shape.numel() - rank * size))
                of_name = stepped.setdefault(name, SteppedParameter.of_shape(shape))
                of_name.add(flat, states.get(number, {}), cutter(offset, held))
    return stepped


def laid_out(shapes: Mapping[str, Size], processes: int) -> Iterator[tuple[str, Size, int, int]]:
    """Name, shape, offset in the flat tensor of a rank, and size of a part, of each parameter."""
    offset = 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // processes)
        yield name, shape, offset, size
        offset += size


def cutter(start: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda flat: flat.narrow(0, start, size)
