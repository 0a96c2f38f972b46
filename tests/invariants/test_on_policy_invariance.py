"""What must train identically on-policy: one process and two, small and large micro batches, any memory layout.

Completions are the same token by token, because each is drawn with numbers of its own; so all that follows is, but for
the last bits of sums that are added up in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import REWARDS, make_other_tokenizer, write_policy, write_reward_model

pytestmark = pytest.mark.slow

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""How far numbers may be apart. Losses and advantages are means of terms around 1, rounded at 1e-7, which nearly cancel."""
SUMS = ("chosen_logprob_change", "rejected_logprob_change", "margin")
"""Means of differences between log-probabilities of whole completions, which are around -40: of these the last bit is 4e-6."""
NOISE = ("generator_logprob_gap", "generator_logprob_gap_max")
"""These are nothing but rounding."""

COMMON: dict[str, Any] = {
    "rewards": REWARDS,
    "rollouts": 2,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "epochs_per_rollout": 2,
    "max_prompt_tokens": 40,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-5,  # or Adam would make steps of full length out of gradients that are nothing but rounding
    "normalize_rewards": True,
    "heldout_prompts": 5,  # cannot be shared evenly
    "journal_samples": 16,
}
PPO = {
    **COMMON,
    # Under ZeRO-3 the reward model is split, too, and all processes score together.
    "rewards": [*REWARDS, {"kind": "reward_model", "weight": 0.5}],
    "kl_coefficient": 0.1,
    "kl_target": 0.05,
    "kl_horizon": 80,
    "entropy_coefficient": 0.01,
}
PARAMS: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "ppo_ptx": {**PPO, "ptx_coefficient": 0.5, "ptx_batch_size": 8},
    "ppo_lora": {**PPO, "adapter": {"method": "lora", "rank": 4}},
    "ppo_freeze": {**PPO, "adapter": {"method": "freeze", "last_layers": 1}},
    "grpo": COMMON,
    "grpo_background": {**COMMON, "background_rollouts": True, "mismatch_cap": 2.0},
    # Two pairs a step.
    "online_dpo": {
        **{name: value for name, value in COMMON.items() if name != "normalize_rewards"},
        "completions_per_prompt": 4,
        "global_batch_size": 2,
        "kl_coefficient": 0.1,
        "learning_rate": 2e-4,
    },
    "grpo_prefix": {**COMMON, "learning_rate": 1e-2, "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}},
}


@dataclass(frozen=True)
class Spread:
    """How a step is spread: in one process or two, in which layout, in micro batches of which size."""

    processes: int
    layout: str | None
    micro_batch_size: int
    gradient_checkpointing: bool = False

    def __str__(self) -> str:
        layout = f"{self.layout or 'plain'}-{self.micro_batch_size}"
        return f"{self.processes}-{layout}{'-recomputed' * self.gradient_checkpointing}"


