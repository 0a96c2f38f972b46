"""The number formats of weights: which a model on disk has, read from headers alone, and which a trained one is published in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.stage import Context
from stages.lib.models.loading import DTYPES

STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""What safetensors calls the formats that are trained from and published in."""


@dataclass(frozen=True)
class Formats:
    """In which number format each floating-point weight is published."""

    main: str = "fp32"
    """A key of `DTYPES`: of all weights but those in `own`, and what config.json names."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Weight -> its format, where it is another."""
    kept: bool = False
    """Whether they are the model's own, and nobody asked for them."""

    def dtype_of(self, name: str) -> torch.dtype:
        return DTYPES[self.own.get(name, self.main)]


def stored_formats(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> (format as safetensors calls it, number of values) of the floating-point weights in `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                weight = file.get_slice(name)
                if weight.get_dtype().startswith(("F", "BF")):
                    found[name] = weight.get_dtype(), prod(weight.get_shape())
    return found


def formats_to_publish(ctx: Context, precision: str, published_dtype: str | None) -> Formats:
    """What the params `published_dtype` and `precision` make of the formats of the model that training starts from, or of
    a new one; the journal is told where that is another format than the one of the training.
    """
    formats, why = choose_formats(stored_formats(ctx.base) if ctx.base else {}, precision, published_dtype)
    if why:
        ctx.journal.note(why)
    return formats


def say_if_other(ctx: Context, formats: Formats, published: str) -> None:
    """Tells the journal where weights were published in another format than `formats`: see `that_hold`."""
    if published != formats.main:
        why = f"training has made weights too large for {formats.main}, which the model has: they are published in {published}"
        ctx.journal.note(why)


def choose_formats(
    stored: Mapping[str, tuple[str, int]], precision: str, published_dtype: str | None
) -> tuple[Formats, str]:
    """The formats to publish weights in that begin in those `stored`, and a sentence where it must be said.

    Weights keep their format unless another is asked for, by `published_dtype`, or by a `precision` that rounds. Where most
    values are in one that is not trained from (float64, say), it is fp32.
    """
    if published_dtype is not None:
        return Formats(published_dtype), said_of_formats(precision, published_dtype, "as published_dtype says")
    values: Counter[str] = Counter()
    for stored_as, number in stored.values():
        values[stored_as] += number
    if not values:
        return Formats(precision), ""
    most = values.most_common(1)[0][0]
    before = STORED.get(most, most)
    if precision != "fp32" or most not in STORED:
        why = f"the model's weights are in {before}, and are published in {precision}; published_dtype asks for another format"
        return Formats(precision), why if before != precision else ""
    own = {name: STORED[each] for name, (each, _) in stored.items() if each in STORED and each != most}
    why = said_of_formats(precision, before, "as the model has them")
    if own:
        few = ", ".join(sorted(own)[:3]) + (", ..." if len(own) > 3 else "")
        why = f"{why or 'weights are published as the model has them'}; {len(own)} are in another format there ({few})"
    return Formats(before, own, kept=True), why


def that_hold(formats: Formats, state: Mapping[str, torch.Tensor]) -> Formats:
    """The formats, or fp32 where nobody asked for fp16 and training has made a weight larger than that holds: no run is
    lost at its end for it.
    """
    largest = torch.finfo(torch.float16).max
    too_large = any(
        formats.dtype_of(name) == torch.float16 and tensor.numel() and bool(tensor.abs().max() > largest)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    )
    return Formats("fp32") if formats.kept and too_large else formats


def said_of_formats(precision: str, published: str, reason: str) -> str:
    if published == precision:
        return ""
    return f"the weights are trained in {precision} and published in {published}, {reason}"
