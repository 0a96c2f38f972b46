"""Several adapters on one model at once, each for rows of its own in a batch: what peft calls `adapter_names`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel

from stages.lib.models.adapters.attaching import unwarned
from stages.lib.models.adapters.opening import Adapted, changed_by, require_same_layers
from stages.lib.models.adapters.saving import own_method

PEFT_BASE = "__base__"
"""What peft calls the model alone, where it asks for the adapter of a row."""


def standing_together(adapted: Adapted) -> list[str]:
    """The adapters that can be on the model at once: LoRAs that leave its own weights as they are, replace none of its layers,
    and are no DoRA. Of a layer that one of them replaces peft asks every other for its own.
    """
    return [name for name in adapted.adapters if stands_beside_others(adapted, name)]


def stands_beside_others(adapted: Adapted, name: str) -> bool:
    adapter = adapted.adapters[name]
    if own_method(adapter) is not None:
        return False
    config = PeftConfig.from_pretrained(str(adapter))
    alone = ("use_dora", "target_parameters", "trainable_token_indices", "modules_to_save")
    if not isinstance(config, LoraConfig) or any(getattr(config, field) for field in alone):
        return False
    return not changed_by(adapted.base, adapter)


@contextlib.contextmanager
def all_on(adapted: Adapted, names: Sequence[str]) -> Iterator[tuple[Any, dict[str | None, str]]]:
    """The model with these adapters on it, and how peft calls each, and the model alone (None), in `adapter_names`.

    `names` are some of those of `standing_together`. Whatever was on the model before is off it afterwards. Raises
    `ArtifactError` unless each of an adapter's weights finds its place.
    """
    adapted.use(None)
    called = {name: f"adapter_{number}" for number, name in enumerate(names)}
    try:
        under: Any = None
        for name, peft_name in called.items():
            place = str(adapted.adapters[name])
            with unwarned():
                if under is None:
                    under = PeftModel.from_pretrained(adapted.base, place, adapter_name=peft_name)
                else:
                    under.load_adapter(place, adapter_name=peft_name)
            require_same_layers(under, adapted.adapters[name], f"adapter {name}", peft_name)
        yield under.eval(), {**called, None: PEFT_BASE}
    finally:
        adapted.take_off()
        adapted.base.eval()
