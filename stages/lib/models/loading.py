"""Models from disk: the start that all processes share, and loading without code or pickles from outside."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.settings.paths import holds_file
from pipeline.stage import Context
from pipeline.store.durable import replacing_folder
from stages.lib.formulas.seeds import NUMPY_BITS, bounded_seed
from stages.lib.models.classifiers import classifier_class
from stages.lib.models.config import read_config
from stages.lib.models.drawing import require_quiet
from stages.lib.models.generation import GENERATION, sound_generation
from stages.lib.processes.collectives import from_main
from stages.lib.processes.joining import join_processes

NUMBER = re.compile(r"\.\d+\.")
"""A part of a weight's name: which of several layers, or of several experts, it is of."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def initial_weights(ctx: Context, build: Callable[[], PreTrainedModel]) -> Path:
    """The folder with the weights that training starts from: `build()`, called once with the seed of the step.

    Only the main process builds and writes, on the CPU, while the others wait; all of them load from the folder
    afterwards, so that the start is the same whatever the number of processes and the memory layout. What `build` raises
    is raised in all of them. The folder survives a restart. For a model from scratch, or with a new head on a trained body.
    """
    folder = ctx.work / "initial"

    def write() -> None:
        if folder.exists():
            return
        set_seed(bounded_seed(ctx.seed, NUMPY_BITS))
        # A ZeRO-3 run before in this process would have the model split while it is built, which needs all processes.
        unset_hf_deepspeed_config()
        model = build().to(torch.float32)
        with replacing_folder(folder) as initial:
            model.save_pretrained(initial)

    join_processes(ctx)
    from_main(write)
    return folder


def read_weights(auto_class: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in `folder` as an `auto_class`, and what its weights lack: from safetensors only, without code from there.

    Raises `ArtifactError` if the folder holds weights of other sizes than its config says, or of layers that the model has and
    its config leaves no room for, or a generation config that cannot be saved again.
    """
    if auto_class is AutoModelForSequenceClassification:
        auto_class = classifier_class(folder)
    require_generation_config(folder)
    model, report = auto_class.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which are refused below, by name
        **options,
    )
    require_sizes(folder, report["mismatched_keys"])
    require_all_used(folder, model, report["unexpected_keys"])
    mend_generation(folder, model)
    # Where a file holds a head of its own, transformers does not tie it to the embeddings, whatever the config says.
    if head_stands_alone(model):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return model, report


def require_sizes(folder: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raises `ArtifactError` if weights have another size than the model's config says. A head of the class's own kind included:
    transformers would begin it anew.
    """
    if wrong := sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in mismatched):
        shown = "; ".join(f"{name} is {found}, and should be {wanted}" for name, found, wanted in wrong[:3])
        what = f"holds {len(wrong)} weights of other sizes than its config.json says: {shown}"
        raise ArtifactError(Problem(str(folder), what, "Get the config.json and the weights that belong together."))


