"""What the blocks of all methods of adapters have. Imports no torch: `plan` reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.strict import Strict

ModuleNames = list[Annotated[str, Field(min_length=1)]]


class AdapterBlock(Strict):
    """What the blocks of all methods have."""

    publish: Literal["merged", "adapter"] | None = None
    """merged: a whole model with the adapter in its weights, which every later stage takes, and the adapter alone beside it in `adapter/`. adapter: the adapter alone, of a few megabytes, which `merge` or peft puts on its base. null: merged, and adapter of a method that has no weights to merge into."""
