"""One module in training, whatever the memory layout: forward, backward, step, save, load, and its whole weights.

With a layout of ds_configs/ this is a DeepSpeed engine, otherwise PyTorch's data parallelism; both average gradients over
the processes, so a loss that is to be a sum is multiplied by their number.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ArtifactError, Problem
from pipeline.stage import Context
from stages.lib.models.loading import DTYPES
from stages.lib.processes.collectives import barrier, from_main
from stages.lib.training.layouts import zero_stage_of
from stages.lib.training.optimizer import Groups, make_optimizer
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


def round_forward(module: nn.Module, rounding: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    """Has the module's forward pass, and nothing around it, run within `rounding()`."""
    entered: list[contextlib.AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        entered.append(rounding())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def loss_with_companion(make_loss: Callable[[], Tensor], companion: Companion) -> Tensor:
    """A loss, and what its companion adds to that of the step."""
    loss = make_loss()
    return loss + companion.penalty().to(loss.device)


class Stepped(NamedTuple):
    """How a step of the optimizer went."""

    gradient_norm: float
    """The gradients' L2 norm before clipping; infinite or NaN where they are not finite."""
    taken: bool
    """Whether the weights were changed. They never are by gradients that are not finite."""


class Companion(Protocol):
    """What goes along with the steps of a training. What it remembers are buffers of the module, which are in checkpoints."""

    @property
    def watched(self) -> Sequence[nn.Parameter]:
        """The parameters whose gradients it wants."""

    @property
    def zeroed(self) -> Sequence[nn.Parameter]:
        """The parameters in which `follow` may write zeros."""

    def penalty(self) -> Tensor:
        """What is added to a step's loss, once; the same in every process."""

    def follow(self, gradients: Sequence[Tensor]) -> None:
        """Called after each step that was taken, with the whole gradients of `watched`, averaged and clipped."""

    def told(self) -> dict[str, float]:
        """What a line of the journal says of it."""


class Engine:
    """`module` in training. Parameters that do not require gradients are neither stepped nor saved."""

    def __init__(
        self,
        ctx: Context,
        module: nn.Module,
        groups: Groups,
        params: OptimizerParams,
        layout: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.ctx = ctx
        self.module = module
        self.device = device
        self.layout = layout
        self.max_gradient_norm = params.max_gradient_norm
        self.companion: Companion | None = None
        self.in_fp16 = params.precision == "fp16"
        self.autocast_dtype = DTYPES[params.precision] if layout is None and params.precision != "fp32" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast_dtype is torch.float16)
        if self.autocast_dtype is not None:
            round_forward(module, self.rounding)
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.stepped = [names[parameter] for group in groups for parameter in group["params"]]
        optimizer = make_optimizer(groups, params)
        if layout is not None:
            self.wrapped, self.optimizer = self.split(module, optimizer, layout)
        else:
            module.to(device)
            self.optimizer = optimizer
            together = ctx.world.size > 1
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(module, device_ids=ids) if together else module

    def split(self, module: nn.Module, optimizer: torch.optim.Optimizer, layout: Mapping[str, Any]) -> tuple[Any, Any]:
        """DeepSpeed's engine and optimizer."""
        import deepspeed

        from stages.lib.training.deepspeed_files import DataOnly

        engine, wrapped_optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(layout))
        engine.checkpoint_engine = DataOnly()
        return engine, wrapped_optimizer

    # Learning

    def rounding(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of `precision`, where the weights themselves are not rounded to it."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The module's forward pass, in training: gradients will flow."""
        return self.wrapped(*arguments, **options)

    @torch.no_grad()
    def infer(self, *arguments: Any, **options: Any) -> Any:
        """The module's forward pass without gradients. Under ZeRO-3 all processes must call it together."""
        return (self.wrapped if self.layout is not None else self.module)(*arguments, **options)

    def backward(self, make_loss: Callable[[], Tensor], *, last: bool) -> None:
        """Adds the gradients of `make_loss()`, which does the forward pass. `last`: no more follow before the step."""
        if last and self.companion is not None:
            make_loss = partial(loss_with_companion, make_loss, self.companion)
        if self.layout is not None:
            self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
            self.wrapped.backward(make_loss(), scale_wrt_gas=False)
            return
        alone = isinstance(self.wrapped, DistributedDataParallel) and not last
        with self.wrapped.no_sync() if alone else contextlib.nullcontext():
            self.scaler.scale(make_loss()).backward()

    def step(self, learning_rates: Sequence[float]) -> Stepped:
        """One step of the optimizer with a learning rate per group, unless the gradients are not finite."""
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        gradients = self.whole_gradients(self.companion.watched) if self.companion is not None else []
        stepped = self.step_plainly() if self.layout is None else self.step_split()
        if self.companion is not None and stepped.taken:
            clipped = min(1.0, self.max_gradient_norm / (stepped.gradient_norm + 1e-6))
            self.companion.follow([gradient * clipped for gradient in gradients])
            self.keep_zeros(self.companion.zeroed)
        return stepped

    def whole_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradients of a step, averaged over the processes and not clipped; not for fp16 or under ZeRO-3."""
        if self.layout is None:
            return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
        from deepspeed.utils import safe_get_full_grad

        return [safe_get_full_grad(p) for p in parameters]

    @torch.no_grad()
    def keep_zeros(self, parameters: Sequence[nn.Parameter]) -> None:
        """Zeros in parameters become zeros also in the float32 that ZeRO steps in their place."""
        if self.layout is None:
            return
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        for parameter in parameters:
            stepped = safe_get_full_fp32_param(parameter)
            safe_set_full_fp32_param(parameter, stepped.masked_fill(parameter == 0, 0.0))

    def step_plainly(self) -> Stepped:
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.trainable, self.max_gradient_norm))
        finite = math.isfinite(norm)
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # which looks for itself, and leaves out what overflowed
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(norm, finite)

    def step_split(self) -> Stepped:
        norm: Any = None
        if not hasattr(self.optimizer, "overflow"):
            # Without ZeRO, and in float32, DeepSpeed takes every step.
            gradients = [p.grad for p in self.trainable if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if not bool(torch.isfinite(norm)):
                self.wrapped.zero_grad()
                return Stepped(float(norm), False)
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm() if norm is None else norm
        return Stepped(float(norm) if norm is not None else 0.0, self.wrapped.was_step_applied())

    def told(self) -> dict[str, float]:
        """What a line of the journal says besides of a step."""
        return self.companion.told() if self.companion is not None else {}

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Writes what is trained, and the optimizer's state. All processes call it."""
        if self.layout is not None:
            self.wrapped.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
            barrier()
        else:
            from_main(lambda: self.save_plainly(folder))

    def save_plainly(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"module": self.own_state(), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        torch.save(state, folder / PLAIN_STATE)

    def own_state(self) -> dict[str, Tensor]:
        """Name -> tensor of what training changes: trained parameters, and buffers that belong to the module's state."""
        trained = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in self.module.named_buffers()}
        return trained | {name: b for name, b in self.module.state_dict().items() if name in buffers}

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises `ArtifactError` if it is not there or, without DeepSpeed, of another module."""
        if self.layout is not None:
            # Not strict: frozen parameters are not in the checkpoint.
            path, _ = self.wrapped.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
            )
            if path is None:
                raise ArtifactError(Problem(str(folder), "DeepSpeed finds no checkpoint in it", "Remove it."))
            return
        saved = torch.load(folder / PLAIN_STATE, map_location=self.device, weights_only=True)
        if differing := set(self.own_state()) ^ set(saved["module"]):
            names = ", ".join(sorted(differing)[:3])
            raise ArtifactError(Problem(str(folder), f"is of another model: {names}", "Remove it."))
        self.module.load_state_dict(saved["module"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])

    # Whole weights

    def state_of(self, part: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
        """Name -> whole weight of a part of the module, on the CPU, on the main process; {} on the others.

        Under ZeRO-3 one weight after the other is gathered, so that no device ever holds all of them. `trained_only`: without
        those that are frozen, and without buffers.
        """
        state = {}
        self.release()
        for name, parameter in part.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with self.whole([parameter]):
                if self.ctx.world.is_main:
                    state[name] = parameter.detach().to("cpu", copy=True)
        if self.ctx.world.is_main and not trained_only:
            buffers = dict(part.named_buffers())
            state |= {name: b.detach().cpu() for name, b in part.state_dict().items() if name in buffers}
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
