"""What a model draws at random in a forward pass: by which of its modules, found by calling it.

Whether a class applies dropout, where, and whether it heeds the mode that it is in cannot be told from its config or from
the modules that it is made of: many classes call a function with a rate of their own. So every function of torch that is
called is looked at while the model runs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pipeline.errors import ArtifactError, Problem

DROPOUTS: dict[Callable[..., Any], tuple[str, str | None]] = {
    functional.dropout: ("p", "training"),
    torch.dropout: ("p", "train"),
    torch.dropout_: ("p", "train"),
    functional.dropout1d: ("p", "training"),
    functional.dropout2d: ("p", "training"),
    functional.dropout3d: ("p", "training"),
    functional.scaled_dot_product_attention: ("dropout_p", None),
}
"""Functions that drop at random -> the names of the rate and of the switch among their arguments."""
CHANNELS = (functional.dropout1d, functional.dropout2d, functional.dropout3d)
"""Those that drop whole channels, the second dimension of their input."""

SIGNATURES = {
    function: inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default) for name, default in names]
    )
    for function, names in {
        torch.dropout: (("input", None), ("p", 0.5), ("train", True)),
        torch.dropout_: (("input", None), ("p", 0.5), ("train", True)),
        functional.scaled_dot_product_attention: (
            *((name, None) for name in ("query", "key", "value", "attn_mask")),
            ("dropout_p", 0.0),
            ("is_causal", False),
            ("scale", None),
            ("enable_gqa", False),
        ),
    }.items()
}
"""Of functions that are not written in Python."""


def bound_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of `DROPOUTS` by name, with their defaults."""
    signature = SIGNATURES.get(function) or inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def rate_of(function: Callable[..., Any], arguments: dict[str, Any]) -> float:
    """With which probability the call drops; 0 where it is switched off."""
    rate, switch = DROPOUTS[function]
    return float(arguments[rate]) if switch is None or arguments[switch] else 0.0


def is_single_number(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call is `torch.rand` of one number: whole layers are dropped by one."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else kwargs.get("size", args)
    return function is torch.rand and all(size == 1 for size in sizes) and kwargs.get("generator") is None


@dataclass(frozen=True)
class Draw:
    """One draw in a forward pass."""

    module: str
    """The name of the innermost module that was running; "" outside of all."""
    number: int
    """How many draws that are `known` this module had made in the pass before."""
    function: str
    shape: tuple[int, ...]
    known: bool
    """Whether it is dropout, or one number: what can be drawn otherwise, or left out."""

    @property
    def what(self) -> tuple[str, int, str]:
        return self.module, self.number, self.function


def generator_states(device: torch.device | None = None) -> list[Tensor]:
    """Where torch's own generators stand: that of the CPU, and that of the device if it is a GPU."""
    states = [torch.get_rng_state()]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def same_states(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


ALMOST_ONE = 1 - 2**-24
"""The largest number that `torch.rand` gives: below no rate of layers that are left out."""


class Recorder(TorchFunctionMode):
    """Notes every draw while it is on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.running: list[str] = [""]
        self.counts: Counter[str] = Counter()
        self.draws: list[Draw] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = generator_states(self.device)
        found = func(*args, **kwargs)
        shape: tuple[int, ...] | None = None
        known = func in DROPOUTS
        if known:
            arguments = bound_arguments(func, args, kwargs)
            if rate_of(func, arguments):
                shape = dropped_shape(func, arguments)
        elif not same_states(before, generator_states(self.device)):
            known = is_single_number(func, args, kwargs)
            shape = tuple(found.shape) if isinstance(found, Tensor) else ()
            if known:
                found.fill_(ALMOST_ONE)  # no layer is left out, so that all are seen
        if shape is not None:
            module = self.running[-1]
            name = getattr(func, "__name__", str(func))
            self.draws.append(Draw(module, self.counts[module], name, shape, known))
            self.counts[module] += known
        return found


def dropped_shape(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the mask that a call of one of `DROPOUTS` wants."""
    if function is functional.scaled_dot_product_attention:
        query, key = arguments["query"], arguments["key"]
        return (*query.shape[:-1], key.shape[-2])
    shape = arguments["input"].shape
    return tuple(shape[:2]) if function in CHANNELS else tuple(shape)


def draws_of(model: nn.Module, device: torch.device, run: Callable[[], Any]) -> list[Draw]:
    """Every draw while `run()` calls the model, in their order, without gradients."""
    recorder = Recorder(device)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: drop_last(recorder.running), always_call=True))
    try:
        with torch.no_grad(), recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.draws


def drop_last(names: list[str]) -> None:
    names.pop()  # a hook that returns something would change the module's output


def named_draws(draws: list[Draw], most: int = 3) -> str:
    """The draws for a message: functions, and modules that call them."""
    names = list(dict.fromkeys(f"{draw.function} in {draw.module or 'the model'}" for draw in draws))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Proven by calling twice.


TOLERANCE = 1e-3
"""How far two passes without any draw may be apart, relative to the largest number: kernels that add up in any order."""


MOST_CALLS = 30
"""Of a model that draws: a single score, of which a tenth of the calls drops everything, is the same in two of them often."""


def require_repeatable(
    device: torch.device, run: Callable[[], Tensor], *, where: str = "inputs.model", in_training: bool = False
) -> None:
    """Raises `ArtifactError` if `run()`, a forward pass in which nothing may be random, gives two results in two calls.

    Where a generator has moved it is called some times more. Where none has, differences are the kernels', and allowed as far
    as `TOLERANCE`. `in_training`: the model is in training mode, and its dropout was switched off.
    """
    states = generator_states(device)
    with torch.no_grad():
        first = run().detach().float()
        drew = not same_states(states, generator_states(device))
        others = (run().detach().float() for _ in range(MOST_CALLS if drew else 1))
        apart = max(float((first - other).abs().nan_to_num(0.0).amax()) for other in others)
    if apart <= (0.0 if drew else TOLERANCE * max(1.0, float(first.abs().nan_to_num(0.0).amax()))):
        return
    why = (
        "even with its dropout switched off: its class draws at random in training in other ways, as routers do that jitter"
        if in_training
        else "although it is in evaluation mode: its class draws at random there, as dropout does that does not heed the mode"
    )
    raise ArtifactError(
        Problem(
            where,
            f"the model gives the same tokens other numbers each time it is called (apart by {apart:.3g}), {why}",
            "No two of its probabilities compare. Set the rates of dropout and noise in its config.json to 0, or take a model"
            " of another class.",
        )
    )


def probe_ids(vocabulary_size: int, device: torch.device) -> Tensor:
    """1 x 8: some tokens to call a model with, where no row is at hand."""
    return torch.arange(8, device=device)[None] % vocabulary_size


def require_quiet(model: PreTrainedModel, where: str) -> None:
    """Raises `ArtifactError` if the model, whole and in evaluation mode, gives the same tokens two results in two calls."""
    ids_1T = probe_ids(int(model.config.get_text_config().vocab_size), model.device)
    require_repeatable(
        model.device, lambda: model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits, where=where
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
