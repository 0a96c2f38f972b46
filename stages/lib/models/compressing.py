"""llm-compressor, kept quiet and taken at its word: what it could not carry out is an error."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_modifier: Callable[[], Any],
    batches: Any,
    out: Path,
    log: Path,
) -> None:
    """Quantizes `model` with llm-compressor and writes it to `out` in the compressed-tensors format; its log goes to `log`.

    `batches` are what it is calibrated with; None where nothing is. Raises `DataError` where gptq could not be carried
    out, whether llm-compressor rounded to nearest instead or gave up.
    """
    with quiet_compressor(log):
        from llmcompressor import oneshot, reset_session

        try:
            oneshot(
                model=model,
                tokenizer=tokenizer,
                recipe=make_modifier(),
                dataset=batches,
                pipeline="datafree" if batches is None else "sequential",
            )
        except torch.linalg.LinAlgError as error:
            # A Hessian that has an inverse by a hair, whose inverse then has no factors.
            raise unsolved(str(error)) from error
        else:
            with left_as_saved():
                model.save_pretrained(out, save_compressed=True)
        finally:
            reset_session()
    # Says nothing that config.json does not say.
    (out / "recipe.yaml").unlink(missing_ok=True)


def strict_gptq(**options: Any) -> Any:
    """llm-compressor's `GPTQModifier` of these options, where a layer that GPTQ did not quantize is a `DataError`.

    Its own answer to such a layer is to round it to nearest: with a line in its log where the statistics have no inverse,
    without one where no calibration text reached the layer.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    class StrictGPTQ(GPTQModifier):  # type: ignore[misc, unused-ignore]
        def on_finalize(self, state: Any, **more: Any) -> bool:
            rounded, reached, wanted = self._rtn_fallback_module_names, self._num_compressed_modules, self._module_names
            if rounded:
                raise unsolved(f"{len(rounded)} of {reached} layers ({', '.join(rounded[:5])})")
            if reached < len(wanted):
                raise DataError(
                    Problem(
                        "params.calibration_rows",
                        f"the calibration text reached {reached} of {len(wanted)} layers",
                        "Raise calibration_rows, ignore the layers that no text reaches, or round to nearest.",
                    )
                )
            return bool(super().on_finalize(state, **more))

    return StrictGPTQ(**options)


def unsolved(what: str) -> DataError:
    hint = "Raise dampening or calibration_rows, or round to nearest."
    return DataError(Problem("params.dampening", f"Hessian inversion failed: {what}", hint))


@contextlib.contextmanager
def left_as_saved() -> Iterator[None]:
    """The model is not made fit for use again once it is saved: nobody uses it, and now and then it cannot be (packed weights,
    which are whole numbers, are then taken to be no parameters).
    """
    from llmcompressor.transformers.compression import compressed_tensors_utils as saving

    restore = saving.from_accelerate
    saving.from_accelerate = lambda model: None
    try:
        yield
    finally:
        saving.from_accelerate = restore


@contextlib.contextmanager
def quiet_compressor(path: Path) -> Iterator[None]:
    """Sends what llm-compressor and the libraries below it say to the file at `path`.

    Must be entered before llm-compressor is imported, which sets up a log on the console.
    """
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    level = tracing.level
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        stack.enter_context(warnings.catch_warnings())
        # A model that llm-compressor moved about is saved as if it were offloaded to another device.
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        tracing.setLevel(logging.ERROR)
        stack.callback(tracing.setLevel, level)
        import llmcompressor  # noqa: F401 (for its log's handlers, which are replaced here)
        from loguru import logger

        logger.remove()
        stack.callback(logger.remove)
        logger.add(file, level="INFO")
        yield
