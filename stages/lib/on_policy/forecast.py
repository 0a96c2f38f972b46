"""What `plan` can say of stages that train a policy on its own completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import ArtifactError, Problem, RecipeError
from pipeline.stage import Estimate, Forecast
from stages.lib.models.adapters.folders import adapter_folder, method_in, unreadable_adapter
from stages.lib.models.adapters.params import (
    VirtualTokens,
    mergeable_methods,
)
from stages.lib.models.arithmetic import completed
from stages.lib.models.lengths import length_problems
from stages.lib.models.memory import BYTES, state_bytes_per_rank
from stages.lib.models.noise import noise_problems
from stages.lib.on_policy.params import WITHOUT_BOTTLENECKS, OnPolicyParams
from stages.lib.on_policy.reward_params import Reward, learned
from stages.lib.preferring.reward_reading import StepsReading, reading_in, with_penalty
from stages.lib.text.template_forecast import untaught_problems, untemplated_problems
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.layouts import readable_layout, zero_stage_of
from stages.lib.training.params import derive_batch


def check_on_policy(forecast: Forecast) -> list[Problem]:
    """What is wrong with inputs, batch, layout and lengths, found before the step runs."""
    params: OnPolicyParams = forecast.params
    problems = check_training(forecast)
    roles = set(forecast.inputs)
    problems += reward_model_problems(forecast, params.rewards, critic=params.has_critic and params.adapter is None)
    problems += vllm_problems(forecast) if params.generation == "vllm" else []
    given = forecast.inputs.get("adapter", Estimate()).folder
    if given is not None and not unreadable_adapter(given) and method_in(adapter_folder(given)) == "bottleneck":
        problems.append(Problem("inputs.adapter", WITHOUT_BOTTLENECKS, "Name a lora, or a model without adapter."))
    if learned(params.rewards) and params.rendering == "raw":
        problems.append(Problem("params.rendering", "is raw, and a reward model scores conversations", "Write chat."))
    if ("chats" in roles) != bool(params.ptx_coefficient):
        problems.append(
            Problem("inputs.chats", "goes together with params.ptx_coefficient", "Give both, or leave both out.")
        )
    if "reference" in roles and not params.kl_coefficient:
        problems.append(Problem("inputs.reference", "is not used while kl_coefficient is 0", "Remove it."))
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    problems += room_problems(architecture, params) + noise_problems(architecture)
    problems += untaught_problems(forecast, reads_chats=params.rendering == "chat")
    problems += untemplated_problems(forecast, ["reward"] if learned(params.rewards) else [])
    size = params.rollout_batch_size
    if size % forecast.resources.world_size:
        problems.append(
            Problem(
                "params.rollout_batch_size",
                f"{size} cannot be shared by {forecast.resources.world_size} processes",
                "Take a multiple of their number.",
            )
        )
    try:
        if params.ptx_coefficient and params.ptx_batch_size:
            derive_batch(params.ptx_batch_size, forecast.resources)
    except RecipeError as error:
        problems += [replace(p, where="params.ptx_batch_size") for p in error.problems if isinstance(p, Problem)]
    return problems


def vllm_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong if completions are to be written by vLLM, which is given the policy's weights with what adapters add."""
    adapter, problems = forecast.params.adapter, []
    if forecast.resources.device == "cpu":
        problems.append(Problem("params.generation", "is vllm, and resources.device is cpu", "Write transformers."))
    if isinstance(adapter, VirtualTokens):
        what = f"is vllm, which is given the policy's weights, and the virtual tokens of {adapter.method} are none"
        problems.append(Problem("params.generation", what, f"Write transformers, or take {mergeable_methods()}."))
    config = completed(forecast.inputs.get("model", Estimate()).architecture or {}) or {}
    named = getattr(adapter, "target_modules", None)
    head = OUTPUT_LAYERS & set(named if isinstance(named, list) else [])
    if head and config.get("tie_word_embeddings"):
        what = f"names {min(head)}, which in this model is the embeddings: vLLM has no place for one that is another"
        hint = "Leave it out, or write `generation: transformers`."
        problems.append(Problem("params.adapter.target_modules", what, hint))
    return problems


OUTPUT_LAYERS = frozenset({"lm_head", "embed_out"})


