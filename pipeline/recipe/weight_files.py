"""The files with a model's weights: which of them are read, and whether they are whole, as far as their heads show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import shown
from pipeline.settings.paths import is_file, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers looks for: all weights in one file, or the list of the files that they are split into."""
OTHERS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""


def weights_in(path: Path) -> list[Path]:
    """The files with a model's weights in the form that is read here; an adapter's are none."""
    return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))


def broken_weights(path: Path) -> str | None:
    """Why the safetensors of a model's folder, of which there are some, cannot be read; None if they can."""
    if is_file(path / WHOLE):
        files = [path / WHOLE]
    elif is_file(path / INDEX):
        listed = read_json(path / INDEX).get("weight_map")
        names = sorted(set(listed.values())) if isinstance(listed, Mapping) else []
        if not names or not all(isinstance(name, str) for name in names):
            return f"{path / INDEX} has no `weight_map` of tensors to files. Get the file again."
        if missing := [name for name in names if not is_file(path / name)]:
            return (
                f"{path} lacks {len(missing)} of the {len(names)} files with weights that {INDEX} names:"
                f" {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Get the whole folder."
            )
        files = [path / name for name in names]
    else:
        there = ", ".join(file.name for file in weights_in(path)[:3])
        return (
            f"{path} holds {there}, and neither {WHOLE} nor {INDEX}, where transformers looks for weights. Get those as"
            " well: a file of another name may hold the same weights under names of another library."
        )
    return next((problem for file in files if (problem := broken_file(file))), None)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the names of the tensors end that have a row per token."""


def embedded_otherwise(path: Path) -> str | None:
    """Why a model's whole weights and its config do not have the same number of tokens; None if they do, or none is said."""
    config = read_json(path / "config.json")
    inner = config.get("text_config")
    said = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    rows = {
        name: tensor["shape"][0]
        for file in weights_in(path)
        for name, tensor in header_of(file).items()
        if name.endswith(EMBEDDINGS) and len(tensor.get("shape") or ()) == 2
    }
    if not rows or not isinstance(said, int) or said in rows.values():
        return None
    name, found = min(rows.items())
    return (
        f"{path} embeds {found} tokens ({name}), and its config.json says `vocab_size` {said}. Write {found} there, if the "
        "weights are those that were meant."
    )


def unscaled(path: Path) -> str | None:
    """Why a model's whole weights cannot be taken for the numbers that stand there: they are of 8 bits, and nothing says how
    they are scaled; None if they can.
    """
    if read_json(path / "config.json").get("quantization_config"):
        return None
    dtypes = {tensor.get("dtype") for file in weights_in(path) for tensor in header_of(file).values()}
    found = sorted(dtype for dtype in dtypes if isinstance(dtype, str) and dtype.startswith(("F8", "F4", "F6")))
    if not found:
        return None
    return (
        f"{path} holds weights as {', '.join(found)}, and its config.json has no `quantization_config` that says how they are"
        " scaled. Get the config.json that belongs to them; or, if they are not scaled, write them in another format: `import"
        " torch; from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(path)!r}, dtype=torch.bfloat16).save_pretrained(FOLDER)`, and copy the tokenizer's files there."
    )


def header_of(path: Path) -> dict[str, Any]:
    """What a whole safetensors file says of its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def broken_file(path: Path) -> str | None:
    """Why a safetensors file is not whole; None if it is, by its header and its size.

    Source: https://huggingface.co/docs/safetensors/index#format: 8 bytes with the length of the header, little-endian; the
    header, JSON; the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            return (
                f"{path} is a pointer of Git LFS ({size} bytes), and not the weights that it stands for. Get them in the"
                " repository that it comes from: `git lfs pull`."
            )
        length = int.from_bytes(head[:8], "little")
        again = f"{path} ({size:,} bytes) is damaged: {{}}. Get the file again."
        if len(head) < 8 or 8 + length > size or length > MOST_HEADER_BYTES:
            return again.format("it does not begin as a safetensors file does")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [end_of(each) for name, each in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return again.format("its header cannot be read")
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else again.format(f"by its header it has {shown(expected)} bytes")


def end_of(tensor: Mapping[str, Any]) -> int:
    """Where a tensor ends, in bytes behind the header."""
    return int(tensor["data_offsets"][1])
