"""Completions by vLLM in the trainer's own processes, on the trainer's own GPUs: one engine per process.

It lies asleep, without weights or cache on the GPU, while the policy is trained. Before each phase of generation it is woken
and given the policy's present weights. Its arithmetic is not the trainer's: `generator_logprob_gap` in the journal says by
how much the two differ, `mismatch_cap` corrects it, and `max_logprob_mismatch` stops a run where it is too large.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pipeline.errors import LaunchError, Problem
from stages.lib.generating.sampling import Sampled
from stages.lib.processes.collectives import barrier
from stages.lib.training.engine import Engine


def require_vllm(device_type: str) -> None:
    """Raises `LaunchError` unless vLLM is installed and there is a GPU for it."""
    if importlib.util.find_spec("vllm") is None:
        raise LaunchError(
            Problem(
                "params.generation",
                "is vllm, which is not installed",
                "Install it into an environment of its own, as CONTRIBUTING.md says, or take transformers.",
            )
        )
    if device_type != "cuda":
        raise LaunchError(Problem("params.generation", "is vllm, which needs a GPU", "Take transformers."))


class VllmEngine:
    """vLLM's engine of this process."""

    def __init__(self, folder: Path, *, precision: str, memory_fraction: float, max_length_tokens: int) -> None:
        # In this process, so that its weights can be set from here.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm: Any = LLM(
            model=str(folder),
            dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
            tensor_parallel_size=1,
            gpu_memory_utilization=memory_fraction,
            max_model_len=max_length_tokens,
            distributed_executor_backend="external_launcher",
            enable_sleep_mode=True,
            # Or vLLM would draw with what the folder's generation config says.
            generation_config="vllm",
            # The probabilities that completions are drawn from, after the temperature.
            logprobs_mode="processed_logprobs",
        )
        self.llm.sleep(level=2)
        barrier()

    def load(self, weights: Iterator[tuple[str, Any]]) -> None:
        """Wakes the engine and replaces all its weights."""
        self.llm.wake_up(tags=["weights"])
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, tensor in weights:
            model.load_weights([(name, tensor)])
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms_BK: NDArray[np.float64],
        *,
        stop_ids: Sequence[int],
        temperature: float,
    ) -> list[Sampled]:
        """A completion of each prompt. Each row's first number seeds its own random generator, as vLLM has them."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=uniforms_BK.shape[1],
                stop_token_ids=list(stop_ids),
                ignore_eos=True,  # the stop ids say all
                seed=int(numbers[0] * 2**31),
                logprobs=0,
                detokenize=False,
            )
            for numbers in uniforms_BK
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [
            sampled_of(output.outputs[0], stop_ids) for output in self.llm.generate(asked, settings, use_tqdm=False)
        ]


def sampled_of(output: Any, stop_ids: Sequence[int]) -> Sampled:
    """vLLM's completion in our terms. It leaves the stop token in `token_ids`."""
    ids = np.asarray(output.token_ids, dtype=np.int64)
    logprobs = [choices[token].logprob for token, choices in zip(output.token_ids, output.logprobs, strict=True)]
    return Sampled(ids, np.asarray(logprobs, dtype=np.float32), ended=bool(len(ids)) and int(ids[-1]) in set(stop_ids))


class VllmGenerator:
    """The policy as vLLM has it. `ready` brings its weights up to date."""

    def __init__(self, engine: Engine, policy: nn.Module, vllm: VllmEngine) -> None:
        self.engine = engine
        self.policy = policy
        self.vllm = vllm
        self.chunk_size = 2**31
        """vLLM spreads the completions over its own batches."""

    @contextlib.contextmanager
    def ready(self) -> Iterator[VllmEngine]:
        """The engine to generate with. All processes enter together."""
        self.vllm.load(self.weights())
        try:
            yield self.vllm
        finally:
            self.vllm.llm.sleep(level=2)

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Name -> whole weight of the model without an adapter, one after the other, what adapters add included.

        It is added to a copy: the weights under an adapter are those of reference and critic, too, and adding to them and
        taking away again would leave rounding behind.
        """
        layers = {name: layer for name, layer in self.policy.named_modules() if isinstance(layer, BaseTunerLayer)}
        saved = [name for name, part in self.policy.named_modules() if isinstance(part, ModulesToSaveWrapper)]
        for name, parameter in self.policy.named_parameters():
            home = next((place for place in (*layers, *saved) if name.startswith(f"{place}.")), None)
            if home in layers:
                if not name.startswith(f"{home}.base_layer."):
                    continue  # a part of the adapter
                layer = layers[home]
                with self.engine.whole(list(layer.parameters())):
                    yield of_base(name.replace(".base_layer.", ".")), merged_weight(layer, name.rpartition(".")[2])
                continue
            if home is not None and not name.startswith(f"{home}.modules_to_save."):
                continue  # what a module that is trained whole was at first
            with self.engine.whole([parameter]):
                yield of_base(name.replace(".modules_to_save.default.", ".")), parameter.detach()


def of_base(name: str) -> str:
    """What a parameter of peft's model is called in the model that it is around."""
    return name.removeprefix("base_model.model.")


@torch.no_grad()
def merged_weight(layer: Any, name: str) -> Any:
    """A parameter of the layer under an adapter as merging would leave it. The layer itself stays as it is."""
    base = copy.copy(layer.base_layer)
    own = {key: nn.Parameter(p.detach().clone(), False) for key, p in base.named_parameters(recurse=False)}
    base.__dict__["_parameters"] = {**base._parameters, **own}
    merging = copy.copy(layer)
    merging.__dict__ |= {"_modules": {**layer._modules, "base_layer": base}, "merged_adapters": [], "_caches": {}}
    merging.merge()
    return own[name].detach()
