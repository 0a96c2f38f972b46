"""Models to disk, with a check of what was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Problem
from stages.lib.models.formats import Formats, that_hold
from stages.lib.models.loading import DTYPES, head_stands_alone, parameter_shapes
from stages.lib.text.tokenizers import copy_left_out, copy_tokenizer, load_tokenizer, stop_token_ids


def publish(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | Path,
    out: Path,
    *,
    formats: Formats | None = None,
    stop_ids: list[int] | None = None,
    may_be_zero: Callable[[str], bool] = lambda name: False,
) -> str:
    """Writes model and tokenizer to `out` as a Hugging Face folder, and reads the weights back to check them.

    Returns the number format of the weights, which is that of `formats` unless it cannot hold them: see `that_hold`.

    A tokenizer given as a folder is copied file by file, as unchanged as it is. `state` holds the full weights on the main
    process, gathered from wherever a memory layout had put them. `may_be_zero` says which matrices training began with as
    zeros.
    """
    formats = that_hold(formats or Formats(), state)
    opened = load_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    # Gathering clones tied weights: each is written once, under the name that owns it, whatever the layout.
    tied = tied_names(model)
    weights = {
        name: (
            tensor.detach().to("cpu", formats.dtype_of(name))
            if tensor.is_floating_point()
            else tensor.detach().to("cpu")
        )
        for name, tensor in state.items()
        if name not in tied
    }
    model.config.use_cache = True
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        complete_generation_config(model, opened, stop_ids or stop_token_ids(opened))
        agree_on_stops(model)
    model.save_pretrained(out, state_dict=dict(weights))
    model.config.dtype = DTYPES[formats.main]
    model.config.save_pretrained(out)
    if isinstance(tokenizer, Path):
        copy_tokenizer(tokenizer, out)
    else:
        tokenizer.save_pretrained(out)
        copy_left_out(tokenizer, out)
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if name not in tied}
    check_weights(out, shapes, may_be_zero)
    return formats.main


def tied_names(model: PreTrainedModel) -> set[str]:
    """The names of weights that are another one under a second name. Where the head has become one of its own, the config says so."""
    if head_stands_alone(model):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    weights = dict(model.named_parameters(remove_duplicate=False))
    claimed = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name, source in claimed.items() if weights.get(name) is weights.get(source)}


def complete_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> None:
    """Says in the generation config where generation stops, so that whoever serves the model need not guess. Where the
    model stopped already, it stops still.

    It is made anew: one that came from the model's config is derived from that again, and would forget what it is told.
    """
    said = {name: value for name, value in model.generation_config.to_diff_dict().items() if not name.startswith("_")}
    said.pop("transformers_version", None)
    said |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    before = said.get("eos_token_id")
    known = before if isinstance(before, list) else [] if before is None else [before]
    if all_ids := list(dict.fromkeys([*stop_ids, *known])):
        said["eos_token_id"] = all_ids if len(all_ids) > 1 else all_ids[0]
    model.generation_config = GenerationConfig(**said)


def agree_on_stops(model: PreTrainedModel) -> None:
    """Says in config.json too where generation stops: who makes a generation config anew derives it from there."""
    config, stops = model.config.get_text_config(), model.generation_config.eos_token_id
    if stops is None:
        return
    try:
        config.eos_token_id = stops
    except StrictDataclassError:  # the config of some architectures takes one id only
        config.eos_token_id = stops[0] if isinstance(stops, list) else stops


def zeros_of(folder: Path) -> Callable[[str], bool]:
    """Tells which matrices of the model in `folder` are all zero: training that had nothing to learn leaves them so."""

    def is_zero(name: str) -> bool:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - the file is no mapping
                    return not bool(file.get_tensor(name).any())
        return False

    return is_zero


READ_AT_ONCE_BYTES = 16 << 20


def tensors_in(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of all safetensors in `folder`, each to be used before the next: few of them are in memory at once."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            waiting = list(reversed(file.keys()))
        while waiting:
            # Opened anew now and then: what has been read of a file stays in memory while it is open.
            with safe_open(path, framework="pt") as file:
                read = 0
                while waiting and read < READ_AT_ONCE_BYTES:
                    name = waiting.pop()
                    tensor = file.get_tensor(name)
                    read += tensor.nbytes
                    yield name, tensor
                del tensor


def check_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], may_be_zero: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises `ArtifactError` unless the safetensors in `folder` hold exactly sound weights of these shapes.

    Unsound is: missing, of another shape (ZeRO-3 without gathering writes size 0), non-finite, or a matrix of zeros where
    training did not begin with zeros.
    """
    problems = []
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors_in(folder):
        found[name] = tuple(tensor.shape)
        if tensor.numel() == 0:
            problems.append(f"{name} is empty")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds values that are not finite")
        elif tensor.dim() >= 2 and not bool(tensor.any()) and not may_be_zero(name):
            problems.append(f"{name} is all zero")
    # Some architectures are stored under other names than they have in memory: then only the total can be compared.
    if set(found) >= set(shapes):
        wrong = [name for name, shape in shapes.items() if found[name] != shape]
        problems += [f"{name} has the shape {list(found[name])} instead of {list(shapes[name])}" for name in wrong]
    elif sum(map(math.prod, found.values())) < sum(map(math.prod, shapes.values())):
        missing = [name for name in shapes if name not in found]
        problems += [f"{name} was not written" for name in missing]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ArtifactError(
            Problem(
                str(folder),
                f"the weights are not fit to publish: {'; '.join(problems[:5])}{more}",
                "Nothing was published.",
            )
        )
