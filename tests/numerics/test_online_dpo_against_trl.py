"""TRL as the oracle: the loss and the gradient of its online DPO trainer, on completions that it sampled and ranked."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.settings.resources import Resources
from stages.alignment.online_dpo import OnlineDPO, OnlineDPOParams
from stages.lib.on_policy.actor_critic import ActorCritic
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.pair_learning import PairLearner
from stages.lib.training.params import derive_batch
from tests.numerics.test_on_policy_against_trl import PROMPTS, flat, model, no_telemetry, tokenizer

__all__ = ["model", "no_telemetry", "tokenizer"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""

BETA, PENALTY = 0.2, 3.0


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """What a completion is worth: a number that differs from one to the next."""
    return [(sum(ids) * 7919 % 1009) / 100 for ids in completion_ids]


def recorded(model: Path, tokenizer: Any, out: Path) -> list[Any]:
    """Of three steps on two prompts: completions, scores, weights before the step, loss and gradient."""
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    steps: list[Any] = []

    class Recording(OnlineDPOTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, *arguments: Any, **options: Any) -> Any:
            steps.append(SimpleNamespace(weights=copy.deepcopy(model.state_dict())))
            loss = super().training_step(model, *arguments, **options)
            steps[-1].loss = float(loss)
            steps[-1].gradient = flat([parameter.grad for parameter in model.parameters()]).clone()
            return loss

        def _generate(self, *arguments: Any, **options: Any) -> Any:
            written = super()._generate(*arguments, **options)
            steps[-1].written = [each.clone() for each in written[:4]]
            return written

        def _calculate_rewards_from_functions(self, *arguments: Any, **options: Any) -> Any:
            rewards = super()._calculate_rewards_from_functions(*arguments, **options)
            steps[-1].rewards = rewards.clone()
            return rewards

    Recording(
        model=LlamaForCausalLM.from_pretrained(model),
        ref_model=LlamaForCausalLM.from_pretrained(model),
        reward_funcs=reward,
        args=OnlineDPOConfig(
            str(out),
            per_device_train_batch_size=2,
            max_new_tokens=12,
            max_length=128,
            max_steps=3,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            temperature=1.0,
            beta=BETA,
            loss_type="sigmoid",
            missing_eos_penalty=PENALTY,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            seed=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    ).train()
    return steps


@torch.no_grad()
def experience_of(step: Any, writer: ActorCritic, reference: ActorCritic, end: int) -> Experience:
    """TRL's completions as ours: those of a prompt, which are half a batch apart there, together."""
    prompts, prompt_masks, completions, masks = step.written
    half = len(prompts) // 2
    episodes = []
    for position, row in enumerate(row for first in range(half) for row in (first, first + half)):
        prompt = prompts[row][prompt_masks[row].bool()].tolist()
        ids = completions[row][masks[row].bool()].tolist()
        whole_1T = torch.tensor([[*prompt, *ids]])
        said = [each(whole_1T, torch.ones_like(whole_1T), len(ids)).logprobs[0].numpy() for each in (writer, reference)]
        episodes.append(
            Episode(
                position=position,
                row_index=0,
                prompt_ids=np.array(prompt),
                ids=np.array(ids),
                ended=ids[-1] == end,
                rewards=np.array([float(step.rewards[row])]),
                generator_logprobs=said[0],
                logprobs=said[0],
                ref_logprobs=said[1],
                values=np.zeros(len(ids), dtype=np.float32),
            )
        )
    return Experience(episodes)


def test_three_steps_have_their_loss_and_their_gradient(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Each step on two pairs; what was cut off loses the same, and in the second step the policy is no longer the reference."""

    def policy_of(weights: Any = None) -> ActorCritic:
        policy = LlamaForCausalLM.from_pretrained(model)
        if weights is not None:
            policy.load_state_dict(weights)
        return ActorCritic(policy.eval())

    steps = recorded(model, tokenizer, tmp_path)
    params = OnlineDPOParams(
        rewards=[{"kind": "regular_expression", "pattern": "x"}],
        rollouts=1,
        rollout_batch_size=4,
        global_batch_size=2,
        max_prompt_tokens=64,
        max_new_tokens=12,
        learning_rate=3e-3,
        kl_coefficient=BETA,
        missing_end_penalty=PENALTY,
    )
    ended: list[float] = []
    for step in steps:
        policy = policy_of(step.weights)
        experience = experience_of(step, policy_of(step.weights), policy_of(), tokenizer.eos_token_id)
        scores_N = experience.rewards[:, 0] - PENALTY * (1 - experience.ended)
        parts: Any = SimpleNamespace(engine=SimpleNamespace(forward=policy), padding_id=2)
        ctx: Any = SimpleNamespace(seed=0, resources=Resources(), world=SimpleNamespace(size=1))
        learner = PairLearner(ctx, params, OnlineDPO(params), parts, derive_batch(2, Resources()))
        learned = learner.taught_by(
            experience.with_advantages(*learner.algorithm.advantages(experience, scores_N, BETA)[:2])
        )
        losses = [learner.loss(learner.collate(learned.episodes[start : start + 2]), 2, {}) for start in (0, 2)]
        sum(losses).backward()  # type: ignore[union-attr]
        gradient = flat([parameter.grad for parameter in policy.parameters()])
        assert sum(float(loss.detach()) for loss in losses) == pytest.approx(step.loss, abs=1e-6)
        assert float((gradient - step.gradient).norm() / step.gradient.norm()) < 1e-5
        ended += experience.ended.tolist()
    assert 0 < sum(ended) < len(ended), "the penalty would not be seen"
    assert abs(steps[1].loss - steps[0].loss) > 0.01
