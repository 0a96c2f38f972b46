"""PPO on a bandit whose best policy is known: one token per prompt, rewards from a table, a penalty for leaving the reference.

With one token there is one decision, and what is maximized over all policies is, for a prompt x,

    J(pi) = sum_a pi(a|x) (r(x, a) - beta log(pi(a|x) / ref(a|x))).

With Z = sum_a ref(a|x) exp(r(x, a) / beta) and pi*(a|x) = ref(a|x) exp(r(x, a) / beta) / Z, the reward in it is
r = beta log Z + beta log(pi* / ref), so J(pi) = beta log Z - beta KL(pi || pi*): the optimum is pi*, its value is
beta log Z, and what a policy misses is beta KL(pi || pi*). (Levine, 2018; Rafailov et al., 2023, appendix A.1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.alignment.ppo import STAGE
from tests.distributed.training_world import write_model
from tests.integration.on_policy_world import write_prompts
from tests.integration.preference_world import run

pytestmark = pytest.mark.slow

SPECIAL = ("<s>", "</s>", "<pad>")
ARMS = tuple("abcdefgh")
ANSWERS = {"x": "a", "y": "e"}
"""Prompt -> the arm that its row names."""
REWARDS: list[dict[str, Any]] = [
    {"kind": "exact_match", "column": "answer"},
    {"kind": "regular_expression", "pattern": "[abc]", "whole": True, "weight": 0.5},
    {"kind": "regular_expression", "pattern": "[gh]", "whole": True, "weight": -0.5},
]
TABLE: dict[str, dict[str, float]] = {
    "x": {"a": 1.5, "b": 0.5, "c": 0.5, "g": -0.5, "h": -0.5},
    "y": {"a": 0.5, "b": 0.5, "c": 0.5, "e": 1.0, "g": -0.5, "h": -0.5},
}
"""What these rewards add up to, by hand; 0 for every other token, special ones included."""
BETA = 0.5
TRAINING: dict[str, Any] = {
    "rewards": REWARDS,
    "rendering": "raw",
    "rollouts": 30,
    "rollout_batch_size": 128,
    "global_batch_size": 64,
    "max_prompt_tokens": 2,
    "max_new_tokens": 1,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "kl_coefficient": BETA,
    "heldout_prompts": 2,
    "publish_critic": False,
}


def make_tokenizer() -> Any:
    """A token per arm and per prompt."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *ARMS, *ANSWERS)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def logp_XV(folder: Path, tokenizer: Any, temperature: float) -> Tensor:
    """What the model in `folder` says of every token after every prompt, prompts x vocabulary."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids_XT = torch.tensor([[tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(prompt)] for prompt in ANSWERS])
    with torch.no_grad():
        logits_XV = model(input_ids=ids_XT).logits[:, -1].double()
    return (logits_XV / temperature).log_softmax(-1)


def rewards_XV(tokenizer: Any, table: Mapping[str, Mapping[str, float]]) -> Tensor:
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([[table[prompt].get(word, 0.0) for word in words] for prompt in ANSWERS]).double()


def objective_X(policy_XV: Tensor, ref_XV: Tensor, r_XV: Tensor) -> Tensor:
    """J of each prompt, from log-probabilities."""
    return (policy_XV.exp() * (r_XV - BETA * (policy_XV - ref_XV))).sum(-1)


def test_objective_by_hand() -> None:
    """Two arms, ref (1/4, 3/4), r (0.5 log 3, 0), beta 1/2: exp(r / beta) = (3, 1), Z = 3/4 + 3/4 = 3/2, pi* = (1/2, 1/2).

    J(pi*) = 1/2 log(3/2). J(ref) = 1/4 x 0.5 log 3, for ref pays no penalty.
    """
    ref, r = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[3.0, 1.0]]).log() / 2
    best = torch.tensor([[0.5, 0.5]]).log()
    log3, log_z = torch.tensor(3.0).log(), torch.tensor(1.5).log()
    torch.testing.assert_close(objective_X(best, ref, r), (log_z / 2)[None])
    torch.testing.assert_close(objective_X(ref, ref, r), (log3 / 8)[None])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ppo_reaches_the_optimum_of_a_bandit(temperature: float, tmp_path: Path) -> None:
    """Of the way from the reference's J to the optimum beta log Z, less than 2% is left, mean over both prompts.

    The policy is the softmax of logits / temperature, and so is the reference; both are enumerated, none is sampled.
    """
    tokenizer = make_tokenizer()
    model = write_model(tmp_path / "model", tokenizer, num_hidden_layers=1, initializer_range=0.1)
    rows = [{"text": prompt, "columns": {"answer": answer}} for prompt, answer in ANSWERS.items()]
    prompts = write_prompts(tmp_path / "prompts", rows, rows)
    _, context = run(
        STAGE,
        {"model": model, "prompts": prompts},
        {**TRAINING, "temperature": temperature},
        tmp_path / "run",
        resources={"log_every_steps": 1000, "save_every_steps": 100_000},
    )
    ref_XV, policy_XV = (logp_XV(folder, tokenizer, temperature) for folder in (model, context.out))
    r_XV = rewards_XV(tokenizer, TABLE)
    optimum_X = BETA * (ref_XV + r_XV / BETA).logsumexp(-1)
    start, end = (float(objective_X(each, ref_XV, r_XV).mean()) for each in (ref_XV, policy_XV))
    optimum = float(optimum_X.mean())
    missed = (optimum - end) / (optimum - start)
    assert missed < 0.02, (
        f"J of the reference {start:.4f}, of the policy {end:.4f}, at best {optimum:.4f}: missed {missed:.2%}"
    )
