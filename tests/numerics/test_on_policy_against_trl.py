"""TRL as the oracle: the advantages of its GRPO and RLOO trainers, and the losses of GRPO, on completions that it sampled.

RLOO's loss is compared only through its advantages: TRL's takes the ratio of whole completions and a mean over them, ours
is the clipped ratio of each token and a mean over tokens.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.settings.resources import Resources
from stages.alignment.grpo import GRPO, GRPOParams
from stages.alignment.rloo import RLOO, RLOOParams
from stages.lib.on_policy.actor_critic import ActorCritic
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.learning import Learner
from stages.lib.on_policy.reward_params import LengthPenaltyReward
from stages.lib.on_policy.rewards import length_penalty
from stages.lib.on_policy.samples import Completion
from stages.lib.training.params import derive_batch
from tests.integration.tiny_language_model import make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""

PROMPTS = ["Say something.", "How are you today, my friend?", "Why?", "Count to three and stop."]
GROUP_SIZE = 4
TEMPERATURE = 0.8
BETA = 0.1
TRAINING: dict[str, Any] = {
    "rewards": [{"kind": "regular_expression", "pattern": "x"}],
    "rollouts": 1,
    "rollout_batch_size": 8,
    "global_batch_size": 8,
    "completions_per_prompt": GROUP_SIZE,
    "max_prompt_tokens": 64,
    "max_new_tokens": 12,
    "learning_rate": 3e-4,
    "temperature": TEMPERATURE,
    "kl_coefficient": BETA,
}
THEIRS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": GROUP_SIZE,
    "max_completion_length": 12,
    "max_steps": 2,
    "steps_per_generation": 1,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "temperature": TEMPERATURE,
    "beta": BETA,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 1,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(PROMPTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        # Likely in some contexts, so that some of the completions end before they are cut off.
        policy.lm_head.weight[tokenizer.eos_token_id] *= 4
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", "1")


def score(ids: list[int]) -> float:
    """What a completion is worth: some number that differs from one to the next."""
    return sum(ids) % 17 / 4 + len(ids) / 8


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [score(ids) for ids in completion_ids]


def recorded(trainer_class: Any, config_class: Any, model: Path, tokenizer: Any, out: Path, **more: Any) -> list[Any]:
    """Of every step: the batch, the model's weights before the step, and the loss."""
    from datasets import Dataset

    steps: list[Any] = []

    class Recording(trainer_class):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            weights = copy.deepcopy(model.state_dict())
            loss = super().compute_loss(model, inputs, *arguments, **options)
            batch = {name: value.detach().clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            steps.append(
                SimpleNamespace(batch=batch, weights=weights, loss=float(loss.detach()), gradient=flat(gradients))
            )
            return loss

    Recording(
        model=str(model),
        reward_funcs=reward,
        args=config_class(str(out), **{**THEIRS, **more}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    ).train()
    return steps


def flat(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.detach().flatten() for gradient in gradients])


def policy_of(model: Path, weights: Any = None) -> ActorCritic:
    """The policy that TRL began with, or one with these weights."""
    policy = LlamaForCausalLM.from_pretrained(model)
    if weights is not None:
        policy.load_state_dict(weights)
    return ActorCritic(policy.eval(), temperature=TEMPERATURE)


@torch.no_grad()
def experience_of(
    batch: dict[str, torch.Tensor], writer: ActorCritic, reference: ActorCritic
) -> tuple[Experience, list[int]]:
    """TRL's completions as ours, judged by our code, those of a prompt together; and which row of the batch each was."""

    def kept(ids: torch.Tensor, mask: torch.Tensor) -> list[int]:
        # TRL's mask is 0 of a completion that is left out because it was cut off; there all ids are tokens of it.
        return ids[mask.bool()].tolist() or ids.tolist()

    rows = [
        (kept(*prompt), kept(*completion))
        for prompt, completion in zip(
            zip(batch["prompt_ids"], batch["prompt_mask"], strict=True),
            zip(batch["completion_ids"], batch["completion_mask"], strict=True),
            strict=True,
        )
    ]
    order = sorted(range(len(rows)), key=lambda row: rows[row][0])
    nothing = np.zeros(0, dtype=np.float32)
    episodes = []
    for position, row in enumerate(order):
        prompt, ids = rows[row]
        whole_1T = torch.tensor([[*prompt, *ids]])
        said = [each(whole_1T, torch.ones_like(whole_1T), len(ids)).logprobs[0].numpy() for each in (writer, reference)]
        episodes.append(
            Episode(
                position=position,
                row_index=0,
                prompt_ids=np.array(prompt),
                ids=np.array(ids),
                ended=bool(batch["completion_mask"][row].any()),
                rewards=np.array([score(ids)]),
                generator_logprobs=nothing,
                logprobs=said[0],
                ref_logprobs=said[1],
                values=np.zeros(len(ids), dtype=np.float32),
            )
        )
    return Experience(episodes), order


def our_loss(
    params: GRPOParams, experience: Experience, policy: ActorCritic
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """The loss of all episodes as one step in two micro batches, its gradient, and what is logged."""
    engine: Any = SimpleNamespace(forward=policy, device=torch.device("cpu"))
    parts: Any = SimpleNamespace(engine=engine, padding_id=2)
    ctx: Any = SimpleNamespace(seed=0, resources=Resources(), world=SimpleNamespace(size=1))
    learner = Learner(ctx, params, GRPO(params), parts, derive_batch(8, Resources()))
    totals: dict[str, float] = {}
    tokens = float(sum(map(learner.learned_tokens, experience.episodes)))
    loss = 0.0
    for micro_batch in (experience.episodes[:3], experience.episodes[3:]):
        batch = learner.collate(micro_batch)
        batch["generator_logprobs"] = batch["logprobs"]
        part = learner.loss(batch, tokens, totals)
        part.backward()
        loss += float(part.detach())
    gradient = flat([parameter.grad for parameter in policy.parameters()])
    return loss, gradient, {name: float(value) / tokens for name, value in totals.items()}


SEQUENCES = {"importance_sampling_level": "sequence", "epsilon": 0.08, "epsilon_high": 0.12}
OF_SEQUENCES = {"clip_ratio": 0.08, "clip_ratio_high": 0.12}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_ratio_high": 0.28}),
    "grpo": ({"loss_type": "grpo"}, {"loss_aggregation": "seq_mean_token_mean"}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_aggregation": "seq_mean_token_sum_norm", "scale_by_deviation": False},
    ),
    "gspo": ({"loss_type": "grpo", **SEQUENCES}, {"policy_loss": "gspo", **OF_SEQUENCES}),
    "gspo_token": ({"loss_type": "grpo", **SEQUENCES}, {"policy_loss": "gspo_token", **OF_SEQUENCES}),
    "luspo": (
        {"loss_type": "luspo", **SEQUENCES},
        {"policy_loss": "gspo", "loss_aggregation": "seq_mean_token_sum", **OF_SEQUENCES},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"policy_loss": "cispo", "clip_ratio": 0.2, "clip_ratio_high": 0.1},
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 1.5},
        {"policy_loss": "sapo", "loss_options": {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 1.5}},
    ),
    "two-sided": ({"loss_type": "dapo", "delta": 1.35}, {"dual_clip": 1.35}),
    "scaled by the batch": ({"loss_type": "dapo", "scale_rewards": "batch"}, {"deviation_of": "batch"}),
    "not scaled": ({"loss_type": "dapo", "scale_rewards": "none"}, {"scale_by_deviation": False}),
    "without the truncated": (
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"mask_truncated_completions": True},
    ),
    "means without the truncated": (
        {"loss_type": "grpo", "mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_aggregation": "seq_mean_token_mean"},
    ),
}
"""Name -> options of TRL's trainer, and what a recipe says to train the same."""
NEVER_CLIPPED = {"sapo"}


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo(name: str, model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two steps on the same eight completions of two prompts: the same advantages, and before and after a step the same loss
    and the same gradient, though ours is computed in micro batches of three and five.

    Without TRL's bias correction, which weighs the divergence by the ratio (DeepSeek-V3.2), the divergence is that of
    DeepSeekMath.
    """
    from trl import GRPOConfig, GRPOTrainer

    theirs, ours = VARIANTS[name]
    options = {
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "num_iterations": 2,
        "use_bias_correction_kl": False,
        **theirs,
    }
    steps = recorded(GRPOTrainer, GRPOConfig, model, tokenizer, tmp_path, **options)
    assert len(steps) == 2
    assert torch.equal(steps[0].batch["completion_ids"], steps[1].batch["completion_ids"])
    clips = {} if name in NEVER_CLIPPED else {"clip_ratio": 0.2, "clip_ratio_high": 0.3}
    params = GRPOParams(**TRAINING, **{**clips, "kl_estimator": "k3", **ours})
    start = policy_of(model)
    logged: dict[str, float] = {}
    for step in steps:
        experience, order = experience_of(step.batch, start, start)
        scores_N = torch.tensor([float(each.rewards[0]) for each in experience.episodes], dtype=torch.float64)
        advantages_NK, returns_NK, _ = GRPO(params).advantages(experience, scores_N, BETA)
        theirs_N = step.batch["advantages"][order].double()
        assert len(set(theirs_N.tolist())) > 4
        torch.testing.assert_close(advantages_NK[:, 0], theirs_N, rtol=1e-5, atol=1e-5)
        learned = experience.with_advantages(advantages_NK, returns_NK)
        loss, gradient, logged = our_loss(params, learned, policy_of(model, step.weights))
        assert loss == pytest.approx(step.loss, rel=1e-4, abs=1e-5)
        assert float((gradient - step.gradient).norm() / step.gradient.norm()) < 1e-4
    # The comparison would see little if the second step were like the first, or one term hid the other.
    assert name in NEVER_CLIPPED or 0.05 < logged["clipped"] < 0.95
    assert logged["ratio"] != pytest.approx(1, abs=1e-3)
    assert logged["kl_loss"] > 0.01
    assert len(set(experience.lengths.tolist())) > 1
    assert ("truncated" in name) == (not experience.ended.all())


def test_the_soft_overlong_punishment_is_a_length_penalty() -> None:
    """DAPO's equation 13, as TRL has it: with 20 tokens at most and a cache of 8, nothing up to 12, then 1/8 a token."""
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)
    params = LengthPenaltyReward(kind="length_penalty", target_tokens=12, per_token=1 / 8)
    ours = length_penalty(params)
    lengths = range(1, 26)
    found = [ours("", Completion("", length, ended=True), {}) for length in lengths]
    assert found == theirs([[0] * length for length in lengths])
    assert (found[11], found[12], found[15], found[24]) == (0, -1 / 8, -1 / 2, -1)


def test_rloo(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two rollouts of eight completions of two prompts: the same advantages, also once the policy has left the reference."""
    from trl import RLOOConfig, RLOOTrainer

    steps = recorded(RLOOTrainer, RLOOConfig, model, tokenizer, tmp_path, learning_rate=3e-3)
    assert len(steps) == 2
    params = RLOOParams(**TRAINING)
    start = policy_of(model)
    for step in steps:
        experience, order = experience_of(step.batch, policy_of(model, step.weights), start)
        scores_N = torch.tensor([float(each.rewards[0]) for each in experience.episodes], dtype=torch.float64)
        advantages_NK, _, _ = RLOO(params).advantages(experience, scores_N, BETA)
        torch.testing.assert_close(advantages_NK[:, 0], step.batch["advantages"][order].double(), rtol=1e-4, atol=1e-4)
    gap = (experience.padded("logprobs") - experience.padded("ref_logprobs")).sum(dim=1)
    assert BETA * float(gap.std()) > 0.01, "the comparison would not see the penalty"
