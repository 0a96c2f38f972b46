"""Dropout that neither the number of processes nor micro batches change: what is dropped of a row is a function of the row.

torch's dropout reads one generator after another number, so that a row's mask depends on which process holds it and on what
stands beside it. While a model is trained here, the functions that drop take their masks from (seed, position of the row in
the schedule, module, how often it has drawn in this pass, place in the row) instead: `formulas/dropout_masks.py`. What no row
decides, as a dropped table of relative positions or a layer that is left out, is the same for all rows of an optimizer step.

Which modules draw, and in which dimension of what they drop the rows lie, is found by calling the model with one row and
with two. Only these modules are hooked; elsewhere, and in models that draw nothing, nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stages.lib.formulas.attention import dropped_attention
from stages.lib.formulas.dropout_masks import keep_mask, scramble, signed, uniform
from stages.lib.models.drawing import (
    ALMOST_ONE,
    DROPOUTS,
    Draw,
    bound_arguments,
    draws_of,
    dropped_shape,
    is_single_number,
    rate_of,
)

Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
Site = tuple[str, int]
"""A module, and which of its draws in a pass."""


@dataclass
class Pass:
    """A forward and backward pass in training."""

    keys: Tensor
    """One per sequence, int64, on the device."""
    step_key: Tensor
    """One number, that of the optimizer step, for what no row decides."""
    counts: Counter[str] = field(default_factory=Counter)
    """How often each module has drawn."""


class RowDropout:
    """The dropout of a model in training: of its rows within `rows`, and off elsewhere."""

    def __init__(self) -> None:
        self.sites: dict[Site, int | None] = {}
        """The dimension of what is dropped in which the rows lie; None where no row decides."""
        self.strange: list[Draw] = []
        """What is drawn otherwise, so that it depends on how rows are spread."""
        self.now: Pass | None = None
        self.running: list[str] = []
        """The modules that draw and are being called, the innermost last."""
        self.mode = Drawing(self)

    # Before training

    def learn(self, model: nn.Module, device: torch.device, run: Callable[[int], Any]) -> None:
        """Finds the modules of `model` that draw, and hooks them. `run(n)` calls it with one row, n times over.

        The model is in training mode. All processes call this together.
        """
        one = draws_of(model, device, lambda: run(1))
        two = draws_of(model, device, lambda: run(2)) if one else []
        alike = [each.what for each in one] == [each.what for each in two]
        for first, second in zip(one, two if alike else one, strict=True):
            places = scaled_dimensions(first.shape, second.shape)
            # One number for a single row may be a number for each of several: such a draw is nobody's.
            if alike and first.known and second.known and places is not None:
                self.sites[first.module, first.number] = places[0] if places else None
            else:
                self.strange.append(first)
        names = {draw.module for draw in one if draw.known}
        for name, module in model.named_modules():
            if name in names:
                module.register_forward_pre_hook(partial(self.enter, name))
                module.register_forward_hook(self.leave, always_call=True)

    def enter(self, name: str, *_: Any) -> None:
        if not self.running:
            self.mode.__enter__()
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()
        if not self.running:
            self.mode.__exit__(None, None, None)

    # In training

    @contextlib.contextmanager
    def rows(self, keys: Sequence[int], step_key: int, device: torch.device) -> Iterator[None]:
        """Within it, forward and backward pass, what is dropped is a function of the sequences' keys, in their order."""
        self.now = Pass(*(torch.tensor(each, dtype=torch.int64).to(device) for each in (keys, [step_key])))
        try:
            yield
        finally:
            self.now = None

    def recomputing(self) -> Contexts:
        """The `context_fn` of torch's checkpointing: what is called once more draws what it drew."""
        return contextlib.nullcontext(), self.counting_from(dict(self.now.counts) if self.now is not None else {})

    @contextlib.contextmanager
    def counting_from(self, counts: dict[str, int]) -> Iterator[None]:
        now = self.now
        if now is None:
            yield
            return
        after, now.counts = now.counts, Counter(counts)
        try:
            yield
        finally:
            now.counts = after

    def next_site(self) -> Site:
        """The draw of the innermost module that is due."""
        assert self.now is not None
        module = self.running[-1]
        self.now.counts[module] += 1
        return module, self.now.counts[module] - 1

    def mask(self, shape: tuple[int, ...], rate: float) -> Tensor | None:
        """What is kept, of this shape; None where it cannot be a function of the rows."""
        assert self.now is not None
        site = self.next_site()
        if site not in self.sites:
            return None
        place, keys = self.sites[site], self.now.keys
        if place is None:
            return keep_mask(self.keys_of(site, self.now.step_key), shape, rate)[0]
        if shape[place] % len(keys):
            return None
        # Several places of a dimension may be of one row, as where heads are folded into it: the row comes first.
        before, folded, behind = shape[:place], shape[place] // len(keys), shape[place + 1 :]
        if place == 0 and folded == 1:
            return keep_mask(self.keys_of(site, keys), behind, rate)
        kept = keep_mask(self.keys_of(site, keys), (*before, folded, *behind), rate)
        return kept.movedim(0, place).reshape(shape)

    def keys_of(self, site: Site, keys: Tensor) -> Tensor:
        """The keys of rows for one draw."""
        return scramble(keys ^ signed(seed_of_site(*site)))


