"""What the recipes of on-policy stages may say, and what `plan` finds wrong with them before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Problem
from pipeline.settings.resources import Resources
from pipeline.settings.strict import content_of
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind
from stages import STAGES
from tests.unit.running_stages import params_of, problems_of

LENGTH_PENALTY = {"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1}
LEARNED = {"kind": "reward_model"}
PARAMS: dict[str, Any] = {
    "rewards": [LENGTH_PENALTY],
    "rollouts": 3,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "max_prompt_tokens": 24,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
}
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
MODEL = Estimate(parameters=1000, architecture=ARCHITECTURE, vocabulary_size=100)
LORA = {"adapter": {"method": "lora"}}
ALL = ("ppo", "grpo", "rloo", "reinforce_plus_plus", "online_dpo")


def problems(
    kind: str, changes: dict[str, Any] | None = None, inputs: tuple[str, ...] = (), **resources: Any
) -> list[Problem]:
    """What the stage says of a recipe with a model, prompts and these further inputs."""
    stage = STAGES[kind]
    known = {"model": MODEL, "prompts": Estimate(train_rows=50), **dict.fromkeys(inputs, MODEL)}
    return stage.check(Forecast(stage.params(**{**PARAMS, **(changes or {})}), Resources(**resources), known))


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_wrong_with_a_sound_recipe(kind: str) -> None:
    """The prompt and its completion fill the 32 positions exactly."""
    assert problems(kind) == []
    assert problems(kind, {"rewards": [LEARNED]}, ("reward",)) == []
    assert problems(kind, {"ptx_coefficient": 0.1}, ("chats", "reference")) == []


@pytest.mark.parametrize(
    ("changes", "inputs", "resources", "where", "what"),
    [
        ({"rewards": [LEARNED]}, (), {}, "inputs.reward", "is missing"),
        ({}, ("reward",), {}, "inputs.reward", "no reward uses it"),
        ({"rewards": [LEARNED], "rendering": "raw"}, ("reward",), {}, "params.rendering", "scores conversations"),
        ({"ptx_coefficient": 0.1}, (), {}, "inputs.chats", "goes together"),
        ({}, ("chats",), {}, "inputs.chats", "goes together"),
        ({"kl_coefficient": 0}, ("reference",), {}, "inputs.reference", "is not used"),
        ({"max_prompt_tokens": 25}, (), {}, "params.max_prompt_tokens", "25 and max_new_tokens 8 are 33"),
        ({"generation": "vllm"}, (), {"device": "cpu"}, "params.generation", "resources.device is cpu"),
        ({}, (), {"micro_batch_size": 3}, "params.global_batch_size", "8 is not a multiple of 3"),
        ({}, (), {"deepspeed": "zero_2"}, "resources.deepspeed", "no memory layout"),
        (
            {"ptx_coefficient": 0.1, "ptx_batch_size": 5},
            ("chats",),
            {"processes": 2},
            "params.ptx_batch_size",
            "5 is not a multiple of 2",
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_by_plan(
    changes: dict[str, Any], inputs: tuple[str, ...], resources: dict[str, Any], where: str, what: str
) -> None:
    (problem,) = problems("grpo", changes, inputs, **resources)
    assert problem.where == where and what in str(problem) and problem.hint


def reward_made_by(role: str, **params: Any) -> Estimate:
    """What `plan` knows of a reward model that a step is to make."""
    stage = STAGES["reward"]
    fields = {"global_batch_size": 2, "max_length_tokens": 32, "max_steps": 1, "learning_rate": 1e-3, **params}
    return stage.estimate(Forecast(stage.params(**fields), Resources(), {"model": MODEL, role: Estimate(train_rows=9)}))


def test_reward_models_that_are_not_made_yet_are_known_for_what_they_judge() -> None:
    """A critic starts from no model of steps, and one head is not apart from itself."""

    def found(kind: str, made: Estimate, rewards: list[dict[str, Any]]) -> list[str]:
        stage = STAGES[kind]
        known = {"model": MODEL, "prompts": Estimate(train_rows=50), "reward": made}
        params = stage.params(**{**PARAMS, "rewards": rewards})
        return [
            str(each) for each in stage.check(Forecast(params, Resources(), known)) if each.where == "inputs.reward"
        ]

    programmatic = PARAMS["rewards"]
    careful = [{**LEARNED, "uncertainty_penalty": 0.5}]
    plain, steps = reward_made_by("preferences"), reward_made_by("step_labels")
    assert found("ppo", plain, programmatic) == found("ppo", steps, [LEARNED]) == found("grpo", plain, [LEARNED]) == []
    assert "no reward uses it" in found("ppo", steps, programmatic)[0]
    for made in (plain, steps):
        assert "has one head, and uncertainty_penalty is 0.5" in found("grpo", made, careful)[0]
    assert found("grpo", reward_made_by("preferences", heads=4), careful) == []


def test_a_rollout_must_be_shared_by_the_processes() -> None:
    """The batch of a step, a divisor of the rollout's, cannot be shared either: both are told."""
    found = {problem.where: str(problem) for problem in problems("grpo", {}, processes=3)}
    assert set(found) == {"params.global_batch_size", "params.rollout_batch_size"}
    assert "16 cannot be shared by 3 processes" in found["params.rollout_batch_size"]


