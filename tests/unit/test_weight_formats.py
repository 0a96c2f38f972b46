"""In which number format weights are published: as the model has them, unless the recipe asks for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.lib.models.formats import Formats, choose_formats, stored_formats, that_hold

BF16 = {"a": ("BF16", 100), "b": ("BF16", 10)}


@pytest.mark.parametrize(
    ("stored", "precision", "asked", "main", "said"),
    [
        ({}, "fp32", None, "fp32", ""),
        ({}, "bf16", None, "bf16", ""),
        ({}, "fp32", "bf16", "bf16", "the weights are trained in fp32 and published in bf16, as published_dtype says"),
        (BF16, "fp32", None, "bf16", "the weights are trained in fp32 and published in bf16, as the model has them"),
        (BF16, "bf16", None, "bf16", ""),
        (BF16, "fp32", "fp32", "fp32", ""),
        (BF16, "fp16", None, "fp16", "the model's weights are in bf16, and are published in fp16"),
        ({"a": ("F32", 1)}, "fp32", None, "fp32", ""),
        ({"a": ("F32", 1)}, "bf16", None, "bf16", "the model's weights are in fp32, and are published in bf16"),
        ({"a": ("F32", 1)}, "bf16", "fp32", "fp32", "the weights are trained in bf16 and published in fp32"),
        ({"a": ("F64", 1)}, "fp32", None, "fp32", "the model's weights are in F64, and are published in fp32"),
    ],
)
def test_weights_keep_their_format_unless_asked(
    stored: dict[str, tuple[str, int]], precision: str, asked: str | None, main: str, said: str
) -> None:
    """And where that is another than the model's, or than the one of training, it is said."""
    formats, why = choose_formats(stored, precision, asked)
    assert (formats.main, formats.own) == (main, {})
    assert formats.kept == (asked is None and precision == "fp32" and stored in (BF16, {"a": ("F32", 1)}))
    assert why.startswith(said) and bool(why) == bool(said)


def test_a_few_weights_in_another_format_keep_it_too() -> None:
    """As routers and state-space models have them: most values are bf16, and some weights fp32."""
    formats, why = choose_formats({**BF16, "router": ("F32", 5)}, "fp32", None)
    assert formats.dtype_of("a") == torch.bfloat16
    assert formats.dtype_of("router") == torch.float32
    assert formats.dtype_of("a new head") == torch.bfloat16
    assert why.endswith("1 are in another format there (router)")


def test_a_weight_too_large_for_the_models_format_loses_no_run() -> None:
    """fp16 ends at 65504. Where the recipe asks for fp16, the check of what was written refuses it."""
    state = {"a": torch.tensor([1.0, -65504.0]), "b": torch.tensor([65600.0]), "ids": torch.tensor([70000])}
    kept, _ = choose_formats({"a": ("F16", 2), "b": ("F16", 1)}, "fp32", None)
    assert that_hold(kept, state) == Formats("fp32")
    assert that_hold(kept, {"a": state["a"], "ids": state["ids"]}) == kept
    assert that_hold(Formats("fp16"), state) == Formats("fp16")
    assert that_hold(Formats("bf16", kept=True), state) == Formats("bf16", kept=True)


def test_formats_are_read_from_headers(tmp_path: Path) -> None:
    """Numbers of values: 2 x 3, and 4. Whole numbers have no such format."""
    save_file(
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "ids": torch.zeros(7, dtype=torch.int64)},
        tmp_path / "1.safetensors",
    )
    save_file({"b": torch.zeros(4)}, tmp_path / "2.safetensors")
    assert stored_formats(tmp_path) == {"a": ("BF16", 6), "b": ("F32", 4)}
    assert stored_formats(tmp_path / "none") == {}