class Drawing(TorchFunctionMode):
    """While a module runs that draws: what it drops is said by `RowDropout`, or nothing is dropped."""

    def __init__(self, dropout: RowDropout) -> None:
        super().__init__()
        self.dropout = dropout

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            arguments = bound_arguments(func, args, kwargs)
            if rate := rate_of(func, arguments):
                return self.drop(func, arguments, rate)
        if func is torch.rand and is_single_number(func, args, kwargs):
            # By which a class decides whether it leaves a layer out: all of them stay outside of training passes.
            number, now = ALMOST_ONE, self.dropout.now
            if now is not None:
                number = uniform(int(self.dropout.keys_of(self.dropout.next_site(), now.step_key)))
            shaped = {name: value for name, value in kwargs.items() if name != "generator"}
            return torch.full_like(torch.empty(*args, **shaped), number)
        return func(*args, **kwargs)

    def drop(self, function: Callable[..., Any], arguments: dict[str, Any], rate: float) -> Tensor:
        """What `function` would return, with our mask; without any dropout outside of training passes."""
        attends = function is functional.scaled_dot_product_attention
        kept = None
        if self.dropout.now is not None:
            kept = self.dropout.mask(dropped_shape(function, arguments), rate)
            if kept is None:
                return cast(Tensor, function(**arguments))
        if attends:
            arguments = {name: value for name, value in arguments.items() if name != "dropout_p"}
            if kept is None:
                return cast(Tensor, function(**arguments))
            return dropped_attention(**arguments, drop=lambda probabilities: scaled(probabilities, kept, rate))
        values = arguments["input"]
        if kept is None:
            return cast(Tensor, values)
        kept = kept[(..., *(None,) * (values.dim() - kept.dim()))]
        if arguments.get("inplace") or function is torch.dropout_:
            return cast(Tensor, values.mul_(kept).mul_(factor(rate)))
        return scaled(values, kept, rate)


def factor(rate: float) -> float:
    """What the kept are multiplied by, so that the mean stays."""
    return 1 / (1 - rate) if rate < 1 else 0.0


def scaled(values: Tensor, kept: Tensor, rate: float) -> Tensor:
    return values * kept * factor(rate)


def scaled_dimensions(one: tuple[int, ...], two: tuple[int, ...]) -> list[int] | None:
    """The dimension that twice as many rows double, in a list; [] where none changes; None where it is not that simple."""
    if len(one) != len(two):
        return None
    changed = [place for place, (first, second) in enumerate(zip(one, two, strict=True)) if first != second]
    doubled = all(two[place] == 2 * one[place] for place in changed)
    return changed if doubled and len(changed) <= 1 else None


@functools.cache
def seed_of_site(module: str, number: int) -> int:
    """A seed of 63 bits for a draw."""
    return int.from_bytes(hashlib.sha256(f"{module}:{number}".encode()).digest()[:8], "big") >> 1