def test_problems_are_told_together() -> None:
    changes = {"rewards": [LEARNED], "rendering": "raw", "kl_coefficient": 0, "max_new_tokens": 9}
    assert [problem.where for problem in problems("rloo", changes, ("reference", "chats"), micro_batch_size=5)] == [
        "params.global_batch_size",
        "inputs.reward",
        "params.rendering",
        "inputs.chats",
        "inputs.reference",
        "params.max_prompt_tokens",
    ]


def test_a_reward_model_that_only_the_critic_starts_from() -> None:
    """With PPO it is of use without a reward that asks for it; the others have no critic."""
    assert problems("ppo", {}, ("reward",)) == []
    assert [problem.where for problem in problems("rloo", {}, ("reward",))] == ["inputs.reward"]
    assert [problem.where for problem in problems("ppo", LORA, ("reward",))] == ["inputs.reward"]


def test_a_critic_beside_an_adapter_is_refused() -> None:
    assert problems("ppo", {}, ("value",)) == []
    (problem,) = problems("ppo", LORA, ("value",))
    assert problem.where == "inputs.value" and "shares the policy's backbone" in str(problem)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("ppo", {"global_batch_size": 5}, "rollout_batch_size 16 is not a multiple of global_batch_size 5"),
        ("grpo", {"completions_per_prompt": 3}, "rollout_batch_size 16 is not a multiple of completions_per_prompt 3"),
        ("rloo", {"completions_per_prompt": 1}, "greater than or equal to 2"),
        ("ppo", {"warmup_steps": 24}, "warmup_steps 24 must be below the 24 optimizer steps"),
        ("rloo", {"warmup_steps": 6}, "warmup_steps 6 must be below the 6 optimizer steps"),
        ("ppo", {"ptx_batch_size": 4}, "have no effect while ptx_coefficient is 0"),
        ("ppo", {"kl_coefficient": 0, "kl_target": 0.1}, "kl_target cannot be reached from a kl_coefficient of 0"),
        ("ppo", {"kl_horizon": 80.0}, "kl_horizon has no effect without a kl_target"),
        ("grpo", {"learning_rate": float("inf")}, "params.learning_rate: input should be a finite number"),
        ("ppo", {"adapter": {"method": "lora", "target_modules": []}}, "target_modules names nothing"),
        ("ppo", {"adapter": {"method": "lora", "dropout": 0.1}}, "adapter: dropout must be 0"),
        ("grpo", {"adapter": {"method": "lora", "quantize_base": "nf4"}}, "adapter: quantize_base must be null"),
        ("ppo", {"adapter": {"method": "lora", "init": "pissa"}}, "adapter: init must not be pissa"),
        (
            "ppo",
            {"adapter": {"method": "adalora"}},
            "adapter: adalora finds its ranks in trainings on fixed data alone",
        ),
        (
            "grpo",
            {"adapter": {"method": "bottleneck"}},
            "adapter: is bottleneck, which puts networks between the layers",
        ),
        ("grpo", {"adapter": {"method": "prefix_tuning", "publish": "merged"}}, "Set publish: adapter"),
        (
            "rloo",
            {"lora": {"rank": 4, "target_modules": ["q_proj"]}},
            "is a method of adapter now: write `adapter: {method: lora, rank: 4, target_modules: [q_proj]}` in its place",
        ),
        ("ppo", {"rewards": [{"kind": "regular_expression", "pattern": ""}]}, "'' matches every text"),
        ("grpo", {"kl_estimator": "k1"}, "k2"),
        ("grpo", {"precision": "fp16"}, "fp32"),
        ("ppo", {"rewards": []}, "rewards"),
        ("ppo", {"rewards": [LEARNED, LEARNED]}, "reward_model stands there more than once"),
        ("ppo", {"rewards": [{"kind": "lenght_penalty"}]}, "Did you mean 'length_penalty'"),
        ("ppo", {"clip_ratio": 1.0}, "less than 1"),
        ("ppo", {"temperature": 0}, "greater than"),
        ("ppo", {"gae_lambda": 1.5}, "gae_lambda"),
        ("ppo", {"adapter": {"method": "lora", "ranks": 4}}, "ranks"),
        ("ppo", {"completions_per_prompt": 4}, "completions_per_prompt"),
    ],
)
def test_params_that_are_refused(kind: str, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """16 / 8 steps a pass; 4 passes x 3 rollouts for ppo, one pass for the others: 24 and 6 steps."""
    params_of(STAGES[kind].params, PARAMS, tmp_path)
    assert sentence in problems_of(STAGES[kind].params, {**PARAMS, **changes}, tmp_path)


def test_steps_by_hand() -> None:
    """48 completions in steps of 8 are 6 steps a pass; 3 passes, 5 rollouts."""
    params = STAGES["grpo"].params(
        **{**PARAMS, "rollout_batch_size": 48, "rollouts": 5, "epochs_per_rollout": 3, "completions_per_prompt": 6}
    )
    assert (params.passes_steps, params.rollout_steps, params.total_steps, params.group_size) == (6, 18, 90, 6)
    known = {"model": MODEL, "prompts": Estimate(train_rows=50)}
    estimate = STAGES["grpo"].estimate(Forecast(params, Resources(), known))
    assert estimate.optimizer_steps == 90 and estimate.sequence_length == 32


def memory(kind: str, changes: dict[str, Any], inputs: dict[str, Estimate] | None = None) -> int:
    stage = STAGES[kind]
    known = {"model": MODEL, "prompts": Estimate(train_rows=50), **(inputs or {})}
    found = stage.estimate(Forecast(stage.params(**{**PARAMS, **changes}), Resources(), known)).memory_bytes_per_rank
    assert found is not None
    return found


def test_the_plan_counts_what_lies_in_memory() -> None:
    """1000 parameters in fp32: 4000 bytes for each model that is frozen; under lora there is one, without gradients (4)
    and moments (8), and the activations of the policy and those of the critic come to it."""
    alone = memory("grpo", {"kl_coefficient": 0})
    assert memory("grpo", {}) == alone + 4000
    with_reward = memory("grpo", {"rewards": [LEARNED]}, {"reward": Estimate(parameters=500)})
    assert with_reward == alone + 4000 + 2000
    assert memory("ppo", {"kl_coefficient": 0}) == 2 * alone, "a critic of the same size is trained beside the policy"
    activations = alone - 16_000
    # Rank 1 on four projections of 8 x 8 and three of 8 x 16: 4 (8 + 8) + 3 (8 + 16), 16 bytes each.
    adapter = 16 * (4 * 16 + 3 * 24)
    one = {"adapter": {"method": "lora", "rank": 1}}
    assert memory("grpo", one) == 4000 + adapter + activations
    assert memory("ppo", one) == 4000 + 2 * (adapter + activations)
    assert memory("grpo", one, {"reference": MODEL}) == memory("grpo", one) + 4000
    # Of a layer that is trained in place the reference has a copy: q, k, v, o, the three of the MLP, two norms.
    layer = 4 * 64 + 3 * 128 + 2 * 8
    two = {
        "model": Estimate(parameters=2000, architecture={**ARCHITECTURE, "num_hidden_layers": 2}, vocabulary_size=100)
    }
    last = {"adapter": {"method": "freeze", "last_layers": 1}}
    without_reference = memory("grpo", {**last, "kl_coefficient": 0}, two)
    assert without_reference == memory("grpo", {"kl_coefficient": 0}, two) - 12 * (2000 - layer)
    assert memory("grpo", last, two) == without_reference + 4 * layer


@pytest.mark.parametrize("kind", ALL)
def test_the_plan_counts_what_is_trained(kind: str) -> None:
    """Rank 2 on q_proj of one layer: 2 (8 + 8); an adapter alone is what is kept."""
    stage = STAGES[kind]
    adapter = {"method": "lora", "rank": 2, "target_modules": ["q_proj"], "publish": "adapter"}
    params = stage.params(**PARAMS, adapter=adapter)
    known = {"model": MODEL, "prompts": Estimate(train_rows=50)}
    estimate = stage.estimate(Forecast(params, Resources(keep_checkpoints=1), known))
    assert (estimate.parameters, estimate.trained_parameters, estimate.added_parameters) == (1000, 32, 32)
    assert estimate.adapter == "lora" and estimate.notes is not None and "an adapter alone" in estimate.notes[0]
    policies = 2 if kind == "ppo" else 1
    assert estimate.disk_bytes == policies * (4 + 18 * 2) * 32, "the adapter, and two checkpoints at most"
    assert stage.output_kind(params, {}) is Kind.ADAPTER


def test_what_an_adapter_does_not_go_with_is_refused_by_plan() -> None:
    """Virtual tokens take their place: 24 + 8 + 4 are more than the 32 positions, and vLLM is given weights alone."""
    prefix = {"adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}}
    (problem,) = problems("grpo", prefix)
    assert "24 and max_new_tokens 8 behind 4 virtual tokens are 36" in str(problem)
    shorter = {**prefix, "max_prompt_tokens": 20}
    assert problems("grpo", shorter) == []
    (problem,) = problems("grpo", {**shorter, "generation": "vllm"}, device="cuda")
    assert problem.where == "params.generation" and "or take lora" in str(problem)
    head = {"adapter": {"method": "lora", "target_modules": ["q_proj", "lm_head"]}, "generation": "vllm"}
    assert problems("grpo", head, device="cuda") == []
    tied = {"model": replace(MODEL, architecture={**ARCHITECTURE, "tie_word_embeddings": True})}
    stage, known = STAGES["grpo"], {**tied, "prompts": Estimate(train_rows=50)}
    for generation, expected in (("vllm", ["params.adapter.target_modules"]), ("transformers", [])):
        params = stage.params(**{**PARAMS, **head, "generation": generation})
        assert [each.where for each in stage.check(Forecast(params, Resources(device="cuda"), known))] == expected
    (problem,) = problems("ppo", shorter, gradient_checkpointing=True)
    assert problem.where == "resources.gradient_checkpointing"
    (problem,) = problems("ppo", {"adapter": {"method": "bitfit"}})
    assert problem.where == "params.adapter" and "finds nothing to train" in str(problem)
    (problem,) = problems("ppo", {"adapter": {"method": "continued"}})
    assert problem.where == "params.adapter.method" and "no input adapter" in str(problem)


@pytest.mark.parametrize("kind", ALL)
def test_what_was_made_without_an_adapter_keeps_its_identity(kind: str) -> None:
    """Its params say as ever that there is no `lora`, and nothing of an adapter."""
    content = content_of(STAGES[kind].params(**PARAMS, lora=None), str)
    assert content["lora"] is None and "adapter" not in content


BACKGROUND = {"background_rollouts": True, "mismatch_cap": 2.0}


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("ppo", {"mismatch_cap": None}, "mismatch_cap must be given"),
        ("ppo", {"max_logprob_mismatch": 0.1}, "max_logprob_mismatch would count what the policy has learned"),
        ("ppo", {"generation": "vllm"}, "generation vllm has a GPU for itself only while nothing is learned"),
        (
            "ppo",
            {"episodes": {"path": __file__, "function": "problems"}, "max_new_tokens": 512},
            "episodes of several turns are not written",
        ),
        ("grpo", {"dynamic_sampling": {}}, "dynamic_sampling draws by what completions are worth"),
        ("ppo", {"rollouts": 1}, "rollouts is 1, and there is no next one"),
        ("online_dpo", {"mismatch_cap": None}, "background_rollouts has completions of an earlier policy"),
    ],
)
def test_what_is_not_written_in_the_background(kind: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        STAGES[kind].params(**{**PARAMS, **BACKGROUND, **changes})


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "reinforce_plus_plus"])
def test_a_copy_of_the_policy_that_writes_is_reckoned_with(kind: str) -> None:
    """4000 bytes of 1000 weights in fp32; under ZeRO-3 there is such a copy in any case."""
    assert problems(kind, BACKGROUND) == []

    def memory(changes: dict[str, Any], **resources: Any) -> int:
        known = {"model": MODEL, "prompts": Estimate(train_rows=50)}
        stage = STAGES[kind]
        forecast = Forecast(stage.params(**{**PARAMS, **changes}), Resources(**resources), known)
        assert stage.estimate is not None
        bytes_ = stage.estimate(forecast).memory_bytes_per_rank
        assert bytes_ is not None
        return bytes_

    assert memory(BACKGROUND) - memory({"mismatch_cap": 2.0}) == 4000
    assert memory(BACKGROUND, deepspeed="zero3") == memory({"mismatch_cap": 2.0}, deepspeed="zero3")