CLASSES: dict[str, list[Spread]] = {
    "ppo": [
        Spread(1, None, 4),
        Spread(1, None, 1),
        Spread(1, "zero1", 4),
        Spread(1, "zero2", 1),
        Spread(1, "zero3", 4),
        Spread(2, None, 1),
        Spread(2, "zero1", 1),
        Spread(2, "zero2", 4),
        Spread(2, "zero3", 4),
        Spread(2, None, 4, gradient_checkpointing=True),
    ],
    # The first micro batch of a step is one that the critic has no part in.
    "ppo_ptx": [Spread(1, None, 4), Spread(2, None, 1), Spread(2, "zero2", 4), Spread(1, "zero3", 4)],
    "ppo_lora": [Spread(1, None, 4), Spread(2, None, 1), Spread(2, "zero2", 4, True), Spread(2, "zero3", 4)],
    "ppo_freeze": [Spread(1, None, 4), Spread(2, "zero2", 4), Spread(2, "zero3", 4)],
    "grpo": [Spread(1, None, 4), Spread(2, None, 1)],
    "grpo_background": [Spread(1, None, 4), Spread(2, "zero2", 1), Spread(2, "zero3", 4)],
    "online_dpo": [Spread(1, None, 2), Spread(2, None, 1), Spread(2, "zero2", 1), Spread(2, "zero3", 1)],
    "grpo_prefix": [Spread(1, None, 4), Spread(2, None, 1), Spread(2, "zero3", 4)],
}
OTHERS = [(name, spread) for name, spreads in CLASSES.items() for spread in spreads[1:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Spread], Job]:
    folder = tmp_path_factory.mktemp("on_policy_invariance")
    tokenizer = make_tokenizer()
    chats = write_chats(folder / "chats")
    model = write_policy(folder / "model", tokenizer)
    reward = write_reward_model(folder / "reward", make_other_tokenizer(), max_position_embeddings=512)
    jobs = {}
    for name, spreads in CLASSES.items():
        inputs = {"model": model, "prompts": chats}
        if name.startswith("ppo"):
            inputs["reward"] = reward
        if "ptx_coefficient" in PARAMS[name]:
            inputs["chats"] = chats
        for spread in spreads:
            resources = {
                "micro_batch_size": spread.micro_batch_size,
                "deepspeed": spread.layout,
                "gradient_checkpointing": spread.gradient_checkpointing,
                "log_every_steps": 1,
            }
            kind = f"stages.alignment.{name if name == 'online_dpo' else name.partition('_')[0]}"
            jobs[name, spread] = Job(
                folder / f"{name}-{spread}", kind, PARAMS[name], inputs, resources, processes=spread.processes
            )
    run_forked(folder, list(jobs.values()))
    return jobs


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What a line of the journal says of training, without times."""
    timed = ("time", "seconds", "per_second")
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and not name.endswith(timed) and name not in NOISE
    }


@pytest.mark.parametrize(("name", "spread"), OTHERS, ids=lambda each: str(each))
def test_numbers_do_not_depend_on_how_a_step_is_spread(
    runs: dict[tuple[str, Spread], Job], name: str, spread: Spread
) -> None:
    job, reference = runs[name, spread], runs[name, CLASSES[name][0]]
    for line, expected in zip(job.events("rollout"), reference.events("rollout"), strict=True):
        assert line["samples"] == expected["samples"] and len(line["samples"]) == 16
        behind = "background" in name and line["rollout"] == 2
        assert (max(line[noise] for noise in NOISE) < 1e-5) != behind
    for event, count in (("step", 8), ("rollout", 2), ("heldout", 2)):
        lines, expected_lines = job.events(event), reference.events(event)
        assert len(lines) == len(expected_lines) == count
        for line, expected in zip(lines, expected_lines, strict=True):
            found, wanted = numbers(line), numbers(expected)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                absolute = 1e-5 if key in SUMS else ABSOLUTE
                assert found[key] == pytest.approx(value, rel=RELATIVE, abs=absolute), key


@pytest.mark.parametrize(("name", "spread"), OTHERS, ids=lambda each: str(each))
def test_all_publish_the_same_tensors(runs: dict[tuple[str, Spread], Job], name: str, spread: Spread) -> None:
    """Policy, critic and adapters. The learning rates of the 8 steps, which Adam moves weights by, add up to 0.0045."""
    folder, reference = (runs[name, each].work / "out" for each in (spread, CLASSES[name][0]))
    files = sorted(path.relative_to(reference) for path in reference.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert (
        len(files)
        == {
            "ppo": 2,
            "ppo_ptx": 2,
            "ppo_lora": 4,
            "ppo_freeze": 4,
            "grpo": 1,
            "grpo_background": 1,
            "online_dpo": 1,
            "grpo_prefix": 1,
        }[name]
    )
    for file in files:
        found, expected = load_file(folder / file), load_file(reference / file)
        assert found.keys() == expected.keys()
        for weight, tensor in found.items():
            assert tensor.shape == expected[weight].shape
            assert float((tensor - expected[weight]).abs().max()) < 2e-5, (file, weight)


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_moves(runs: dict[tuple[str, Spread], Job], name: str) -> None:
    """Policies that stood still would agree with any other."""
    steps = runs[name, CLASSES[name][0]].events("step")
    assert [line["policy_kl"] > 1e-5 for line in steps] == [False, True, True, True] * 2
    least = 1e-3 if name == "grpo_prefix" else 0.1  # a few keys and values move a policy less than all its weights
    assert all(line["gradient_norm"] > least for line in steps)
