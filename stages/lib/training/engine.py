"""None"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ArtifactError, Problem
from pipeline.stage import Context
from stages.lib.models.loading import DTYPES
from stages.lib.processes.collectives import barrier
from stages.lib.training.layouts import zero_stage_of
from stages.lib.training.params import OptimizerParams

PLAIN_STATE = "engine.pt"


TAG = "engine"
"""The folder of DeepSpeed's files in a checkpoint."""


def freeze(model: nn.Module, layout: Mapping[str, Any] | None, precision: str, device: torch.device) -> nn.Module:
    """The model ready for inference only; split over the processes if it was loaded under ZeRO-3."""
    model.requires_grad_(False).eval()
    if zero_stage_of(layout) != 3:
        return model.to(device, DTYPES[precision] if layout is not None else torch.float32)
    import deepspeed

    inference = copy.deepcopy(dict(layout or {}))
    inference["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=inference)
    engine.eval()  # returns nothing
    return engine


class Engine:
    """`module` in training. Parameters that do not require gradients are neither stepped nor saved."""

    def __init__(
        self,
        ctx: Context,
        module: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        params: OptimizerParams,
        layout: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.ctx = ctx
        self.module = module
        self.device = device
        self.layout = layout
        self.max_gradient_norm = params.max_gradient_norm
        self.autocast_dtype = DTYPES[params.precision] if layout is None and params.precision != "fp32" else None
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=params.learning_rate,
            betas=(params.adam_beta1, params.adam_beta2),
            eps=params.adam_epsilon,
        )
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if layout is not None:
            import deepspeed

            self.wrapped, self.optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=dict(layout)
            )
        else:
            module.to(device)
            self.optimizer = optimizer
            together = ctx.world.size > 1
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(module, device_ids=ids) if together else module

    def rounding(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of `precision`, where the weights themselves are not rounded to it."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The module's forward pass, in training: gradients will flow."""
        with self.rounding():
            return self.wrapped(*arguments, **options)

    @torch.no_grad()
    def infer(self, *arguments: Any, **options: Any) -> Any:
        """The module's forward pass without gradients. Under ZeRO-3 all processes must call it together."""
        with self.rounding():
            return (self.wrapped if self.layout is not None else self.module)(*arguments, **options)

    def backward(self, make_loss: Callable[[], Tensor], *, last: bool) -> None:
        """Adds the gradients of `make_loss()`, which does the forward pass. `last`: no more follow before the step."""
        if self.layout is not None:
            self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
            self.wrapped.backward(make_loss(), scale_wrt_gas=False)
            return
        alone = isinstance(self.wrapped, DistributedDataParallel) and not last
        with self.wrapped.no_sync() if alone else contextlib.nullcontext():
            make_loss().backward()

    def step(self, learning_rates: Sequence[float]) -> float:
        """One step of the optimizer with a learning rate per group; returns the gradients' L2 norm before clipping."""
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self.layout is not None:
            self.wrapped.step()
            norm = self.wrapped.get_global_grad_norm()
            return float(norm) if norm is not None else 0.0
        norm = nn.utils.clip_grad_norm_(self.trainable, self.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, folder: Path) -> None:
        """Writes what is trained, and the optimizer's state. All processes call it."""
        if self.layout is not None:
            self.wrapped.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
        elif self.ctx.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
            torch.save({"module": state, "optimizer": self.optimizer.state_dict()}, folder / PLAIN_STATE)
        barrier()

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises `ArtifactError` if it is not of this module."""
        if self.layout is not None:
            # Not strict: frozen parameters are not in the checkpoint. That all others are is checked by their number.
            path, _ = self.wrapped.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
            )
            if path is None:
                raise ArtifactError(Problem(str(folder), "DeepSpeed finds no checkpoint in it", "Remove it."))
            return
        saved = torch.load(folder / PLAIN_STATE, map_location=self.device, weights_only=True)
        names = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        if set(saved["module"]) != names:
            missing = ", ".join(sorted(names ^ set(saved["module"]))[:3])
            raise ArtifactError(Problem(str(folder), f"is of another model: {missing}", "Remove it."))
        self.module.load_state_dict(saved["module"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])

    def state_of(self, part: nn.Module) -> dict[str, Tensor]:
        """Name -> whole weight of a part of the module, on the CPU, on the main process; {} on the others.

        Under ZeRO-3 one weight after the other is gathered, so that no device ever holds all of them.
        """
        state = {}
        self.release()
        for name, parameter in part.named_parameters():
            with self.whole([parameter]):
                if self.ctx.world.is_main:
                    state[name] = parameter.detach().to("cpu", copy=True)
        if self.ctx.world.is_main:
            state |= {
                name: b.detach().cpu() for name, b in part.state_dict().items() if name in dict(part.named_buffers())
            }
        return state

    def copy_weights(self, part: nn.Module, replica: nn.Module) -> None:
        """Makes the weights of `replica` those of `part`, in every process. Under ZeRO-3 all of them call it together."""
        targets = dict(replica.named_parameters())
        self.release()
        for name, parameter in part.named_parameters():
            with self.whole([parameter]), torch.no_grad():
                targets[name].copy_(parameter)

    def release(self) -> None:
        """Takes back what ZeRO-3 has begun to gather for a forward pass that does not come."""
        if zero_stage_of(self.layout) == 3:
            self.wrapped.empty_partition_cache()

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Within it the parameters are whole in every process."""
        if zero_stage_of(self.layout) != 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