def require_all_used(folder: Path, model: PreTrainedModel, left_over: Iterable[str]) -> None:
    """Raises `ArtifactError` if weights were left over for which the model has a place: a bias of a layer that it has, or a
    further layer like those that it has. What belongs to parts that the class does not have (another head, a vision tower,
    layers that predict several tokens) is passed over, and so are buffers of older versions.
    """
    modules = dict(model.named_modules())
    numbered = {NUMBER.sub(".0.", name) for name in model.state_dict()}
    config = model.config.get_text_config()
    first = int(getattr(config, "num_hidden_layers", 0) or 0)
    predicting = range(first, first + int(getattr(config, "num_nextn_predict_layers", 0) or 0))

    def has_place(name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and layer in modules:
            return "weight" in dict(modules[layer].named_parameters(recurse=False))
        found = NUMBER.search(name)
        return found is not None and int(found[0][1:-1]) not in predicting and NUMBER.sub(".0.", name) in numbered

    bare = f"{model.base_model_prefix}."
    lost = [key for key in sorted(left_over) if has_place(key) or has_place(bare + key)]
    if lost:
        what = f"holds {len(lost)} weights that its config.json leaves no room for: {', '.join(lost[:3])}"
        hint = (
            "Correct the config.json (num_hidden_layers, attention_bias and the like); or leave them out knowingly: "
            f"`from transformers import {type(model).__name__} as M; M.from_pretrained({str(folder)!r})"
            ".save_pretrained(FOLDER)`, and copy the tokenizer's files there."
        )
        raise ArtifactError(Problem(str(folder), what, hint))


def mend_generation(folder: Path, model: PreTrainedModel) -> None:
    """Makes the model's generation config one that can be saved, as `sound_generation` says."""
    if not model.can_generate() or model.generation_config is None:
        return
    fields = model.generation_config.to_diff_dict()
    said = {
        name: value for name, value in fields.items() if not name.startswith("_") and name != "transformers_version"
    }
    sound, mended = sound_generation(said, int(model.config.get_text_config().vocab_size))
    if mended:
        model.generation_config = GenerationConfig(**sound)


def require_generation_config(folder: Path) -> None:
    """Raises `ArtifactError` if the folder's generation config says what transformers neither reads nor writes."""
    if not holds_file(folder, GENERATION):
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError) as error:
        what = f"is of no use: {' '.join(str(error).split()):.300}"
        raise ArtifactError(Problem(str(folder / GENERATION), what, "Correct it, or remove the file.")) from error
    except OSError:
        return  # no JSON: transformers goes by the model's config, and `generation_notes` says so


def head_stands_alone(model: PreTrainedModel) -> bool:
    """Whether the config says that the head is that of the embeddings, and the weights that it is not."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    claimed = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return claimed and head is not None and head.weight is not embeddings.weight


def load_model(auto_class: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """The model in `folder` as an `auto_class` in float32, from safetensors only, without code from the folder.

    Raises `ArtifactError` if weights that the class needs are not in the folder, have another shape, or are quantized.
    """
    if read_config(folder).get("quantization_config"):
        what, hint = "holds quantized weights, which this stage does not read", "Name the model that it was made from."
        raise ArtifactError(Problem(str(folder), what, hint))
    model, report = read_weights(auto_class, folder, dtype=torch.float32, **options)
    holes = [*sorted(report["missing_keys"]), *(str(key) for key in report.get("mismatched_keys", ()))]
    if holes:
        raise ArtifactError(
            Problem(str(folder), f"does not hold the weights {', '.join(holes[:3])}", "Name a model of the right kind.")
        )
    return model


def without_dropout(model: Any) -> Any:
    """The model with the dropout of its modules switched off: else a policy and its reference would differ by chance.

    What its class drops by calling functions with other rates is switched off once it can be called: `training/dropout.py`.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def count_parameters(model: PreTrainedModel) -> int:
    """The number of parameters, tied ones counted once, whole also where ZeRO-3 has split them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> full shape of every parameter, tied ones once."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `DataError` if the tokenizer knows ids that the model has no embedding for."""
    rows = int(model.config.vocab_size)
    if len(tokenizer) > rows:
        raise DataError(
            Problem(
                "tokenizer",
                f"has {len(tokenizer)} tokens, and the model embeds {rows}",
                "Use the tokenizer that the model was trained with.",
            )
        )


def load_language_model(folder: Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The causal model in `folder`, quantized or not, in the precision it was published in, ready for inference.

    Quantized weights are unpacked to that precision while loading. Raises `ArtifactError` if weights are missing, or if the
    model says something else of the same tokens each time.
    """
    quantization = read_config(folder).get("quantization_config")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantization else {}
    with no_progress_bars(), warnings.catch_warnings():
        # Says that the folder's own quantization is used with our way of loading it, which is what we want.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model, report = read_weights(AutoModelForCausalLM, folder, dtype="auto", **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(Problem(str(folder), f"does not hold the weights {missing}", "Name a causal model."))
    model.to(device).eval()
    require_quiet(model, str(folder))
    return model


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps the bars of transformers and compressed-tensors off the console; what is logged still appears."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # compressed-tensors draws its bars on whatever sys.stderr is, and has no switch for them.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