def reward_model_problems(forecast: Forecast, rewards: Sequence[Reward], *, critic: bool = False) -> list[Problem]:
    """What is wrong if the input `reward` and the rewards do not go together. `critic`: whether one may start from it."""
    asked = learned(rewards)
    if "reward" not in forecast.inputs:
        what = "is missing, and params.rewards asks for reward_model"
        return [Problem("inputs.reward", what, "Add it.")] if asked else []
    try:
        reading = reading_in(forecast.inputs["reward"].architecture or {}, "inputs.reward")
        if asked is None and (isinstance(reading, StepsReading) or not critic):
            return [
                Problem(
                    "inputs.reward", "is given, and no reward uses it", "Add {kind: reward_model} to params.rewards."
                )
            ]
        # Of a reward model that another step makes from a model not known yet, its heads are not known.
        if asked is not None and forecast.inputs["reward"].architecture:
            with_penalty(reading, asked.uncertainty_penalty, "inputs.reward")
    except ArtifactError as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def room_problems(architecture: Mapping[str, Any], params: OnPolicyParams) -> list[Problem]:
    """What is wrong if a prompt and its completion, behind virtual tokens, are together longer than the model takes."""
    virtual = params.adapter.num_virtual_tokens if isinstance(params.adapter, VirtualTokens) else 0
    behind = f" behind {virtual} virtual tokens" if virtual else ""
    what = f"{params.max_prompt_tokens} and max_new_tokens {params.max_new_tokens}{behind} are {{tokens}}"
    length = params.max_prompt_tokens + params.max_new_tokens + virtual
    return length_problems(architecture, length, where="params.max_prompt_tokens", what=what, hint="Lower one of them.")


def estimate_on_policy(forecast: Forecast) -> Estimate:
    """Steps, batch, and memory: policy and critic in training, reference and reward model frozen beside them."""
    params: OnPolicyParams = forecast.params
    model = forecast.inputs.get("model", Estimate())
    length = params.max_prompt_tokens + params.max_new_tokens
    known = estimate_training(
        forecast,
        architecture=model.architecture,
        parameters=model.parameters,
        num_rows=forecast.inputs.get("prompts", Estimate()).train_rows,
        # In memory a pair is as much as one sequence of twice the length.
        sequence_length=params.completions_per_row * length,
        vocabulary_size=model.vocabulary_size,
        total_steps=params.total_steps,
        without_dropout=True,
    )
    known = replace(known, sequence_length=length)
    if known.memory_bytes_per_rank is None or known.parameters is None:
        return known
    width = BYTES[params.precision] if forecast.resources.deepspeed else BYTES["fp32"]
    beside = (frozen_beside(forecast, known.parameters) + replicated(forecast, known.parameters)) * width
    if params.adapter is not None:
        return with_shared_backbone(forecast, known, beside, width)
    memory, disk = known.memory_bytes_per_rank, known.disk_bytes
    if params.has_critic:
        value = forecast.inputs.get("value", forecast.inputs.get("reward", model)).parameters or known.parameters
        memory += round(memory * value / known.parameters)
        disk = disk + round(disk * value / known.parameters) if disk is not None else None
    return replace(known, memory_bytes_per_rank=memory + beside, disk_bytes=disk)


def frozen_beside(forecast: Forecast, parameters: int) -> int:
    """The parameters of the frozen models beside the policy: the reward model, and a reference that is a model of its own."""
    params: OnPolicyParams = forecast.params
    reward = forecast.inputs.get("reward", Estimate()).parameters or 0
    own_reference = params.adapter is None or "reference" in forecast.inputs
    return reward + (parameters if params.kl_coefficient and own_reference else 0)


def replicated(forecast: Forecast, parameters: int) -> int:
    """The parameters of the copy of the policy that writes completions; 0 where the policy that is trained writes them itself."""
    params: OnPolicyParams = forecast.params
    split = zero_stage_of(readable_layout(forecast.resources)) == 3
    return parameters if params.background_rollouts or (split and params.generation == "transformers") else 0


def with_shared_backbone(forecast: Forecast, known: Estimate, beside: int, width: int) -> Estimate:
    """The estimate under an adapter, where policy, critic and reference share what is frozen.

    A critic adds its own adapter and activations. Of weights of the model that are trained in place, the reference has a copy.
    """
    params: OnPolicyParams = forecast.params
    assert known.parameters is not None and known.memory_bytes_per_rank is not None
    memory, disk = known.memory_bytes_per_rank, known.disk_bytes
    trained, added = known.trained_parameters, known.added_parameters or 0
    in_place = known.parameters if trained is None else trained - added
    if params.has_critic:
        frozen = state_bytes_per_rank(
            parameters=known.parameters - in_place,
            trained=0,
            layout=readable_layout(forecast.resources),
            world_size=forecast.resources.world_size,
            precision=params.precision,
        )
        memory += memory - frozen
        if disk is not None:
            disk += disk - (0 if params.publishes_adapter else 4 * known.parameters)
    copied = in_place * width if params.kl_coefficient and "reference" not in forecast.inputs else 0
    return replace(known, memory_bytes_per_rank=memory + copied + beside, disk_bytes=disk)
