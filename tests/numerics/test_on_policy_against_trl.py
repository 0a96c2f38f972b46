"""TRL as the oracle: the advantages of its GRPO and RLOO trainers, and the loss of GRPO, on completions that it sampled.

RLOO's loss is compared only through its advantages: TRL's takes the ratio of whole completions and a mean over them, ours
is the clipped ratio of each token and a mean over tokens.
"""

from __future__ import annotations

import copy
import os
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
from stages.lib.on_policy.experience import Episode, Experience, collate_episodes
from stages.lib.on_policy.learning import Learner
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
            steps.append(SimpleNamespace(batch=batch, weights=weights, loss=float(loss.detach())))
            return loss

    Recording(
        model=str(model),
        reward_funcs=reward,
        args=config_class(str(out), **{**THEIRS, **more}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    ).train()
    return steps


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
        return ids[mask.bool()].tolist()

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
                ended=True,
                rewards=np.array([score(ids)]),
                generator_logprobs=nothing,
                logprobs=said[0],
                ref_logprobs=said[1],
                values=np.zeros(len(ids), dtype=np.float32),
            )
        )
    return Experience(episodes), order


def our_loss(params: GRPOParams, experience: Experience, policy: ActorCritic) -> tuple[float, dict[str, float]]:
    engine: Any = SimpleNamespace(forward=policy, device=torch.device("cpu"))
    parts: Any = SimpleNamespace(engine=engine)
    ctx: Any = SimpleNamespace(seed=0, resources=Resources(), world=SimpleNamespace(size=1))
    learner = Learner(ctx, params, GRPO(params), parts, derive_batch(8, Resources()))
    totals: dict[str, float] = {}
    batch = collate_episodes(experience.episodes, 2)
    batch["generator_logprobs"] = batch["logprobs"]
    tokens = float(experience.lengths.sum())
    loss = learner.loss(batch, tokens, totals)
    return float(loss.detach()), {name: value / tokens for name, value in totals.items()}


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo(scale: str, model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two steps on the same eight completions of two prompts: the same advantages, and the same loss before and after a step.

    TRL's loss type bnpo is the one that is a mean over the tokens of a batch. Without its bias correction, which weighs the
    divergence by the ratio (DeepSeek-V3.2), the divergence is that of DeepSeekMath.
    """
    from trl import GRPOConfig, GRPOTrainer

    options = {
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "num_iterations": 2,
        "loss_type": "bnpo",
        "scale_rewards": scale,
        "use_bias_correction_kl": False,
    }
    steps = recorded(GRPOTrainer, GRPOConfig, model, tokenizer, tmp_path, **options)
    assert len(steps) == 2
    assert torch.equal(steps[0].batch["completion_ids"], steps[1].batch["completion_ids"])
    params = GRPOParams(
        **TRAINING, clip_ratio=0.2, clip_ratio_high=0.3, kl_estimator="k3", scale_by_deviation=scale == "group"
    )
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
        loss, logged = our_loss(params, learned, policy_of(model, step.weights))
        assert loss == pytest.approx(step.loss, rel=1e-4, abs=1e-5)
    # The comparison would see little if the second step were like the first, or one term hid the other.
    assert 0.05 < logged["clipped"] < 0.95
    assert 0.1 < logged["kl_loss"] < 10
    assert len(set(experience.lengths.tolist())) > 1


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
